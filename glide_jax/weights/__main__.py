"""Weights between formats: python -m glide_jax.weights convert base.pt base"""

from dataclasses import asdict
from pathlib import Path

import tyro

from glide_jax.errors import one_line_errors
from glide_jax.training.export import export
from glide_jax.weights import load_model, save_weights, to_released
from glide_jax.weights.registry import save_model


def export_run(run: tyro.conf.Positional[Path], to: tyro.conf.Positional[Path]) -> None:
    """Writes the averaged weights of a training run as bfloat16 safetensors.

    Args:
        run: folder of a run of train.py.
        to: folder to write config.json and model.safetensors into.
    """
    count = export(run, to)
    size = (to / "model.safetensors").stat().st_size
    print(f"{count:,} parameters, {size / 1e6:.1f} MB: {to}")


def convert(
    source: tyro.conf.Positional[str], to: tyro.conf.Positional[Path], released: bool = False
) -> None:
    """Writes a model in the project's own format, or under the released names.

    Args:
        source: a .pt file, a name (openai/base, emoji64), a folder of weights, or a run.
        to: folder to write config.json and model.safetensors into.
        released: write arrays under the released names and in torch's layout instead, so that
            the original code can load them (safetensors.torch.load_file).
    """
    model = load_model(source)
    if released:
        save_weights(to, asdict(model.config), to_released(model.params))
    else:
        save_model(model, to)
    size = (to / "model.safetensors").stat().st_size
    print(f"{model.config.variant} {model.config.image_size}, {size / 1e6:.1f} MB: {to}")


def main() -> None:
    """The command line."""
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"convert": convert, "export": export_run},
            prog="python -m glide_jax.weights",
            description=__doc__,
        )


if __name__ == "__main__":
    main()
