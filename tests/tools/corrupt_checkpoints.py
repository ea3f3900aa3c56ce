"""Damage checkpoints and weights at random places: python -m tests.tools.corrupt_checkpoints

One byte of a file gets another value, or the file is cut, extended or deleted; then the checkpoint
is restored, or the weights are loaded, in this process. It must come to values that are those
saved, or to one line: never to other values, never to another exception. The damage is undone.
Prints JSON, and the sentence for docs/results/faults.md.
"""

import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from glide_jax.data.emoji.npz import load_npz
from glide_jax.training.checkpoint import MANIFEST, Checkpoints, steps_in
from glide_jax.training.export import export
from glide_jax.training.runs import restore_run
from glide_jax.weights.registry import load_model
from glide_jax.weights.store import flatten, map_arrays
from glide_jax.weights.torch_file import read_torch_file
from glide_jax.weights.torch_writer import write_torch_file
from tests.support.commands import RECIPE, make_images, make_weights, run
from tests.support.damage import Tally, damaged, report

# Returns the outcome of a read.
Read = Callable[[], str]
# One in so many checkpoints is restored as a run does it, which moves a broken one aside.
MOVED = 8


def same(a: Any, b: Any) -> bool:
    """Whether two trees have equal arrays of equal dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def make_run(folder: Path) -> Path:
    """Train the tiny recipe for four steps with two checkpoints, and return the run."""
    result = run(
        "train.py", "--config", RECIPE, "--data.source", make_images(folder / "images"),
        "--out", folder / "run", "--steps", 4, "--save-every", 2, "--sample-every", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


class Restores:
    """Reads of the newest checkpoint of a run.

    Attributes:
        files: the files of that checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        newest, before = steps_in(folder / "checkpoints")[:2]
        self.files = sorted(p for p in self._step(newest).rglob("*") if p.is_file())
        self._truth = {newest: restore_run(folder)[1]}
        with self._aside(newest):
            self._truth[before] = restore_run(folder)[1]
        self._newest = newest
        manifest = self._step(newest) / MANIFEST / "metadata"
        self._source = json.loads(manifest.read_bytes())["source"]

    def _step(self, step: int) -> Path:
        return self._folder / "checkpoints" / str(step)

    @contextlib.contextmanager
    def _aside(self, step: int):
        self._step(step).rename(self._folder / "aside")
        yield
        (self._folder / "aside").rename(self._step(step))

    def __call__(self) -> str:
        """Restore, and return "unchanged", "earlier" or "accepted"."""
        self._count += 1
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            state = self._resumed() if self._count % MOVED == 0 else restore_run(self._folder)[1]
        step, warnings = int(state.step), said.getvalue().splitlines()
        if step not in self._truth or not same(state, self._truth[step]):
            return "accepted"
        if step == self._newest:
            return "unchanged" if not warnings else "several lines"
        named = warnings[0].startswith(f"warning: the checkpoint of step {self._newest} is broken")
        return "earlier" if len(warnings) == 1 and named else "several lines"

    def _resumed(self) -> Any:
        """Restore as a resumed run does, from a copy: it moves a broken checkpoint aside."""
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(self._folder / "checkpoints", Path(folder) / "checkpoints")
            with Checkpoints(Path(copy), 3) as checkpoints:
                found = checkpoints.restore(self._truth[self._newest], self._source)
            return found.state


def make_npz(path: Path) -> Path:
    """Write a small file of the fields of emoji64, and return it."""
    rng, count = np.random.default_rng(0), 12
    names = np.array([f"concept {i % 3}" for i in range(count)])
    fields: dict[str, Any] = {
        "caption": names,
        "concept": names,
        "style": np.array(["Plain style"] * count),
    }
    split = np.array(["train"] * count)
    image = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    np.savez_compressed(path, image=image, split=split, **fields)
    return path


def load_folder(folder: Path) -> Any:
    """Return what weights in a folder compute: their arrays, sizes and schedule."""
    model = load_model(folder)
    plain = replace(model, name="", defaults={}, prompts=())
    facts = (plain.config, plain.noise_schedule, plain.diffusion_steps, plain.prediction_type)
    return flatten(model.params) | {"facts": np.frombuffer(repr(facts).encode(), np.uint8)}


