"""python -m glide_jax.weights export runs/emoji64 my-model: weights that can be passed on."""

import sys
from pathlib import Path

import tyro

from glide_jax.errors import GlideError
from glide_jax.training.export import export


def export_run(run: tyro.conf.Positional[Path], to: tyro.conf.Positional[Path]) -> None:
    """Writes the averaged weights of a training run as bfloat16 safetensors.

    Args:
        run: folder of a run of train.py.
        to: folder to write config.json and model.safetensors into.
    """
    count = export(run, to)
    size = (to / "model.safetensors").stat().st_size
    print(f"{count:,} parameters, {size / 1e6:.1f} MB: {to}")


def main() -> None:
    """The command line."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"export": export_run}, prog="python -m glide_jax.weights", description=__doc__
        )
    except GlideError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
