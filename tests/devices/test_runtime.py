"""What a machine lacks or has in addition: devices, 64 bits, libtpu, GPUs of AMD, a home."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import xla_bridge

from glide_jax.devices import runtime
from glide_jax.devices.runtime import computes_bfloat16, find_devices, in_32_bits, trunk_dtype
from glide_jax.errors import GlideError, UsageError
from tests.support.commands import ROOT, environment, make_weights, one_line, run


@pytest.mark.parametrize(
    ("capability", "bfloat16"),
    [
        ("7.0", False), ("7.5", False), ("8.0", True), ("8.6", True), ("9.0", True), ("12.1", True),
        ("gfx803", False), ("gfx900", False), ("gfx906", False), ("gfx908", True),
        ("gfx90a", True), ("gfx90a:sramecc+:xnack-", True), ("gfx942", True), ("gfx950", True),
        ("gfx1030", False), ("gfx1100", True), ("gfx1201", True), ("", True), ("unknown", True),
    ],
)  # fmt: skip
def test_the_dtype_of_a_gpu_follows_from_its_units(capability, bfloat16, monkeypatch):
    assert computes_bfloat16(capability) is bfloat16
    monkeypatch.delenv("GLIDE_JAX_DTYPE")
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(runtime.jax, "local_devices", lambda: [device])
    assert trunk_dtype() == (jnp.bfloat16 if bfloat16 else jnp.float16)


def test_the_dtype_of_a_cpu_follows_from_its_features(monkeypatch):
    monkeypatch.delenv("GLIDE_JAX_DTYPE")
    device = types.SimpleNamespace(platform="cpu")
    monkeypatch.setattr(runtime.jax, "local_devices", lambda: [device])
    for features, dtype in (({"sse", "amx_bf16"}, jnp.bfloat16), ({"avx512_bf16"}, jnp.float32)):
        monkeypatch.setattr(runtime, "cpu_features", lambda features=features: features)
        assert trunk_dtype() == dtype and trunk_dtype("float16") == jnp.float16
    monkeypatch.setattr(runtime, "cpu_features", lambda: {"amx_bf16"})
    monkeypatch.setattr(runtime.jax, "device_count", lambda: 2)
    assert trunk_dtype() == jnp.float32


def test_a_variable_says_what_the_dtype_auto_means(monkeypatch):
    monkeypatch.setenv("GLIDE_JAX_DTYPE", "float16")
    assert trunk_dtype() == jnp.float16 and trunk_dtype("float32") == jnp.float32
    monkeypatch.setenv("GLIDE_JAX_DTYPE", "")
    assert trunk_dtype("auto", types.SimpleNamespace(platform="tpu")) == jnp.bfloat16
    monkeypatch.setenv("GLIDE_JAX_DTYPE", "half")
    with pytest.raises(UsageError) as caught:
        trunk_dtype()
    assert str(caught.value) == ("GLIDE_JAX_DTYPE=half: choose auto, float32, bfloat16, float16")


def test_virtual_devices_get_twice_as_many_threads(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    find_devices()
    assert os.environ["PJRT_NPROC"] == "16"
    monkeypatch.setenv("PJRT_NPROC", "3")
    find_devices()
    assert os.environ["PJRT_NPROC"] == "3"


@pytest.mark.parametrize("error", [RuntimeError("Unable to\ninitialize. (set JAX_PLATFORMS='')"),
                                   AssertionError()])  # fmt: skip
def test_no_device_is_one_line(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(runtime.jax, "local_devices", fail)
    with pytest.raises(GlideError) as caught:
        find_devices()
    why = " (Unable to initialize)" if error.args else ""
    platforms = jax.config.values["jax_platforms"]
    wanted = f" for JAX_PLATFORMS={platforms}" if platforms else ""
    assert str(caught.value) == (
        f"jax finds no device{wanted}{why}: unset JAX_PLATFORMS, set it to cpu, or install jax for "
        "the device"
    )


def test_libtpu_is_not_started_without_a_tpu(monkeypatch):
    factories = {"cpu": object(), "cuda": object(), "tpu": object()}
    monkeypatch.setattr(xla_bridge, "_backend_factories", factories)
    monkeypatch.setattr(runtime.jax, "local_devices", list)
    monkeypatch.setattr(runtime, "has_tpu", lambda: False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(xla_bridge, "_backends", {"cpu": object()})
    find_devices()
    assert "tpu" in factories  # jax has begun: nothing is changed
    monkeypatch.setattr(xla_bridge, "_backends", {})
    find_devices(dry_run=True)
    assert "tpu" in factories
    find_devices()
    assert set(factories) == {"cpu", "cuda"}


def test_a_tpu_that_the_environment_names_is_started(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert runtime.has_tpu()


def test_functions_and_generators_compute_in_32_bits():
    @in_32_bits
    def plain():
        return jax.random.normal(jax.random.key(0)).dtype

    @in_32_bits
    def generator():
        yield plain()
        yield jax.random.normal(jax.random.key(0)).dtype

    with jax.enable_x64(True):
        assert plain() == np.float32
        for dtype in generator():
            assert dtype == np.float32 and jnp.ones(1).dtype == np.float64


def test_an_image_under_64_bits_is_the_same_and_a_missing_device_one_line(tmp_path, monkeypatch):
    import glide_jax as glide

    weights = make_weights(tmp_path / "tiny")
    pipe = glide.load(weights)
    wanted = pipe("red", steps=2, progress=False).images
    with jax.enable_x64(True):
        assert np.array_equal(glide.load(weights)("red", steps=2, progress=False).images, wanted)
    result = run(
        "-c", "import os; os.environ['JAX_PLATFORMS'] = 'gpux'; import sample; sample.main()",
        "red", "--weights", weights, "--out", tmp_path,
    )  # fmt: skip
    assert one_line(result, 1).startswith("error: jax finds no device for JAX_PLATFORMS=gpux (")


LOADED = """
import jax, jax.numpy as jnp
jnp.ones(3) + 1  # Before it, jax has decided that there is no cache.
import glide_jax as glide
glide.load("emoji64", upsampler="none")
jax.jit(lambda x: x * 3)(jnp.ones(5))
"""


def test_loading_a_pipeline_turns_the_compilation_cache_on(tmp_path):
    mine = tmp_path / "mine"
    for folder, extra in (
        (tmp_path / "home" / "xla", {}),
        (mine, {"JAX_COMPILATION_CACHE_DIR": str(mine)}),
    ):
        variables = environment() | {"GLIDE_JAX_CACHE": str(tmp_path / "home")} | extra
        subprocess.run([sys.executable, "-c", LOADED], env=variables, cwd=ROOT, check=True)
        assert any("lambda" in name for name in os.listdir(folder))
