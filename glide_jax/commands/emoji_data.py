"""`glide-jax data`: makes the emoji data set from its pinned sources."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from glide_jax.errors import one_line_errors


def fetch(to: Path, vendors: tuple[str, ...] = ()) -> None:
    """Download the source packages (58 MB), each at its pinned version, and verify them.

    npm and apt-get do the downloading. Where one of them is missing, put the archive into
    the folder by hand: it is verified and not downloaded again.

    Args:
        to: Folder for the archives; created if needed.
        vendors: Only these sets of drawings, such as noto; by default all eleven.
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
    """Render the drawings (pip install 'glide-jax[data]') and write the .npz file.

    Args:
        sources: The folder that `fetch` filled.
        out: The file to write.
        size: Height and width of the images. Record i is the same drawing at both sizes.
        workers: Processes that render.
        vendors: Only these sets of drawings, such as noto; by default all eleven.
    """
    from glide_jax.data.emoji.rasteriser import rasterise

    print(f"{rasterise(sources, out, size, workers, vendors or None)} images in {out}")


def prepare(npz: Path, data_dir: Path) -> None:
    """Write the images as a tensorflow-datasets data set (array_record, no TensorFlow).

    Args:
        npz: The file that `rasterise` wrote.
        data_dir: Folder of data sets; the images go to emoji64/1.0.0 in it.
    """
    from glide_jax.data.emoji.builder import prepare

    print(f"the data set is in {prepare(npz, data_dir)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; one line and exit code 1 or 2 where something is wrong."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"fetch": fetch, "rasterise": rasterise, "prepare": prepare},
            prog="glide-jax data",
            description=__doc__,
            args=arguments,
        )
