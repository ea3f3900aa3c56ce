"""Worst errors against the original code: python -m tests.tools.parity --report docs/parity.md"""

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import glide_jax as glide
from glide_jax.models.clip import NoisedCLIP
from tests import golden, test_clip, test_sampling
from tests.support.golden import Comparison

TESTS = (
    "test_layers.py",
    "test_models.py",
    "test_clip.py",
    "test_schedule.py",
    "test_sampling.py",
    "test_release_loops.py",
    "test_parity.py",
    "test_losses.py",
    "test_registry_variants.py",
    "test_tokenizers.py::test_golden_ids_and_text",
    "test_tokenizers.py::test_golden_gpt2_arrays",
    "test_tokenizers.py::test_golden_clip_arrays",
)
# Of the arrays that no row of the table names: what they are, by "file key".
GIVEN = "a given input, weights, or names"
OTHERWISE = (
    ("clip *_attn_bias", "not compared: masks of a padding that is not done here"),
    ("tables legacy|*", "not compared: names of schedules that no release uses"),
    ("training_losses types|PREVIOUS_X|*", "not compared: a prediction that no release makes"),
    ("training_losses types|START_X|*", "not compared: a prediction that no release makes"),
    ("training_losses types|*|LEARNED|*", "not compared: a variance that no release learns"),
    ("training_losses bpd|*", "not compared: the bits-per-dimension loop is not rebuilt"),
    ("diffusion_steps *|ddim_cond_pred_xstart", "not compared: not returned; its step is"),
    ("diffusion_steps *|x0_from_eps", "the same arithmetic as `pmv_noclip_pred_xstart`"),
    ("diffusion_steps *|q_mean", "part of `q_sample`, as are its variances"),
    ("diffusion_steps *|q_var", "part of `q_sample`"),
    ("diffusion_steps *|q_logvar", "part of `q_sample`"),
    ("diffusion_steps *|pmv_*_log_variance", "from the noise of a step: `test_learned_variance`"),
    ("diffusion_steps *|pmv_inp_mean", "`p_sample_inp` without its noise"),
    ("training_losses *|loss", "relative, 1e-5 (1e-3 at t = 0): `test_hybrid_loss`"),
    ("training_losses *|vb", "relative, 1e-5 (1e-3 at t = 0): `test_hybrid_loss`"),
    ("training_losses dgll", "5e-5 where likely: `test_discretised_log_likelihood`"),
    ("train_grads loss", "relative, 1e-4, in the mean: `test_losses_of_the_network`"),
    ("train_grads mse", "relative, 1e-4, in the mean: `test_losses_of_the_network`"),
    ("train_grads vb", "relative, 1e-4, in the mean: `test_losses_of_the_network`"),
    ("train_grads adamw1|*", "2e-7 of the step: `test_parameters_and_their_average_...`"),
    ("train_grads ema0.9999|*", "1e-7: `test_parameters_and_their_average_...`"),
    ("tokenizers *", "equal, with the decoded texts of `tokenizers.json`: `test_golden_*`"),
    ("weights_clip_*", "equal, there and back: `test_there_and_back`"),
    *((f"* {key}", GIVEN) for key in ("x", "t", "x0", "x255", "x_T", "*.x_T", "*.x0", "*|t")),
    *((f"* {key}", GIVEN) for key in ("tokens", "mask", "lens", "prompts", "names", "*_tokens")),
    *((f"* {key}", GIVEN) for key in ("noise", "*|noise", "*.noise", "*|noise0", "*_lens")),
    *((f"* {key}", GIVEN) for key in ("*low_res", "*inpaint_*", "*.image", "*.mask", "x_rect")),
    *((f"* {key}", GIVEN) for key in ("*model_output", "*|x", "*|x0", "*|grad", "*|known", "tf")),
    *((f"units {key}", GIVEN) for key in ("*.x", "*.t", "*.tf", "*.w", "*.b", "*.emb", "*.enc")),
    *((f"* {key}", GIVEN) for key in ("*|hole", "*.heads", "*.qkv", "*.ekv", "*sd.*")),
)
HEAD = """# Parity with the original code

How far this code is from the original PyTorch code, on small networks with random weights: outputs
of openai/glide-text2im 69b5307, openai/guided-diffusion 22e0df8 and, for PLMS,
afiaka87/glide-finetune 9e62b6e, made with torch 2.13.0 on a CPU in float32, dropout off. They lie
in `tests/fixtures/golden` and are compared in the tests. This page is written by

```sh
python -m tests.tools.parity --report docs/parity.md
```

"""
TABLE = """
A row is a quantity: the comparison, among those of its arrays, that used most of its tolerance.
It stands for all schedules, spacings, places and parameters. Tolerances are absolute; where a test
has a relative one, it is here times the value at which the error was found, or the largest of its
row.

| file | quantity | arrays | largest error | tolerance |
|---|---|---:|---:|---:|
"""
REST = """
## What the table does not name

| file | quantity | how it is compared |
|---|---|---|
"""
PRECISION = """
## Trunks of sixteen bits

How far outputs with a float16 or bfloat16 trunk are from those with a float32 trunk, on the same
machine: the largest difference, and the root mean square of the differences over that of the
output. Parameters, norms, softmax, time embedding and head stay float32. "6 steps" is the final
picture, in [-1, 1], of ancestral sampling with guidance 3 on the same random weights, which a
trained network does not amplify so; `emoji64` is the trained model's, after 25 steps.

| output | trunk | largest difference | relative rms |
|---|---|---:|---:|
"""
NETWORKS = ("base", "superres", "inpaint", "superres_inpaint")


