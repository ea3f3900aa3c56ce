"""Write the largest errors against the original code as a page.

python -m tests.tools.parity --report docs/results/parity.md
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from numpy.typing import ArrayLike

import glide_jax as glide
from glide_jax.models.clip import NoisedCLIP
from tests.diffusion import test_sampling
from tests.models import test_clip
from tests.support import golden
from tests.support.golden import Comparison

TESTS = (
    "models/test_layers.py",
    "models/test_models.py",
    "models/test_clip.py",
    "diffusion/test_schedule.py",
    "diffusion/test_sampling.py",
    "diffusion/test_released_loops.py",
    "project/test_parity.py",
    "diffusion/test_losses.py",
    "weights/test_registry_variants.py",
    "models/test_tokenizers.py::test_golden_ids_and_text",
    "models/test_tokenizers.py::test_golden_gpt2_arrays",
    "models/test_tokenizers.py::test_golden_clip_arrays",
)
# The arrays without a row in the table, by "file key": why they have none.
INPUT = "an input, weights, or names"
UNUSED_PADDING = "not compared: attention masks for a padding that this code does not use"
UNUSED_PREDICTION = "not compared: a kind of prediction that no released model uses"
UNUSED_VARIANCE = "variance LEARNED alone: not compared, since no released model uses it"
WITHOUT_ROW = (
    ("clip *_attn_bias", UNUSED_PADDING),
    ("tables legacy|*", "not compared: schedules that no released model uses"),
    ("training_losses types|PREVIOUS_X|*", UNUSED_PREDICTION),
    ("training_losses types|START_X|*", UNUSED_PREDICTION),
    ("training_losses types|*|LEARNED|*", UNUSED_VARIANCE),
    ("training_losses bpd|*", "not compared: this code has no bits-per-dimension loop"),
    (
        "diffusion_steps *|ddim_cond_pred_xstart",
        "not compared: this code does not return it; its step is compared",
    ),
    ("diffusion_steps *|x0_from_eps", "the same arithmetic as `pmv_noclip_pred_xstart`"),
    ("diffusion_steps *|q_mean", "part of `q_sample`, as are its variances"),
    ("diffusion_steps *|q_var", "part of `q_sample`"),
    ("diffusion_steps *|q_logvar", "part of `q_sample`"),
    (
        "diffusion_steps *|pmv_*_log_variance",
        "compared through the noise of a step: `test_learned_variance`",
    ),
    ("diffusion_steps *|pmv_inp_mean", "`p_sample_inp` without its noise"),
    ("training_losses *|loss", "relative, 1e-5 (1e-3 at t = 0): `test_hybrid_loss`"),
    ("training_losses *|vb", "relative, 1e-5 (1e-3 at t = 0): `test_hybrid_loss`"),
    (
        "training_losses dgll",
        "5e-5 where the log-likelihood is above -5: `test_discretised_log_likelihood`",
    ),
    ("train_grads loss", "relative error of the mean, 1e-4: `test_losses_of_the_network`"),
    ("train_grads mse", "relative error of the mean, 1e-4: `test_losses_of_the_network`"),
    ("train_grads vb", "relative error of the mean, 1e-4: `test_losses_of_the_network`"),
    ("train_grads adamw1|*", "2e-7 of one step: `test_parameters_and_their_ema_...`"),
    ("train_grads ema0.9999|*", "1e-7: `test_parameters_and_their_ema_...`"),
    ("tokenizers *", "equal, with the decoded texts of `tokenizers.json`: `test_golden_*`"),
    ("weights_clip_*", "equal after conversion there and back: `test_there_and_back`"),
    *((f"* {key}", INPUT) for key in ("x", "t", "x0", "x255", "x_T", "*.x_T", "*.x0", "*|t")),
    *((f"* {key}", INPUT) for key in ("tokens", "mask", "lens", "prompts", "names", "*_tokens")),
    *((f"* {key}", INPUT) for key in ("noise", "*|noise", "*.noise", "*|noise0", "*_lens")),
    *((f"* {key}", INPUT) for key in ("*low_res", "*inpaint_*", "*.image", "*.mask", "x_rect")),
    *((f"* {key}", INPUT) for key in ("*model_output", "*|x", "*|x0", "*|grad", "*|known", "tf")),
    *((f"units {key}", INPUT) for key in ("*.x", "*.t", "*.tf", "*.w", "*.b", "*.emb", "*.enc")),
    *((f"* {key}", INPUT) for key in ("*|hole", "*.heads", "*.qkv", "*.ekv", "*sd.*")),
)
HEAD = """# Parity with the original code

