"""Weights on the Hugging Face Hub: download by name, upload of a folder.

All of the network is in this file. A download is data that glide-jax reads itself: `config.json`,
`model.safetensors`, or one file under the released names. No code of a repository is fetched or
run.
"""

import glob
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glide_jax.errors import GlideError, UsageError, one_line
from glide_jax.weights.choosing import SAFETENSORS
from glide_jax.weights.hub_names import COMMIT, HubName, on_hub, read_hub_name
from glide_jax.weights.store import CONFIG, MODEL, read_config_json

FILES = (".pt", ".pth", ".ckpt", SAFETENSORS)
CARD = "README.md"
_SHOWN = 6  # Files that a message lists.
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Download:
    """Weights of the Hub in the local cache.

    Attributes:
        path: of the folder, or of the file, `FILE:MODEL` if the name chose a model.
        name: the name with the commit that was read: it stays these weights.
    """

    path: str
    name: str


def local(weights: str | Path) -> str | Path:
    """Return the path of weights, after a download if they are named `hf://...`.

    Raises:
        UsageError, GlideError: see `download`.
    """
    return download(weights).path if on_hub(weights) else weights


def download(weights: str | Path) -> Download:
    """Return weights of the Hub in its local cache, downloaded if they are not there yet.

    Without a network, or with `HF_HUB_OFFLINE=1`, those in the cache are used.

    Args:
        weights: `hf://user/name`, `hf://user/name@revision/folder`, or `hf://user/name/base.pt`.

    Raises:
        UsageError: the name is malformed, the extra `hub` is not installed, or the folder has
            several files to choose from.
        GlideError: there is no such repository, revision, folder or file, it holds no weights, or
            the Hub cannot be reached.
    """
    name = read_hub_name(weights)
    snapshot = _config_or_file(name)
    # The commit does not change between two requests, the branch could.
    pinned = replace(name, revision=snapshot.name)
    place = snapshot / name.path
    if not place.is_file():
        place = _weights_in(name, pinned, snapshot)
    path = f"{place}:{name.choice}" if name.choice else str(place)
    return Download(path, str(pinned))


def config_of(weights: str | Path) -> dict[str, Any]:
    """Return the `config.json` of weights on the Hub, without their arrays; {} if they have none.

    Raises:
        UsageError, GlideError: see `download`.
    """
    name = read_hub_name(weights)
    return _config_in(_config_or_file(name) / name.path)


def _config_or_file(name: HubName) -> Path:
    """Return the snapshot with the config of a folder, or with the file that is named."""
    return _snapshot(name, [_inside(name, CONFIG), *([name.path] if name.path else [])])


def _config_in(folder: Path) -> dict[str, Any]:
    """Return a config of glide-jax; {}: there is none, or one of another library."""
    config = read_config_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return config if "format" in config and {"model", "clip"} & set(config) else {}


def _weights_in(name: HubName, pinned: HubName, snapshot: Path) -> Path:
    """Return the folder of weights, or the only file of weights in it."""
    folder = snapshot / name.path
    if _config_in(folder):
        _snapshot(pinned, [_inside(name, MODEL)])
        if not (folder / MODEL).is_file():
            raise GlideError(f"{name} has {CONFIG} but no {MODEL}: push the weights again")
        return folder
    files, start = _files_of(pinned, snapshot), _inside(name, "")
    beside = [file.removeprefix(start) for file in files if file.startswith(start)]
    if not beside:
        raise GlideError(f"{name} is no folder or file: {name.repo} holds {_first_files(files)}")
    foreign = (folder / CONFIG).is_file()
    torch = [file for file in beside if file.endswith(FILES) and "/" not in file]
    if foreign or not torch:
        note = f" ({CONFIG} is of another program)" if foreign else ""
        raise GlideError(
            f"{name} holds no weights of glide-jax{note}: it holds {_first_files(beside)}"
        )
    if len(torch) > 1:
        example = replace(name, path=_inside(name, torch[0]))
        raise UsageError(
            f"{name} holds several files of weights, {_first_files(torch)}: name one, for example "
            f"{example}"
        )
    _snapshot(pinned, [_inside(name, torch[0])])
    return folder / torch[0]


def _inside(name: HubName, file: str) -> str:
    return f"{name.path}/{file}" if name.path else file


def _first_files(files: Sequence[str]) -> str:
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return (", ".join(files[:_SHOWN]) or "no files") + more


# ---------------------------------------------------------------- the network


