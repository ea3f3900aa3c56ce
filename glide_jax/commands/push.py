"""`glide-jax weights push`: a folder of weights or a run to the Hugging Face Hub."""

import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from glide_jax.errors import UsageError
from glide_jax.folders import expand_home, package_version
from glide_jax.training.config import read_config
from glide_jax.training.run_facts import run_facts, shown
from glide_jax.training.runs import is_run, open_clip, open_model
from glide_jax.weights.hub import CARD, FILES, local, upload
from glide_jax.weights.hub_names import HubName, on_hub, read_hub_name
from glide_jax.weights.model_card import UNKNOWN, Facts, model_card
from glide_jax.weights.registry import ASSETS, EMBEDDED, EMBEDDED_CLIPS, save_model
from glide_jax.weights.store import CONFIG, MODEL, load_weights

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|RUN")]
To = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="hf://USER/NAME")]
_HIDDEN = tyro.conf.arg(help_behavior_hint="")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def push(
    source: Source,
    to: To,
    *,
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff, _HIDDEN] = False,
    revision: Annotated[str, tyro.conf.arg(aliases=["--branch"]), _HIDDEN] = "",
    message: Annotated[str, _HIDDEN] = "",
    license: str = UNKNOWN,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff, _HIDDEN] = False,
    out: Annotated[Path | None, _HIDDEN] = None,
) -> None:
    """Upload weights to the Hugging Face Hub, with a model card.

    For example:
      push runs/mine hf://user/mine       the EMA weights of a run
      push mine hf://user/mine            a folder, as it is
      push mine hf://user/mine --dry-run  only write mine_hub

    Log in first: `hf auth login`, or HF_TOKEN. A README.md in the folder is uploaded as it is.

    Args:
        source: Folder of weights, run of train.py, name (emoji64), or .pt file.
        to: Repository, hf://USER/NAME or hf://USER/NAME/FOLDER. It is created if it does not exist.
        private: Create the repository as private.
        revision: Branch. It is created if it does not exist. Default: the main branch.
        message: Message of the commit. Default: the version of glide-jax.
        license: Licence of the weights in the model card: mit, apache-2.0, cc-by-4.0, ...
        dry_run: Write the folder with the model card, and upload nothing.
        out: With --dry-run, the folder to write. Default: NAME_hub in this folder.
    """
    name = _target(to, revision)
    if not _LICENSE.fullmatch(license):
        raise UsageError(f"--license takes an identifier such as mit or cc-by-4.0, not {license!r}")
    if out is not None and not dry_run:
        raise UsageError("--out is for --dry-run")
    with ExitStack() as stack:
        if dry_run:
            folder = expand_home(out or f"{name.repo.partition('/')[2]}_hub")
            if folder.exists():
                raise UsageError(f"{folder} exists: remove it, or choose another with --out")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _assemble(source, folder, name, license)
        files = sorted(path for path in folder.iterdir())
        if dry_run:
            for file in files:
                print(f"{_size(file)}: {file}")
            print(f"nothing is uploaded; glide-jax weights push {folder} {name} uploads it")
            return
        text = message or f"Weights, by glide-jax {package_version()}"
        pushed = upload(folder, name, private=private, message=text)
        print(f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB: {name}")
        print(f"this commit: {pushed}")


def _target(to: str, revision: str) -> HubName:
    """Return where to push.

    Raises:
        UsageError: it names no folder of the Hub, or two branches.
    """
    name = read_hub_name(to)
    if name.choice or name.path.endswith(FILES):
        raise UsageError(f"{to} names a file: a push writes a folder, hf://USER/NAME/FOLDER")
    if revision and name.revision not in ("", revision):
        raise UsageError(f"{to} and --revision {revision} are two branches: name one")
    if revision:
        # Read as part of a name, it is checked like one.
        revision = read_hub_name(f"hf://{name.repo}@{revision.replace('/', '%2F')}").revision
    return replace(name, revision=revision or name.revision)


def _assemble(source: str, folder: Path, name: HubName, license: str) -> None:
    """Write what is uploaded: config, arrays and card.

    Raises:
        UsageError, GlideError: there are no such weights, or they are broken.
    """
    path = _folder_of(source)
    training, began_with = {}, ""
    if is_run(path):
        # Orbax takes most of a second to import.
        from glide_jax.training.export import export

        export(path, folder)
        recipe = read_config(path / CONFIG)
        training = run_facts(path, load_weights(folder)[0]["steps"])
        began_with = recipe.starts_from
    elif (path / CONFIG).is_file() and (path / MODEL).is_file():
        _check(path)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG, MODEL, CARD):
            if (path / file).is_file():
                shutil.copyfile(path / file, folder / file)
    else:
        save_model(open_model(source), folder)
        began_with = source if on_hub(source) else ""
        training = {} if on_hub(source) else {"converted from": f"`{shown(source)}`"}
    if (folder / CARD).exists():
        if license != UNKNOWN:
            raise UsageError(f"{path / CARD} is uploaded as it is: change the license in it")
        return
    config, arrays, _ = load_weights(folder)
    count = sum(np.size(array) for array in arrays.values())
    dtypes = sorted({str(array.dtype) for array in arrays.values()})
    facts = Facts(count, dtypes, training, began_with)
    (folder / CARD).write_text(model_card(name, config, facts, license), encoding="utf-8")


def _folder_of(source: str) -> Path:
    if source in (*EMBEDDED, *EMBEDDED_CLIPS):
        return ASSETS / source
    return expand_home(local(source))


def _check(folder: Path) -> None:
    """Check that others will be able to load a folder.

    Raises:
        GlideError: they will not.
    """
    if "clip" in load_weights(folder)[0]:
        open_clip(folder)
    else:
        open_model(folder)


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.3f} MB"