This page compares the outputs of this code with those of the original PyTorch code, on small
networks with random weights. Figures for networks of the released sizes are in
[released weights](../guide/released-weights.md).

The reference outputs come from openai/glide-text2im 69b5307, openai/guided-diffusion 22e0df8 and,
for PLMS, afiaka87/glide-finetune 9e62b6e. They were computed with torch 2.13.0 on a CPU, in float32
and without dropout. They are stored in `tests/fixtures/golden`, and the tests compare with them.
This command generates the page:

```sh
python -m tests.tools.parity --report docs/results/parity.md
```

"""
TABLE = """
Each row is one quantity, over all schedules, spacings, positions in the network and parameters. It
shows the comparison with the largest ratio of error to tolerance. Tolerances are absolute. A
relative tolerance is multiplied by the value at which the error was found, or by the largest value
of the same step or image.

Two errors look large but are not. `temb*` is the sine and cosine of numbers up to 1000, and near
1000 float32 numbers are 6.1e-5 apart. `base_ddim_noclip.steps` samples without clipping, which with
random weights gives values of up to 8.9e4; its tolerance is 5e-6 of the largest value of each step.

| file | quantity | arrays | largest error | tolerance |
|---|---|---:|---:|---:|
"""
REST = """
## Arrays that are not in the table

| file | quantity | how it is compared |
|---|---|---|
"""
PRECISION = """
## 16-bit trunks

How far outputs with a float16 or bfloat16 trunk are from those with a float32 trunk, on the same
machine: the largest difference, and the root mean square of the differences divided by that of the
output. Parameters, norms, softmax, time embedding and head stay float32. "6 steps" is the final
image, in [-1, 1], of ancestral sampling with guidance scale 3 and random weights, which amplify
differences more than a trained network does.

`emoji64` is four images of the embedded model with its default settings.

| output | trunk | largest difference | relative rms |
|---|---|---:|---:|
"""
NETWORKS = ("base", "superres", "inpaint", "superres_inpaint")


@dataclass(frozen=True)
class Options:
    """Run the parity tests and print the largest error of each quantity.

    The exit code is that of the tests, or 1 where the tests leave out an array of the reference.
    """

    report: Path | None = None
    """Markdown file to write the page to; without it nothing is written."""


def recorded(check: Callable, rtol: float) -> Callable:
    """Return an assertion of `np.testing` that records its largest error; `rtol` is its default."""

    def recording(found, wanted, *args, **options):
        check(found, wanted, *args, **options)
        a, b = (np.asarray(array, np.float64) for array in np.broadcast_arrays(found, wanted))
        allowed = options.get("atol", 0.0) + options.get("rtol", rtol) * np.abs(b)
        worst = np.argmax(used(np.abs(a - b), allowed))
        golden.note(wanted, np.abs(a - b).flat[worst], allowed.flat[worst])

    return recording


def used(error: ArrayLike, allowed: ArrayLike) -> np.ndarray:
    """Return the share of its tolerance that an error uses; with tolerance 0, 0 or 1."""
    error, allowed = np.asarray(error), np.asarray(allowed)
    return np.where(allowed > 0, error / np.where(allowed > 0, allowed, 1), error > 0)


def quantity(file: str, key: str) -> str:
    """Return the name of an array without schedule, spacing, position and parameter.

    It contains no "|", which would end a column of the table.
    """
    first, *rest = key.split("|")
    if file.startswith("weights"):
        return "*"
    if first == "types":
        return f"{first} {rest[0]}"
    if first in ("grad", "adamw1", "ema0.9999", "space", "legacy", "bpd", "guided_cosine"):
        return first
    if rest:
        return rest[-1]
    if file in ("units", "trace_base"):
        return f"{key.split('.')[0]}*"
    return key.split("sd.")[0] + "sd.*" if "sd." in key else key


def table(comparisons: Iterable[Comparison]) -> list[str]:
    """Return a row for each quantity of each file."""
    worst: dict[tuple[str, str], Comparison] = {}
    keys: dict[tuple[str, str], set[str]] = {}
    for c in comparisons:
        if c.file and without_row(f"{c.file} {c.key}") != INPUT:
            row = c.file, quantity(c.file, c.key)
            keys.setdefault(row, set()).add(c.key)
            if row not in worst or used(c.error, c.tolerance) > used(
                worst[row].error, worst[row].tolerance
            ):
                worst[row] = c
    return [
        f"| {file} | `{what}` | {len(keys[file, what])} | {c.error:.1e} | {c.tolerance:.1e} |"
        for (file, what), c in sorted(worst.items())
    ]


def without_row(name: str) -> str | None:
    """Return why an array has no row in the table, if it may have none; `name` is "file key"."""
    return next((reason for pattern, reason in WITHOUT_ROW if fnmatch(name, pattern)), None)


def rest(compared: set[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return rows for the arrays that are not in the table, and the names of forgotten arrays."""
    found: dict[tuple[str, str, str], None] = {}
    forgotten = []
    for path in sorted(golden.FOLDER.glob("*.npz")):
        for key in golden.load(path.stem):
            name = f"{path.stem} {key}"
            if (path.stem, key) in compared:
                continue
            reason = without_row(name)
            if reason is None:
                forgotten.append(name)
            elif reason != INPUT:
                found[path.stem, quantity(path.stem, key), reason] = None
    return [f"| {file} | `{what}` | {reason} |" for file, what, reason in found], forgotten


