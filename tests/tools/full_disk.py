"""Fill the disk during each kind of write: python -m tests.tools.full_disk

Each kind of file is written once, and again with a disk that fills after some bytes: a small tmpfs
where this user may mount one, else a limit on the size of files. The write must end with exit code
1 and one line that names the fault and the file or its folder; what was there before must be
unchanged, and no file have part of its content. With space again, the same write must succeed.
Then a run of `train.py` does the same. Prints JSON, and the sentence for docs/results/faults.md.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from glide_jax.data.emoji.rasteriser import write_npz
from glide_jax.data.faults import Fault, Faults
from glide_jax.errors import one_line_errors
from glide_jax.evaluation.feature_files import _write as write_features
from glide_jax.evaluation.frechet import Moments, save_statistics
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.pipeline.images import Images
from glide_jax.training.checkpoint import Checkpoints, newest, steps_in
from glide_jax.training.config import write_config
from glide_jax.training.recipes import load_recipe
from glide_jax.training.writers import TensorBoard
from glide_jax.weights.store import save_weights
from glide_jax.weights.torch_writer import write_torch_file
from tests.support.commands import RECIPE, ROOT, environment, make_images
from tests.training.test_checkpoint import make_state, zeros

# Writes version 1 or 2 of some files into a folder.
Write = Callable[[Path, int], object]
# Shares of the bytes of a write after which the disk is full.
SHARES = (0.0, 0.3, 0.7)
NOISE = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)


def _checkpoint(folder: Path, version: int) -> None:
    with Checkpoints(folder / "checkpoints", 3) as checkpoints:
        checkpoints.save(version, make_state(version), {}, "data")


def _images(folder: Path, version: int) -> None:
    Images(NOISE, ("red",) * 3, version, (0, 1, 2), "tiny", {}).save(folder)


def _log(folder: Path, version: int) -> None:
    log = TensorBoard(folder / "logs" / str(version))  # its name has the second
    log.image("samples", NOISE[version], 1)
    log.close()


def _left_out(folder: Path, version: int) -> None:
    faults = tuple(Fault(f"{version} {i}.png", "no caption") for i in range(2000))
    Faults(faults).save(folder / "left_out.txt")


def _recipe(folder: Path, version: int) -> None:
    config = load_recipe(str(RECIPE))
    write_config(dataclasses.replace(config, out=str(folder), seed=version))


def _emoji(folder: Path, version: int) -> None:
    texts = {"caption": np.array([f"concept {version}"] * 3)}
    write_npz(folder / "emoji.npz", 96, (image.tobytes() for image in NOISE), texts)


def _array(version: int) -> np.ndarray:
    return np.random.default_rng(version).standard_normal((64, 64))


WRITES: dict[str, Write] = {
    "checkpoint": _checkpoint,
    "weights": lambda f, v: save_weights(f / "weights", {"v": v}, {"a": _array(v)}),
    "PyTorch file": lambda f, v: write_torch_file(f / "a.pt", {"a": _array(v)}),
    "images": _images,
    "preview": lambda f, v: Images(NOISE[:v], ("red",) * v, 0, (0, 1)[:v], "t", {}).save_preview(f),
    "curves and sample grids": _log,
    "left_out.txt": _left_out,
    "config.json of a run": _recipe,
    "features": lambda f, v: write_features(f / "features.npz", _array(v), (16, 16)),
    "statistics": lambda f, v: save_statistics(
        f / "statistics.npz", Moments(_array(v)[0], _array(v), 99)
    ),
    "report": lambda f, v: write_json(f / "report.json", {"v": list(range(3000 * v))}),
    "sheet of images": lambda f, v: write_png(f / "sheet.png", Image.fromarray(NOISE[v])),
    "emoji64.npz": _emoji,
}


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[tuple[Path, bool]]:
    """Provide a folder, and whether it is a disk of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder]
        own = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        try:
            yield Path(folder), own
        finally:
            if own:
                subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def full_after(folder: Path, free: int, own_disk: bool) -> Iterator[None]:
    """Leave so many bytes of a disk free; or let no file become larger."""
    ballast, limits = folder / ".ballast", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if own_disk:
            stats = os.statvfs(folder)
            with ballast.open("wb") as file:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - free)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        ballast.unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder under their final names."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        temporary = any(part.startswith(".") or "tmp" in part for part in Path(name).parts)
        # A log is appended to: readers skip an event that is not whole.
        if path.is_file() and not temporary and not name.startswith("logs/"):
            found[name] = path.read_bytes()
    return found


