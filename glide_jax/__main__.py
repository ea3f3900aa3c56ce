"""The command `glide-jax` (also `python -m glide_jax`)."""

import importlib.util
import sys
from collections.abc import Callable, Sequence

from glide_jax.errors import UsageError, did_you_mean, one_line_errors
from glide_jax.folders import SCRIPTS

USAGE = """usage: glide-jax COMMAND [OPTIONS]

  sample     generate images: glide-jax sample "a red apple"
  train      train a model: glide-jax train --config cfg64 --data.source FOLDER
  evaluate   score a model or a folder of images: glide-jax evaluate ranking --data emoji64.npz
  weights    convert, export (also an EMA, a LoRA), push: glide-jax weights convert base.pt base
  data       make the emoji data set: glide-jax data fetch --to sources
  demo       generate and edit images in a browser (needs pip install '.[demo]')
  env        print versions, devices and folders, for bug reports

glide-jax COMMAND --help describes the options of a command."""


def run_script(name: str, arguments: Sequence[str]) -> None:
    """Run `sample.py` or `train.py`, the same file as at the top of the repository."""
    sys.argv = [f"glide-jax {name}", *arguments]
    spec = importlib.util.spec_from_file_location(f"glide_jax_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def evaluate(arguments: Sequence[str]) -> None:
    """Run `glide-jax evaluate`."""
    from glide_jax.commands.evaluate import main

    main(arguments)


def weights(arguments: Sequence[str]) -> None:
    """Run `glide-jax weights`."""
    from glide_jax.commands.convert import main

    main(arguments)


def data(arguments: Sequence[str]) -> None:
    """Run `glide-jax data`."""
    from glide_jax.commands.emoji_data import main

    main(arguments)


def demo(arguments: Sequence[str]) -> None:
    """Run `glide-jax demo`."""
    from glide_jax.demo.launch import main

    main(arguments)


def environment(arguments: Sequence[str]) -> None:
    """Run `glide-jax env`."""
    from glide_jax.commands.environment import main

    main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sample": lambda arguments: run_script("sample", arguments),
    "train": lambda arguments: run_script("train", arguments),
    "evaluate": evaluate,
    "weights": weights,
    "data": data,
    "demo": demo,
    "env": environment,
}


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    with one_line_errors():
        if name in ("-h", "--help"):
            print(USAGE)
        elif name in COMMANDS:
            COMMANDS[name](arguments)
        else:
            raise UsageError(
                f"there is no command {name!r}{did_you_mean(name, COMMANDS)}: choose one of "
                f"{', '.join(COMMANDS)}"
            )


if __name__ == "__main__":
    main()