def machine() -> str:
    """Return the machine and the versions that the errors were measured with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    return (
        f"Measured on {os.cpu_count()} {jax.default_backend().upper()} cores "
        f"({platform.machine()}) with {packages},\nPython {platform.python_version()}; float32 "
        'trunk, `jax_default_matmul_precision="highest"`.\n'
    )


def outputs(dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the outputs of the reference networks with a trunk of that dtype: `(name, output)`."""
    for name in NETWORKS:
        inputs = golden.load(f"unet_{name}")
        text = golden.encode(name, inputs["tokens"], inputs["mask"], dtype)
        images = {new: inputs[old] for old, new in golden.IMAGES.items() if old in inputs}
        x, t = inputs["x"], inputs["t"]
        yield f"`unet_{name}`", golden.forward(name, x, t, text, dtype=dtype, **images)
    x, t, tokens, lengths = test_clip.inputs()
    model = NoisedCLIP(test_clip.config(), jnp.dtype(dtype))
    yield "`clip`, images", test_clip.apply("encode_image", x, t, model=model)
    yield "`clip`, captions", test_clip.apply("encode_text", tokens, lengths, model=model)
    guidance = [glide.classifier_free(3.0), glide.clamp_x_0()]
    _, conds, run, x, tape = test_sampling.base_run("6", glide.SOLVERS["ddpm"], guidance)
    networks = {"main": golden.network("base", dtype)}
    state = glide.run_plan(networks, conds, run, jnp.asarray(x), jnp.asarray(tape))
    yield "`base`, 6 steps", np.asarray(state.x)
    pipe = glide.load("emoji64", upsampler="none", dtype=dtype)
    yield "`emoji64`", pipe("a red apple", num=4, progress=False).images / 127.5 - 1


def precision() -> list[str]:
    """Return a row for each output and each 16-bit dtype."""
    exact = dict(outputs("float32"))
    rows = []
    for dtype in ("float16", "bfloat16"):
        for name, found in outputs(dtype):
            off = np.asarray(found) - np.asarray(exact[name])
            rms = np.sqrt((off**2).mean() / (np.asarray(exact[name]) ** 2).mean())
            rows.append(f"| {name} | {dtype} | {np.abs(off).max():.1e} | {rms:.1e} |")
    return sorted(rows)


def main() -> int:
    """Run the command and return its exit code."""
    options = tyro.cli(Options, prog="python -m tests.tools.parity")
    folder = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, rtol in (("assert_allclose", 1e-7), ("assert_array_equal", 0.0)):
            patch.setattr(np.testing, name, recorded(getattr(np.testing, name), rtol))
        # In this process, where the comparisons are recorded.
        flags = ["-n", "0", "-q", "-p", "no:cacheprovider"]
        code = int(pytest.main([*flags, *(str(folder / name) for name in TESTS)]))
    rows = table(golden.COMPARISONS)
    others, forgotten = rest({(c.file, c.key) for c in golden.COMPARISONS})
    jax.config.update("jax_default_matmul_precision", "highest")
    lines = [HEAD + machine() + TABLE, *rows, REST, *others, PRECISION, *precision()]
    page = "\n".join(line.rstrip("\n") for line in lines) + "\n"
    print("\n".join(rows))
    for name in forgotten:
        print(f"not compared by any test: {name}")
    if options.report is not None:
        options.report.write_text(page)
    return code or int(bool(forgotten))


if __name__ == "__main__":
    raise SystemExit(main())
