"""The dry run: hardware by name, the compiler's output, and the report."""

import importlib.util
import math
import subprocess
import sys
import time
from dataclasses import replace

import jax
import pytest

from benchmarks.dry_run_table import HEAD, SLICES, row, table
from glide_jax.devices import mesh
from glide_jax.devices.hardware import DEVICES, FAMILIES, GIB, parse_slice, peak_flops
from glide_jax.devices.mesh import device_mesh
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import clip64
from glide_jax.training import dry_run as dry
from glide_jax.training import dry_run_report as report
from glide_jax.training.config import CLIPTrainConfig
from glide_jax.training.flops import cost_of_update
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.training.objectives import make_objective
from glide_jax.training.recipes import load_recipe
from glide_jax.training.state import abstract_state
from tests.support.commands import RECIPE, ROOT, environment, one_line, run

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install '.[tpu]'"
)


def needs(**changes: float) -> report.Needs:
    """Return needs of 8 images a device: 2 GiB state, 1 gradients, 0.5 an image, no program."""
    values = {
        "parameters": 1000,
        "devices": 16,
        "microbatch": 8,
        "state": 2 * GIB,
        "gradients": GIB,
        "temporaries": 5 * GIB,
        "program": 0,
        "model_flops": 16 * 0.4 * 197e12 * 3.0,
        "flops": 197e12 * 2.0,
        "moved": 819e9 * 1.5,
        "network": 200e9 * 0.5,
        "between": 0.0,
        "seconds": 61.0,
    }
    return report.Needs(**values | changes)


def recipe(**changes):
    return replace(load_recipe(RECIPE), **{"batch_size": 128} | changes)


def size(leaf: jax.ShapeDtypeStruct) -> int:
    """Return its bytes."""
    return leaf.size * leaf.dtype.itemsize


# --- hardware


def test_every_slice_has_known_devices():
    for name, family in FAMILIES.items():
        for shape in family.shapes:
            chips = parse_slice(f"{name}:{shape}")
            assert chips.count == math.prod(map(int, shape.split("x")))
            assert chips.device is DEVICES[family.kind]
            assert chips.device.network > 0


@pytest.mark.parametrize("name, chips", [("v5p:4x4x8", 128), ("v4:8x8x12", 768)])
def test_larger_slices_are_made_of_cubes(name, chips):
    assert parse_slice(name).count == chips


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5:4x4", "did you mean 'v5"),
        ("gpu", "choose for example cpu, v5e:4x4"),
        ("v5e", "choose one of 1x1"),
        ("v5e:3x3", "8x16, 16x16"),
        ("v5e:32x32", "v5e has no slice '32x32'"),
        ("v5p:16x16", "multiples of 4 up to 6144 chips"),
        ("v5p:0x4x4", "v5p has no slice"),
        ("v5p:2x4x8", "v5p has no slice"),
        ("v5p:16x20x20", "v5p has no slice"),
        ("0xv5e:4x4", "unknown hardware '0xv5e:4x4'"),
        ("2xv5e:3x3", "v5e has no slice '3x3'"),
    ],
)
def test_an_unknown_slice_is_one_line_with_the_known_ones(name, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as error:
        parse_slice(name)
    assert "\n" not in str(error.value)


def test_peaks_are_found_by_the_device_kinds_of_jax():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v3") == 61.5e12  # a core, of which a chip has two
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


# --- the compiler's output


@pytest.mark.parametrize(
    "message, size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (167.71G) exceeds available HBM (15.75G).",
            167.71 * GIB,
        ),
        ("... for HLO temporaries (1.16T) exceeds available HBM (95.74G).", 1.16 * 1024 * GIB),
        ("Ran out of memory in memory space hbm. Used 900.5M of 800M hbm. Ex", 900.5 * GIB / 1024),
    ],
)
def test_the_size_of_a_step_that_does_not_fit_is_read_from_the_error(message, size):
    assert dry.reported_temporaries(message) == pytest.approx(size)


def test_another_failure_of_the_compiler_is_passed_on():
    with pytest.raises(GlideError, match="the compiler failed: INTERNAL: no such opcode"):
        dry.reported_temporaries("INTERNAL: no such opcode\nmore")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GlideError, match=r"pip install '\.\[tpu\]'"):
        dry.dry_run(recipe(), "v5e:4x4")


# --- the report


def test_the_largest_microbatch_is_exact_where_memory_grows_linearly():
    # 2 + 1 + 0.5 n GiB
    assert report.largest_microbatch(needs(), 15.75 * GIB) == 25
    assert report.largest_microbatch(needs(microbatch=40, temporaries=21 * GIB), 15.75 * GIB) == 25
    assert report.largest_microbatch(needs(state=20 * GIB), 15.75 * GIB) == 0