def fill(kind: str, folder: Path, share: float, own_disk: bool) -> str:
    """Fill the disk during a write, check what must hold, and return the line of the error."""
    write = WRITES[kind]
    with tempfile.TemporaryDirectory() as whole:
        write(Path(whole), 1)
        write(Path(whole), 2)
        after = contents(Path(whole))
        sizes = [path.stat().st_size for path in Path(whole).rglob("*") if path.is_file()]
    write(folder, 1)
    before = contents(folder)
    # A limit on each file must be below the largest.
    free = int(share * (sum(sizes) / 2 if own_disk else max(sizes))) // 4096 * 4096
    said = io.StringIO()
    with full_after(folder, free, own_disk), contextlib.redirect_stderr(said):
        try:
            with one_line_errors():
                write(folder, 2)
            code = 0
        except SystemExit as stop:
            code = stop.code
    line = said.getvalue()
    assert code == 1, f"{kind}: exit code {code}: {line}"
    assert line.startswith("error: ") and line.count("\n") == 1, f"{kind}: {line}"
    assert str(folder) in line, f"{kind}: the line names no file: {line}"
    assert "No space left" in line or "too large" in line or "RESOURCE" in line, f"{kind}: {line}"
    found = contents(folder)
    for name, data in before.items():
        assert name in found, f"{kind}: {name} was lost"
        assert found[name] in (data, after.get(name)), f"{kind}: {name} has changed"
    for name, data in found.items():
        # The time is in files of orbax, and no two images have one number.
        if kind not in ("checkpoint", "images"):
            assert data in (before.get(name), after.get(name)), f"{kind}: part of {name}"
        if name.endswith(".png"):
            Image.open(io.BytesIO(data)).load()
    if kind == "checkpoint":
        assert steps_in(folder / "checkpoints") == [1], "an unfinished checkpoint has its name"
        # A run resumes in a new process. In this one, parts of the failed save may still be ending.
        time.sleep(1)
    write(folder, 2)
    if kind == "checkpoint":
        state, _, broken = newest(folder / "checkpoints", zeros(make_state(0)))
        assert not broken and int(state.step) == 2
    else:
        assert len(contents(folder)) >= len(after), f"{kind}: not written with space"
    return line


def fill_all(shares: tuple[float, ...] = SHARES, kinds: tuple[str, ...] = ()) -> dict[str, str]:
    """Fill the disk during each kind of write, and return the last line of each."""
    lines = {}
    for kind in kinds or WRITES:
        for share in shares:
            with small_disk(8) as (folder, own):
                lines[kind] = fill(kind, folder, share, own).replace(str(folder), "FOLDER").strip()
    return lines


def fill_run(free: tuple[int, ...]) -> list[str]:
    """Fill the disk of runs of `train.py`, let each resume with space, and return the lines."""
    lines = []
    with tempfile.TemporaryDirectory() as outside:
        images = make_images(Path(outside) / "images")
        for size in free:
            with small_disk(64) as (folder, own):
                assert own, "a run needs a disk of its own: be root"
                command = [
                    sys.executable, ROOT / "train.py", "--config", RECIPE, "--data.source", images,
                    "--out", folder / "run", "--steps", 12, "--save-every", 3,
                    "--sample-every", 3, "--keep", 1, "--log-every", 1,
                ]  # fmt: skip

                def start(command: list[object] = command) -> subprocess.CompletedProcess:
                    return subprocess.run(
                        list(map(str, command)), env=environment(), cwd=ROOT, text=True,
                        capture_output=True, timeout=170, check=False,
                    )  # fmt: skip

                with full_after(folder, size, own):
                    result = start()
                errors = [s for s in result.stderr.splitlines() if "error: " in s]
                assert result.returncode == 1 and len(errors) == 1, result.stderr
                assert "Traceback" not in result.stderr, result.stderr
                lines.append(errors[0].replace(str(folder), "FOLDER"))
                print(f"{size} bytes: {lines[-1]}", file=sys.stderr, flush=True)
                again = start()
                assert again.returncode == 0 and "12 of 12 steps done" in again.stdout, again.stderr
    return lines


def main(runs: bool = True) -> None:
    """Fill the disk during each kind of write.

    Args:
        runs: Fill the disk of runs of `train.py` too (half a minute each; needs root).
    """
    lines = fill_all()
    of_runs = fill_run((0, 20_000, 3_000_000, 9_000_000)) if runs else []
    print(json.dumps({"writes": lines, "runs": of_runs}, indent=2))
    print(
        f"{len(lines)} kinds of write, {len(SHARES) * len(lines)} full disks: each ended with exit "
        "code 1 and one line with the fault and the place, files there before were unchanged, no "
        f"file had part of its content, and the same write succeeded with space; {len(of_runs)} "
        "runs of train.py whose disk filled ended with one line and resumed with the same command"
    )


if __name__ == "__main__":
    tyro.cli(main)
