"""Make the emoji data set: `glide-jax data fetch`, then `rasterise`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from glide_jax.errors import one_line_errors
from glide_jax.folders import expand_words


def fetch(to: Path, vendors: tuple[str, ...] = ()) -> None:
    """Download the sources of the artwork (58 MB), in fixed versions, and verify them.

    This needs npm and apt-get. Without them, put the archives into the folder yourself: they are
    verified and not downloaded again.

    Args:
        to: Folder for the archives; created if needed.
        vendors: Only these sets of artwork, such as noto. Empty: all eleven.
    """
    from glide_jax.data.emoji.packages import fetch_sources

    fetch_sources(to, vendors or None)
    print(f"the sources are in {to}")


def rasterise(
    sources: Path,
    out: Path,
    size: Literal[64, 256] = 64,
    workers: int = 2,
    vendors: tuple[str, ...] = (),
) -> None:
    """Render the artwork (needs pip install '.[data]') and write the .npz file.

    Args:
        sources: Folder that `fetch` filled.
        out: File to write; its name must end in .npz.
        size: Height and width of the images. Record i is the same artwork at both sizes.
        workers: Processes that render, at least 1.
        vendors: Only these sets of artwork, such as noto. Empty: all eleven.
    """
    from glide_jax.data.emoji.rasteriser import rasterise

    print(f"{rasterise(sources, out, size, workers, vendors or None)} images in {out}")


def prepare(npz: Path, data_dir: Path) -> None:
    """Write the images as a tensorflow-datasets data set (array_record, without TensorFlow).

    Args:
        npz: File that `rasterise` wrote.
        data_dir: Folder of data sets. The images go to emoji64/1.0.0 in it, or emoji256/1.0.0.
    """
    from glide_jax.data.emoji.builder import prepare

    print(f"the data set is in {prepare(npz, data_dir)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; on an error print one line and exit with code 1 or 2."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"fetch": fetch, "rasterise": rasterise, "prepare": prepare},
            prog="glide-jax data",
            description=__doc__,
            args=expand_words(sys.argv[1:] if arguments is None else arguments),
        )