def test_compute_memory_and_network_each_bound_the_time_of_a_step():
    seconds = report.step_seconds(needs(), parse_slice("v5e:4x4").device)
    assert seconds == pytest.approx({"compute": 2.0, "memory": 1.5, "network": 0.5})


def test_the_estimated_time_is_never_below_the_bound():
    device = parse_slice("v5e:4x4").device
    assert report.estimated_seconds(needs(), device) == pytest.approx(3.0)
    assert report.estimated_seconds(needs(moved=819e9 * 9), device) == pytest.approx(9.0)


def test_a_step_that_does_not_fit_names_its_needs_and_what_helps():
    chips = parse_slice("v5e:4x4")
    text = report.shortage(recipe(), needs(temporaries=21 * GIB), chips)
    assert "needs 23.00 of 15.75 GiB a device (state 2.00, temporaries 21.00)" in text
    assert "--remat" in text and "--parallelism fsdp" in text
    # 2.5 GiB an image: 5 of 8 fit, and so do 4.
    assert "--accumulate 2" in text
    sharded = recipe(remat=True, parallelism="fsdp")
    text = report.shortage(sharded, needs(temporaries=21 * GIB), chips)
    assert "--remat" not in text and "--parallelism" not in text and "a larger slice" in text


def test_the_advised_number_of_microbatches_divides_the_batch():
    config = replace(recipe(), batch_size=16 * 12)
    large = needs(microbatch=12, temporaries=25 * GIB)  # 2 GiB an image: 6 fit
    assert report.largest_microbatch(large, 15.75 * GIB) == 6
    assert "--accumulate 2" in report.shortage(config, large, parse_slice("v5e:4x4"))
    large = needs(microbatch=12, temporaries=37 * GIB)  # 3 GiB an image: 4 fit
    assert "--accumulate 3" in report.shortage(config, large, parse_slice("v5e:4x4"))


def test_the_advice_for_a_clip_is_a_smaller_batch_since_it_compares_the_whole_one():
    config = CLIPTrainConfig(name="clip", model=clip64(), batch_size=128)
    text = report.shortage(config, needs(temporaries=21 * GIB), parse_slice("v5e:4x4"))
    assert "--batch-size 80" in text and "--accumulate" not in text


def test_the_advice_for_a_large_state_is_smaller_moments():
    text = report.shortage(recipe(), needs(state=30 * GIB), parse_slice("v5e:4x4"))
    assert "--optimiser.first-moment-dtype bfloat16" in text and "--accumulate" not in text


def test_a_report_of_a_slice_has_the_figures():
    text = report.report(recipe(steps=86_400), needs(), parse_slice("v5e:4x4"))
    assert "2.00 + temporaries 5.00 + program 0.00 = 7.00 of 15.75 GiB" in text
    assert "about 25 a device" in text and "--batch-size 400" in text
    assert "at least 2 s" in text and "64 images a second" in text
    assert "3 s" in text and "3.0 days" in text
    assert "1:01" in text
    assert "between copies" not in text


def test_a_report_of_copies_on_several_slices_has_what_passes_between_them():
    chips = parse_slice("2xv5e:4x4")
    assert (chips.count, chips.slices, chips.topology) == (32, 2, "v5e:4x4")
    text = report.report(recipe(parallelism="hybrid"), needs(between=3e6), chips)
    assert "2xv5e:4x4, 32 chips" in text
    assert "between copies   3 MB into a device in a step" in text
    text = report.shortage(recipe(parallelism="hybrid"), needs(temporaries=21 * GIB), chips)
    assert "--parallelism fsdp" in text and "a larger slice" in text


# --- compiling


def test_compiling_for_the_cpu_gives_memory_and_flops(capfd):
    config = recipe(batch_size=8)
    found = dry.measure(config, None)
    state = abstract_state(config, make_objective(config))
    assert found.state == sum(size(leaf) for leaf in jax.tree.leaves(state))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.microbatch == 8 and found.devices == jax.device_count("cpu") == 1
    assert found.network == 0
    # XLA's count of the compiled step is near the model FLOPs.
    assert found.flops == pytest.approx(found.model_flops, rel=0.3)
    assert 0 < found.temporaries < GIB
    text = report.report(config, found, None)
    assert "589,638 parameters" in text and "this machine's CPU" in text


def test_a_batch_that_does_not_divide_is_refused_with_the_next_that_does():
    assert dry.images_per_device(recipe(accumulate=2), 16) == 4
    with pytest.raises(UsageError, match="128 does not divide over 24 devices: .* 144"):
        dry.images_per_device(recipe(), 24)
    with pytest.raises(UsageError, match="128 in 4 microbatches does not divide over .* 192"):
        dry.images_per_device(recipe(accumulate=4), 24)


