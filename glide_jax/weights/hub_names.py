"""Names of weights on the Hugging Face Hub: `hf://user/name@revision/folder`."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from glide_jax.errors import UsageError

FORM = "hf://USER/NAME, hf://USER/NAME@REVISION or hf://USER/NAME@REVISION/FOLDER"
# `pathlib` makes one slash of two.
_PREFIX = re.compile(r"hf:/{1,2}(?!/)")
_SITE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REPO = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]*))?(?P<path>/.*)?"
)
_MODEL = re.compile(r"(?P<file>.+\.(?:pt|pth|ckpt|safetensors)):(?P<choice>[^/]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What git allows in the name of a branch, nearly.
_REVISION = re.compile(r"(?!.*\.\.)[^\s@~^:?*\[\\]+")
# First words of names that the Hub uses for what holds no weights.
_OTHERS = ("datasets", "spaces", "buckets")


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub, and what of it is meant.

    Attributes:
        repo: "user/name".
        revision: a branch, a tag or a commit; "": the main branch.
        path: a folder or a file in the repository; "": its root.
        choice: one of several models in a file; "": its only one.
    """

    repo: str
    revision: str = ""
    path: str = ""
    choice: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"hf://{self.repo}{revision}{path}" + (f":{self.choice}" if self.choice else "")


def on_hub(name: str | Path) -> bool:
    """Whether weights are named by an address of the Hub, well formed or not."""
    text = str(name).lower()
    return text.startswith("hf:") or bool(_SITE.match(text))


def read_hub_name(name: str | Path) -> HubName:
    """Return the parts of `hf://user/name`, `hf://user/name@revision/folder`, `.../file.pt:ema`.

    A revision with a slash is written with `%2F`, but for `refs/pr/1`.

    Raises:
        UsageError: the name has another form.
    """
    text = str(name).strip()
    if site := _SITE.match(text.lower()):
        address = text[site.end() :].rstrip("/")
        parts = address.split("/")
        hint = f"hf://{'/'.join(parts[:2])}" if len(parts) > 1 else FORM
        raise UsageError(f"{text} is the address of a page: write {hint}")
    prefix = _PREFIX.match(text)
    match = _REPO.fullmatch(text[prefix.end() :]) if prefix else None
    if match is None:
        raise UsageError(f"{text!r} does not name a repository of the Hub: write {FORM}")
    repo, revision = match["repo"], unquote(match["revision"] or "")
    user, title = repo.split("/")
    if user in _OTHERS:
        raise UsageError(f"{text!r} names {user} of the Hub, which hold no weights: write {FORM}")
    for part in (user, title):
        if not _PART.fullmatch(part) or "--" in part or ".." in part:
            raise UsageError(f"{text!r}: {part!r} cannot be a name on the Hub: write {FORM}")
    if match["revision"] is not None and not _REVISION.fullmatch(revision):
        raise UsageError(f"{text!r} has no revision after the @: name a branch, a tag or a commit")
    path = (match["path"] or "").strip("/")
    if {"", ".", ".."} & set(path.split("/")) and path:
        raise UsageError(f"{text!r}: {path!r} cannot be a folder of a repository: write {FORM}")
    if "@" in path.rpartition("/")[2]:
        folder, _, late = path.rpartition("@")
        raise UsageError(
            f"{text!r} has its revision at the end: write hf://{repo}@{late or 'REVISION'}/{folder}"
        )
    model = _MODEL.fullmatch(path)
    path, choice = (model["file"], model["choice"]) if model else (path, "")
    return HubName(repo, revision, path, choice)