def reads(folder: Path, whole_run: Path | None = None) -> dict[str, tuple[list[Path], Read]]:
    """Return the files of each kind of weights and data, and their read."""
    make_weights(folder / "weights")
    arrays, _ = map_arrays(folder / "weights" / "model.safetensors")
    write_torch_file(folder / "weights.pt", arrays)
    make_npz(folder / "emoji.npz")
    config = shutil.copytree(folder / "weights", folder / "embedded") / "config.json"
    _as_embedded(config)

    def npz(path: Path) -> Any:
        found = load_npz(path)
        return {k: getattr(found, k) for k in ("images", "captions", "styles", "concepts")}

    loads: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "weights folder": (folder / "weights", load_folder),
        "embedded weights": (folder / "embedded", load_folder),
        "safetensors": (folder / "weights" / "model.safetensors", lambda p: map_arrays(p)[0]),
        "PyTorch file": (folder / "weights.pt", read_torch_file),
        "npz": (folder / "emoji.npz", npz),
    }
    if whole_run:
        export(whole_run, folder / "exported")
        loads["exported weights"] = (folder / "exported", load_folder)
    return {kind: _compared(path, load) for kind, (path, load) in loads.items()}


def _as_embedded(config: Path) -> None:
    """Move the checksums from `model.safetensors` to `config.json`, as embedded weights have."""
    model = config.with_name("model.safetensors")
    data = model.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    sums = header.pop("__metadata__")
    text = json.dumps(header).encode()
    model.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    config.write_text(json.dumps(json.loads(config.read_text()) | sums, indent=2))


def _compared(path: Path, load: Callable[[Path], Any]) -> tuple[list[Path], Read]:
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    # A copy: the arrays of a mapped file change with it.
    truth = jax.tree.map(lambda x: np.array(x), load(path))
    return files, lambda: "unchanged" if same(load(path), truth) else "accepted"


def corrupt(files: list[Path], read: Read, places: int, seed: int, name: str = "") -> Tally:
    """Damage files at so many places, read each time, and return the outcomes."""
    rng, tally = random.Random(seed), Tally()
    assert read() == "unchanged"
    for _ in tqdm(range(places), name, disable=None):
        with damaged(files, rng) as what:
            tally.add(what, read)
    assert read() == "unchanged"
    return tally


def corrupt_all(folder: Path, places: int, weight_places: int, seed: int) -> dict[str, Tally]:
    """Damage a checkpoint of a tiny run, and each kind of weights."""
    whole_run = make_run(folder)
    restores = Restores(whole_run)
    found = {"checkpoint": corrupt(restores.files, restores, places, seed, "checkpoint")}
    for kind, (files, read) in reads(folder, whole_run).items():
        found[kind] = corrupt(files, read, weight_places, seed, kind)
    return found


def sentence(found: dict[str, Tally]) -> str:
    """Return the sentence of docs/results/faults.md."""
    parts = []
    for kind, tally in found.items():
        c = tally.counts
        outcomes = f"{c['refused']} refused with one line"
        if c["earlier"]:
            outcomes = f"{c['earlier']} restored from the checkpoint before, {outcomes}"
        parts.append(f"{kind}: {c.total()} damages, {outcomes}, {c['unchanged']} without effect")
    accepted, traces = (sum(t.counts[k] for t in found.values()) for k in ("accepted", "traceback"))
    return f"{'; '.join(parts)}; {accepted} accepted with other values, {traces} tracebacks"


def main(
    out: Path | None = None, places: int = 1000, weight_places: int = 1000, seed: int = 0
) -> None:
    """Damage a checkpoint and weights at random places.

    Args:
        out: A new folder for the run and the weights; a temporary one if there is none.
        places: Number of damages to the checkpoint.
        weight_places: Number of damages to each kind of weights.
        seed: Seed of the places.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found = corrupt_all(out or Path(temporary), places, weight_places, seed)
    report(found, sentence(found))


if __name__ == "__main__":
    tyro.cli(main)