def _hub() -> Any:
    """Return the package huggingface_hub, which takes a while to import.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise UsageError(
            "weights of the Hub (hf://) need huggingface_hub: pip install '.[hub]'"
        ) from None


def _snapshot(name: HubName, files: Sequence[str]) -> Path:
    """Return the cached folder of a commit, with those of these files that the commit has."""
    # Imported here by the package, which then sets the level of its log: before `_one_line_errors`.
    fetch, bar = _hub().snapshot_download, _bar()
    with _one_line_errors(name):
        folder = fetch(
            name.repo,
            revision=name.revision or None,
            allow_patterns=[glob.escape(file) for file in files],
            library_name="glide-jax",
            tqdm_class=bar,
        )
    return Path(folder)


def _bar() -> Any:
    """Return a progress bar that shows only what takes time."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # pyright: ignore[reportUntypedBaseClass]
        """A progress bar of the Hub that appears after a second and vanishes at the end."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options | {"delay": 1, "leave": False})

    return Bar


def _files_of(name: HubName, snapshot: Path) -> list[str]:
    """Return the files of a repository; without a network, those in the cache."""
    hub = _hub()
    try:
        with _one_line_errors(name):
            # `list_repo_files` would retry for half a minute where there is no network.
            about = hub.HfApi().model_info(name.repo, revision=name.revision or None)
        return sorted(file.rfilename for file in about.siblings or ())
    except GlideError:
        cached = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        if not cached:
            raise
        return sorted(cached)


def upload(folder: Path, to: HubName, *, private: bool = False, message: str = "") -> HubName:
    """Upload a folder, as one commit.

    The repository and the branch are created where they do not exist.

    Args:
        folder: all its files are uploaded.
        to: the repository, the branch, and the folder in the repository.
        private: the repository is created as private. One that exists must be private already.
        message: of the commit.

    Returns:
        The name with the commit.

    Raises:
        UsageError: the extra `hub` is not installed, or the revision is a commit.
        GlideError: there is no permission, or the Hub cannot be reached.
    """
    if COMMIT.fullmatch(to.revision):
        raise UsageError(f"{to} is a commit, which cannot change: push to a branch")
    api = _hub().HfApi(library_name="glide-jax")
    with _one_line_errors(to, pushes=True):
        api.create_repo(to.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(to.repo).private:
            raise UsageError(
                f"{to.repo} exists and is public: make it private in its settings, or push without "
                "--private"
            )
        if to.revision and not to.revision.startswith("refs/"):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=to.repo,
            folder_path=folder,
            path_in_repo=to.path or None,
            revision=to.revision or None,
            commit_message=message,
        )
    return replace(to, revision=commit.oid)


@contextmanager
def _one_line_errors(name: HubName, *, pushes: bool = False) -> Iterator[None]:
    """Make one line of the errors of huggingface_hub; its warnings repeat them."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except GlideError:
        raise
    except Exception as error:
        if line := _line(name, error, pushes):
            raise GlideError(line) from None
        raise
    finally:
        log.setLevel(level)


def _line(name: HubName, error: Exception, pushes: bool) -> str:
    """Return what is wrong and what to do; "" for a fault of another kind."""
    errors = importlib.import_module("huggingface_hub.errors")
    server = importlib.import_module("huggingface_hub").HfApi().endpoint
    if isinstance(error, errors.LocalEntryNotFoundError):
        # It stands for the error that kept the library from asking the Hub.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        where = "nothing can be pushed" if pushes else "it is not in the cache of downloads"
        return f"{name}: {where}, and HF_HUB_OFFLINE is set: unset it, or run once with a network"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name}: {name.repo} has no revision {name.revision or 'main'!r}: name a branch, a "
            "tag or a commit"
        )
    status = getattr(getattr(error, "response", None), "status_code", 0)
    invalid = "Invalid credentials" in str(error)
    if pushes and status in (401, 403):
        return (
            f"no permission to push to {name.repo} at {server}: {LOG_IN}, with a token that may "
            f"write to {name.repo.partition('/')[0]}"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {server}/{name.repo}, and {LOG_IN}"
    if status in (401, 403) and invalid:
        return f"{name}: {server} refuses the token: {LOG_IN}, with a valid one"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{name}: there is no repository {name.repo} at {server}, or it is private: check the "
            f"name; for a private one {LOG_IN}"
        )
    if status:
        return f"{name}: {server} answered with the error {status}: {_reason(error)}"
    if isinstance(error, errors.HFValidationError):
        return f"{name} cannot be a name on the Hub: {_reason(error)}"
    if pushes and isinstance(error, ValueError) and CARD in str(error):
        return f"{name}: {server} refuses {CARD}: {one_line(str(error).partition(chr(10))[2])}"
    # The errors of the transport, of whichever HTTP client the library uses.
    if isinstance(error, errors.HTTPError):
        return f"{name}: cannot reach {server} ({_reason(error)}): check the network"
    if isinstance(error, (ValueError, LookupError, RuntimeError, errors.FileMetadataError)):
        return f"{name}: {server} does not answer as a Hub does: {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    """Return the first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0])[:200] if lines else type(error).__name__
