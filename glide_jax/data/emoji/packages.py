"""Source packages of emoji64, pinned: what `glide-jax data fetch` downloads and verifies.

Ten packages come from `npm pack` and two from `apt-get download`. Each has a pinned version and
checksum, so the same bytes are rasterised everywhere. An archive that is in the folder already is
used if it has the pinned checksum.
"""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from glide_jax.errors import GlideError, UsageError


class Package(NamedTuple):
    """One archive.

    Attributes:
        tool: "npm" or "apt".
        name: name of the package.
        version: its version.
        checksum: "sha512-<base64>", in the form of npm, or "sha256:<hex>", in the form of Debian.
    """

    tool: str
    name: str
    version: str
    checksum: str

    @property
    def file(self) -> str:
        """File name of the archive, as `npm pack` or `apt-get download` writes it."""
        if self.tool == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def _npm(name: str, version: str, checksum: str) -> Package:
    return Package("npm", name, version, "sha512-" + checksum)


PACKAGES = {
    "noto": _npm(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": _npm(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "twemoji": _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent-emoji-flat": _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "fluent-emoji-high-contrast": _npm(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "fxemoji": _npm(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "emojione": _npm(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "flat-color-icons": _npm(
        "@iconify-json/flat-color-icons",
        "1.2.3",
        "KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
    ),
    "fluent-emoji-3d": _npm(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "openclipart": Package(
        "apt",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "sha256:989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
    "tango": Package(
        "apt",
        "tango-icon-theme",
        "0.8.90-11",
        "sha256:dff317aca52fde744b884a02dd9fc2702a0cc6aaecc22271b5abf6906cd90b94",
    ),
}
# Names, keywords and groups of the Unicode emoji; every set of artwork needs them.
NAMES = _npm(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def fetch_sources(folder: str | os.PathLike, vendors: Iterable[str] | None = None) -> list[Path]:
    """Download the pinned packages that a folder does not have yet.

    An archive is moved into the folder when its checksum is verified. So an interrupted run leaves
    only complete archives, and the next run downloads the others.

    Args:
        folder: folder of the archives; created if needed.
        vendors: only these sets of artwork; None for all.

    Returns:
        The paths of the archives.

    Raises:
        UsageError: there is no such vendor.
        GlideError: npm or apt-get is missing or fails, or an archive has the wrong checksum.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for package in _wanted(vendors):
        path = folder / package.file
        if path.exists():
            _verify(path, package)
            print(f"have   {path.name}", flush=True)
        else:
            print(f"fetch  {package.name} {package.version}", flush=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
                _download(package, Path(temporary), folder)
                _verify(Path(temporary) / package.file, package)
                os.replace(Path(temporary) / package.file, path)
        paths.append(path)
    return paths


def check_sources(folder: str | os.PathLike, vendors: Iterable[str] | None = None) -> None:
    """Raise GlideError unless every package is in `folder` with the right checksum."""
    missing = [p.file for p in _wanted(vendors) if not (Path(folder) / p.file).is_file()]
    if missing:
        raise GlideError(
            f"{folder}: lacks {', '.join(missing)}; get them with "
            f"`glide-jax data fetch --to {folder}`"
        )
    for package in _wanted(vendors):
        _verify(Path(folder) / package.file, package)


def _wanted(vendors: Iterable[str] | None) -> list[Package]:
    vendors = list(PACKAGES) if vendors is None else list(vendors)
    for vendor in vendors:
        if vendor not in PACKAGES:
            raise UsageError(f"no vendor {vendor!r}; there are {', '.join(PACKAGES)}")
    return [NAMES, *(PACKAGES[v] for v in PACKAGES if v in vendors)]


def _download(package: Package, to: Path, folder: Path) -> None:
    """Download the archive into `to` with npm or apt-get.

    Raises:
        GlideError: the tool is missing or fails; the message has its error.
    """
    manually = f"put {package.file} into {folder} yourself and run this again"
    if package.tool == "npm":
        spec = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", "--ignore-scripts", spec]
        remedy = f"install Node.js, or {manually}"
    else:
        # Debian and its derivatives only; on other systems the .deb comes from Debian's site.
        spec = f"{package.name}={package.version}"
        command = ["apt-get", "download", spec]
        remedy = f"use Debian, whose package this is, or {manually}"
    if shutil.which(command[0]) is None:
        raise GlideError(f"{spec}: {command[0]} is not installed; {remedy}")
    done = subprocess.run(command, cwd=to, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (to / package.file).is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        last = lines[-1] if lines else "no message"
        reason = next((line for line in lines if "E:" in line or " error " in line), last)
        hint = "" if package.tool == "npm" else "`apt-get update` may help, or "
        raise GlideError(f"{spec}: {command[0]} failed ({reason.strip()}); {hint}{manually}")


def _verify(path: Path, package: Package) -> None:
    """Raise GlideError if the file does not have the pinned checksum."""
    digest = hashlib.new(package.checksum[:6])
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if package.checksum[6] == "-":
        got = base64.b64encode(digest.digest()).decode()
    else:
        got = digest.hexdigest()
    if got != package.checksum[7:]:
        raise GlideError(
            f"{path}: its {package.checksum[:6]} is not the one of {package.name} "
            f"{package.version} (truncated, or another version); delete it and fetch again"
        )


def read_json(archive: Path, member: str) -> Any:
    """Return the content of a JSON file in an npm archive.

    Raises:
        GlideError: the archive has no such file.
    """
    for _, data in read_members(archive, lambda name: name == f"package/{member}"):
        return json.loads(data)
    raise GlideError(f"{archive}: has no {member}")


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files in a .tgz or .deb for which `wanted(name)`.

    Links are left out: in both Debian packages they only give an image a second name.
    """
    with open(archive, "rb") as file:
        inner = _deb_data(archive, file) if archive.suffix == ".deb" else file
        with tarfile.open(fileobj=inner, mode="r:*") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isfile() and wanted(name):
                    content = tar.extractfile(info)
                    assert content is not None  # it is a regular file
                    yield name, content.read()


def _deb_data(archive: Path, file: IO[bytes]) -> IO[bytes]:
    """Return data.tar.* of a .deb, an `ar` archive: 60-byte headers and even offsets."""
    if file.read(8) == b"!<arch>\n":
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            data = file.read(size + size % 2)[:size]
            if name.startswith("data.tar"):
                return io.BytesIO(data)
    raise GlideError(f"{archive}: not a Debian package")