@dataclass(frozen=True)
class Options:
    """Runs the parity tests and prints the worst error of each quantity; exits as they do."""

    report: Path | None = None
    """A Markdown file to write the page to."""


def recorded(check, rtol: float):
    """An assertion of `np.testing` that notes what it found; `rtol` is its default."""

    def noting(found, wanted, *args, **options):
        check(found, wanted, *args, **options)
        a, b = (np.asarray(array, np.float64) for array in np.broadcast_arrays(found, wanted))
        allowed = options.get("atol", 0.0) + options.get("rtol", rtol) * np.abs(b)
        worst = np.argmax(used(np.abs(a - b), allowed))
        golden.note(wanted, np.abs(a - b).flat[worst], allowed.flat[worst])

    return noting


def used(error, allowed):
    """The share of its tolerance that a comparison used; where none is allowed, none or all."""
    error, allowed = np.asarray(error), np.asarray(allowed)
    return np.where(allowed > 0, error / np.where(allowed > 0, allowed, 1), error > 0)


def quantity(file: str, key: str) -> str:
    """What arrays are called that differ in schedule, spacing, place or parameter alone.

    (With no "|" left in it, which would end a cell of the table.)
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
    """A row for each quantity of each file."""
    worst: dict[tuple[str, str], Comparison] = {}
    keys: dict[tuple[str, str], set[str]] = {}
    for c in comparisons:
        if c.file and how(f"{c.file} {c.key}") != GIVEN:
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


def how(name: str) -> str | None:
    """How an array that the table does not name is compared; `name` is "file key"."""
    return next((how for pattern, how in OTHERWISE if fnmatch(name, pattern)), None)


def rest(compared: set[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Rows for the arrays that the table does not name, and those of which nothing is known."""
    found: dict[tuple[str, str, str], None] = {}
    unknown = []
    for path in sorted(golden.FOLDER.glob("*.npz")):
        for key in golden.load(path.stem):
            name = f"{path.stem} {key}"
            if (path.stem, key) in compared:
                continue
            if how(name) is None:
                unknown.append(name)
            elif how(name) != GIVEN:
                found[path.stem, quantity(path.stem, key), how(name)] = None
    return [f"| {file} | `{what}` | {said} |" for file, what, said in found], unknown


def machine() -> str:
    """Where and with what the errors were measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    return (
        f"Measured on {os.cpu_count()} {jax.default_backend().upper()} cores "
        f"({platform.machine()}) with {packages},\nPython {platform.python_version()}; float32 "
        'trunk, `jax_default_matmul_precision="highest"`.\n'
    )


def outputs(dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """What networks of the references give with a trunk of that dtype: `(name, output)`."""
    for name in NETWORKS:
        given = dict(golden.load(f"unet_{name}"))
        text = golden.encode(name, given["tokens"], given["mask"], dtype)
        images = {k: given[k] for k in ("low_res", "inpaint_image", "inpaint_mask") if k in given}
        x, t = given["x"], given["t"]
        yield f"`unet_{name}`", golden.forward(name, x, t, text, dtype=dtype, **images)
    x, t, tokens, lengths = test_clip.inputs()
    model = NoisedCLIP(test_clip.config(), jnp.dtype(dtype))
    yield "`clip`, of pictures", test_clip.apply("encode_image", x, t, model=model)
    yield "`clip`, of captions", test_clip.apply("encode_text", tokens, lengths, model=model)
    guidance = [glide.classifier_free(scale=3.0), glide.clip_x0()]
    _, *arguments = test_sampling.base_run("6", glide.SOLVERS["ddpm"], guidance)
    yield "`base`, 6 steps", glide.sample({"main": golden.network("base", dtype)}, *arguments).x
    pictures = glide.load("emoji64", upsampler="none", dtype=dtype)(
        "a red apple", num=4, progress=False
    )
    yield "`emoji64`", pictures.images / 127.5 - 1


def precision() -> list[str]:
    """A row for each output and each dtype of sixteen bits."""
    exact = dict(outputs("float32"))
    rows = []
    for dtype in ("float16", "bfloat16"):
        for name, found in outputs(dtype):
            off = np.asarray(found) - np.asarray(exact[name])
            rms = np.sqrt((off**2).mean() / (np.asarray(exact[name]) ** 2).mean())
            rows.append(f"| {name} | {dtype} | {np.abs(off).max():.1e} | {rms:.1e} |")
    return sorted(rows)


def main() -> int:
    """The command line; the exit code is that of the tests, and 1 for a forgotten array."""
    options = tyro.cli(Options, prog="python -m tests.tools.parity")
    folder = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        for name, rtol in (("assert_allclose", 1e-7), ("assert_array_equal", 0.0)):
            patch.setattr(np.testing, name, recorded(getattr(np.testing, name), rtol))
        arguments = ["-q", "-p", "no:cacheprovider", *(str(folder / name) for name in TESTS)]
        code = int(pytest.main(arguments))
    rows = table(golden.COMPARISONS)
    others, unknown = rest({(c.file, c.key) for c in golden.COMPARISONS})
    jax.config.update("jax_default_matmul_precision", "highest")
    parts = [HEAD + machine() + TABLE, *rows, REST, *others, PRECISION, *precision()]
    page = "\n".join(part.rstrip("\n") for part in parts) + "\n"
    print("\n".join(rows))
    for name in unknown:
        print(f"compared nowhere: {name}")
    if options.report is not None:
        options.report.write_text(page)
    return code or int(bool(unknown))


if __name__ == "__main__":
    raise SystemExit(main())