def test_sharding_over_devices_divides_the_state():
    """Runs the command line in a process with four devices."""
    result = subprocess.run(
        [sys.executable, "train.py", "--config", RECIPE, "--dry-run", "cpu",
         "--parallelism", "fsdp"],
        cwd=ROOT, env=environment(devices=4), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "fsdp over 4 devices" in result.stdout
    config = recipe()
    leaves = jax.tree.leaves(abstract_state(config, make_objective(config)))
    share = sum(size(leaf) / (4 if mesh.shard_spec(leaf.shape, 4) else 1) for leaf in leaves)
    reported = float(result.stdout.split("state ")[1].split(" +")[0])
    assert reported == pytest.approx(share / GIB, rel=0.02)


def test_an_unknown_slice_ends_the_command_with_one_line():
    error = one_line(run("train.py", "--config", RECIPE, "--dry-run", "v9:2x2"), 2)
    assert "unknown hardware 'v9:2x2'" in error


def test_the_clock_prints_lines_if_stderr_is_not_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(dry, "PERIODS", {False: 0.01, True: 1.0})
    with dry.show_elapsed("compiling"):
        time.sleep(0.1)
    assert "compiling: 0:00\n" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["pmap", "fsdp"])
def test_compiling_for_a_tpu_slice_reports_needs(parallelism):
    text = dry.dry_run(replace(load_recipe(RECIPE), parallelism=parallelism), "v5e:2x2")
    assert "v5e:2x2, 4 chips" in text and "of 15.75 GiB" in text
    assert f"{parallelism} over 4 devices" in text


@needs_libtpu
@pytest.mark.slow
def test_a_copy_of_the_state_stays_within_a_tpu_slice():
    config = replace(load_recipe(RECIPE), parallelism="hybrid")
    text = dry.dry_run(config, "2xv5e:2x2")
    assert "2xv5e:2x2, 8 chips" in text and "hybrid over 8 devices" in text
    assert "between copies" in text
    devices = dry.slice_devices(parse_slice("2xv5e:2x2"))
    found = dry.training_mesh(config, devices)
    assert dict(found.shape) == {"copies": 2, "batch": 4}
    assert [{d.slice_index for d in row} for row in found.devices] == [{0}, {1}]


# --- the table of the documentation


def test_a_compilation_that_did_not_finish_is_a_row_of_the_table():
    chips = parse_slice(SLICES[0])
    line = row("text64:paper", chips, {})
    assert len(line) == len(HEAD) and "did not finish" in line
    assert "not compiled yet" in row("text64:paper", chips, None)
    text = table(chips, [line])
    assert all(part.count("|") == len(HEAD) + 1 for part in text.splitlines()[2:])


def test_a_step_that_does_not_fit_is_marked_in_the_table():
    found = vars(needs(temporaries=21 * GIB, flops=math.nan, moved=math.nan))
    found = found | {"processor_seconds": 90, "compiler_memory": 3 * GIB}
    line = row("text64", parse_slice("v5e:4x4"), found)
    assert len(line) == len(HEAD) and any("23.00: does not fit" in part for part in line)
    assert "nan" not in " ".join(line)


def test_the_update_counts_once_however_many_microbatches():
    """Twice the microbatches of half the size move the weights twice, the optimiser once."""
    config = recipe(batch_size=8)
    whole, parts = (dry.measure(replace(config, accumulate=n), None) for n in (1, 8))
    state = dry.parallel_step(config, device_mesh(jax.devices("cpu")[:1]))[1][0]
    once = cost_of_update(config, state, None)
    # The update reads and writes parameters, EMA and two moments, and reads the gradient.
    assert once["bytes accessed"] > 1.5 * whole.state
    assert parts.flops == pytest.approx(whole.flops, rel=0.1)
    repeated = 8 * once["bytes accessed"]
    assert parts.moved - whole.moved < 0.9 * repeated


def test_frozen_parameters_have_no_gradients():
    config = recipe(batch_size=8)
    frozen = replace(config, optimiser=replace(config.optimiser, freeze=("text",)))
    held = dry.measure(frozen, None)
    assert held.parameters == sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    unet = abstract_params(config)["unet"]
    assert held.gradients == 4 * sum(x.size for x in jax.tree.leaves(unet))


def test_lora_counts_its_base_in_the_dtype_of_the_trunk(capsys):
    config = recipe(batch_size=8)
    whole = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    lora = replace(config, lora=LoRAConfig(rank=2), dtype="bfloat16")
    pairs = sum(x.size for x in jax.tree.leaves(abstract_params(lora)))
    held = dry.measure(lora, None)
    assert (held.parameters, held.trained) == (whole + pairs, pairs)
    assert held.gradients == 4 * pairs
    # The embedding of tokens, two thirds of this network, stays in float32.
    base = held.state - 4 * 4 * pairs
    assert 2 * whole < base < 4 * whole
    assert f"{whole + pairs:,} parameters, {pairs:,} of them trained" in report.report(
        lora, held, None
    )
    assert "of them trained" not in report.report(config, held, None)


def abstract_params(config):
    return abstract_state(config, make_objective(config)).params
