"""Attention: the plain form against the original code, and the choice of the fused one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from glide_jax.devices.mesh import AXIS, device_mesh
from glide_jax.models import attention, tpu_attention
from glide_jax.models.attention import attend, fused_kernel, split_heads
from glide_jax.models.blocks import AttentionBlock
from glide_jax.models.platform import compile_for, fused_attention_platform
from tests.support.golden import assert_close, load, nhwc

CALLS = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


def inputs(dtype, heads: int = 3, width: int = 32, pixels: int = 64, text: int = 8):
    """Return query, key and value of one block."""
    lengths = pixels, pixels + text, pixels + text
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = zip(keys, lengths, strict=True)
    return [jax.random.normal(key, (2, n, heads, width)).astype(dtype) for key, n in arrays]


@pytest.mark.parametrize("with_text", [False, True])
def test_attention(with_text):
    units = load("units")
    heads = int(units["att.heads"])
    query, key, value = split_heads(nhwc(units["att.qkv"]), heads, parts=3)
    if with_text:
        text_key, text_value = split_heads(nhwc(units["att.ekv"]), heads, parts=2)
        key, value = jnp.append(text_key, key, axis=1), jnp.append(text_value, value, axis=1)
    wanted = nhwc(units["att.out_cross" if with_text else "att.out_self"])
    assert_close(attend(query, key, value), wanted, 5e-6)


def test_a_masked_position_is_ignored():
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 5, 3, 8), np.float32)
    mask = np.arange(5) < 3
    found = attend(query, key, value, mask[None, None, None])
    assert_close(found, attend(query, key[:, :3], value[:, :3]), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 5e-2)])
@pytest.mark.parametrize(
    ("limit", "logits", "shape"),
    [
        ("SPLIT_HEADS_LOGITS", 48 * 56, "f32[48,56]"),
        ("SPLIT_IMAGES_LOGITS", 6 * 48 * 56, "f32[1,3,48,56]"),
    ],
)
def test_on_a_cpu_long_attention_is_split_before_jax_0_11(
    monkeypatch, dtype, tolerance, limit, logits, shape
):
    monkeypatch.setattr(attention, "SPLITS_ON_CPU", True)
    arrays = inputs(dtype, pixels=48, text=8)

    def results(function):
        loss = lambda *x: jnp.sum(jnp.sin(function(*x).astype(jnp.float32)))  # noqa: E731
        return jax.jit(function)(*arrays), jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    assert "while" not in str(jax.make_jaxpr(attend)(*arrays))
    wanted = results(attend)
    monkeypatch.setattr(attention, limit, logits)
    jaxpr = str(jax.make_jaxpr(lambda *x: attend(*x))(*arrays))
    assert "scan" in jaxpr and shape in jaxpr
    found = results(lambda *x: attend(*x))
    for ours, plain in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.astype(jnp.float32), plain.astype(jnp.float32), tolerance)


# --- the choice


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        ({"platform": "cpu"}, ""),
        ({"platform": "tpu"}, "tpu"),
        ({"platform": "gpu", "compute_capability": "7.5"}, ""),
        ({"platform": "gpu", "compute_capability": "8.0"}, "cuda"),
        ({"platform": "gpu", "compute_capability": "12.0"}, "cuda"),
        ({"platform": "gpu", "compute_capability": "gfx90a"}, ""),
    ],
)
def test_the_device_decides(monkeypatch, device, wanted):
    monkeypatch.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(**device)])
    assert fused_attention_platform() == wanted
    for platform in ("cpu", "tpu", "cuda"):
        with compile_for(platform):
            assert fused_attention_platform() == ("" if platform == "cpu" else platform)


def test_the_default_device_decides_where_it_is_set(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda **_: [gpu])
    with jax.default_device(jax.devices("cpu")[0]):
        assert not fused_attention_platform()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_the_kernel_takes(dtype):
    query, key, _ = inputs(dtype)
    with compile_for("cuda"):
        assert fused_kernel(query, key, None) == "cudnn"
        assert not fused_kernel(query, key, jnp.ones((64, 72), bool))
        assert not fused_kernel(query.astype(jnp.float32), key.astype(jnp.float32), None)
        assert not fused_kernel(query[..., :12], key[..., :12], None)
        assert not fused_kernel(query[:, :63], key, None)
        assert not fused_kernel(query, key[:, :71], None)
        assert not fused_kernel(query[:, :56], key, None)
        wide = jnp.zeros((1, 64, 1, 256), dtype)
        assert not fused_kernel(wide, wide, None)
    assert not fused_kernel(query, key, None)


# --- the fused form, by jax's own plain form of it


@pytest.fixture
def plain_kernel(monkeypatch):
    """Replace the kernel of cuDNN, which no CPU has, by what jax defines it to be."""
    attention, calls = jax.nn.dot_product_attention, []

    def plain(*arrays, implementation):
        calls.append(implementation)
        wide = (array.astype(jnp.float32) for array in arrays)
        return attention(*wide, implementation="xla").astype(arrays[0].dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    return calls


# Three units in the last place of bfloat16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2.4e-2), (jnp.float16, 2e-3)])
def test_the_fused_form_equals_the_plain_one(plain_kernel, dtype, tolerance):
    arrays = inputs(dtype)
    weights = jax.random.normal(jax.random.key(1), (2, 64, 96))

    @jax.jit
    def run(*arrays):
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(weights.astype(dtype))

    plain = run(*arrays)
    assert plain_kernel == []
    with compile_for("cuda"):
        fused = run(*arrays)
    assert plain_kernel == ["cudnn"]
    for found, wanted in zip(fused, plain, strict=True):
        assert_close(found, wanted, tolerance * float(jnp.abs(wanted).max()))


# --- the program for a GPU, which any host lowers


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """Answer for the library, whose version jax asks; it takes no part in lowering."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def calls_in(function, *arrays) -> list[int]:
    """Return the numbers of forward and backward kernels in a program for a GPU."""
    with compile_for("cuda"):
        program = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return [program.count(call) for call in CALLS]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("with_text", [False, True])
def test_a_block_becomes_the_kernel_of_cudnn(cudnn_is_there, dtype, with_text):
    """Also under differentiation, with and without recomputation, `vmap` and `shard_map`."""
    x = jnp.ones((2, 8, 8, 64), dtype)
    text = jnp.ones((2, 8, 24), dtype) if with_text else None
    block = AttentionBlock(heads=2, dtype=dtype)
    params = jax.eval_shape(block.init, jax.random.key(0), x, text)

    def loss(params, x, text):
        return jnp.square(block.apply(params, x, text).astype(jnp.float32)).sum()

    assert calls_in(block.apply, params, x, text) == [1, 0]
    assert calls_in(jax.grad(loss, (0, 1)), params, x, text) == [1, 1]
    assert calls_in(jax.value_and_grad(jax.checkpoint(loss)), params, x, text) == [2, 1]
    more = jax.tree.map(lambda a: jnp.stack([a] * 3), (x, text))
    assert calls_in(jax.vmap(jax.grad(loss), (None, 0, 0)), params, *more) == [1, 1]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        jax.grad(loss),
        mesh=mesh,
        in_specs=(whole, rows, rows),
        out_specs=whole,
        check_vma=False,
    )
    assert calls_in(mapped, params, x, text) == [1, 1]


# --- the kernel for TPUs, its body as ordinary operations


def tpu_inputs(dtype, heads: int = 4, width: int = 64, batch: int = 2):
    lengths = 256, 384, 384
    keys = jax.random.split(jax.random.key(1), 3)
    return [
        jax.random.normal(key, (batch, n, heads, width), dtype)
        for key, n in zip(keys, lengths, strict=True)
    ]


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs on the CPU."""
    call = tpu_attention.attend
    monkeypatch.setattr(tpu_attention, "attend", lambda *arrays: call(*arrays, interpret=True))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_kernel_for_tpus_computes_attention(width):
    arrays = tpu_inputs(jnp.float32, width=width)
    assert_close(tpu_attention.attend(*arrays, interpret=True), attend(*arrays), 2e-6)


def test_what_the_kernel_for_tpus_takes():
    query, key, _ = tpu_inputs(jnp.bfloat16)
    with compile_for("tpu"):
        assert fused_kernel(query, key, None) == "pallas"
        assert not fused_kernel(query, key, jnp.ones((256, 384), bool))
        assert not fused_kernel(query.astype(jnp.float32), key.astype(jnp.float32), None)
        assert not fused_kernel(query[:, :128], key, None)
        assert not fused_kernel(query, key[:, :300], None)
        assert not fused_kernel(query[:, :, :1], key[:, :, :1], None)
        assert not fused_kernel(query[..., :48], key[..., :48], None)
    assert not fused_kernel(query, key, None)


def test_a_block_and_its_gradient_take_the_kernel_for_tpus(interpreted):
    block = AttentionBlock(2, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 128), jnp.bfloat16)
    text = jax.random.normal(jax.random.key(1), (2, 128, 24), jnp.bfloat16)
    params = block.init(jax.random.key(2), x, text)
    params = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(jax.random.key(3), p.shape), params
    )

    def loss(params, x):
        return jnp.sum(jnp.square(block.apply(params, x, text).astype(jnp.float32)))

    def found():
        # A function of its own: jax would find the other trace.
        return jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1)))(params, x)

    plain = found()
    with compile_for("tpu"):
        assert "pallas_call" in str(jax.make_jaxpr(lambda *a: loss(*a))(params, x))
        fused = found()
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        wide = b.astype(jnp.float32)
        assert_close(a.astype(jnp.float32), wide, 0.05 * float(jnp.abs(wide).max()))


def test_the_kernel_for_tpus_is_split_with_the_batch(interpreted):
    """XLA cannot split a kernel: without the mesh the plain form is used."""
    mesh = device_mesh(jax.devices()[:1])
    wide = jax.sharding.AbstractMesh((4,), (AXIS,), axis_types=mesh.axis_types)
    query, key, value = tpu_inputs(jnp.bfloat16, batch=8)

    def program(mesh):
        with compile_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(lambda *a: attend(*a))(query, key, value))

    assert "shard_map" in program(wide) and "shard_map" not in program(mesh.abstract_mesh)
    assert "pallas_call" in program(wide) and "pallas_call" in program(mesh.abstract_mesh)
    query, key, value = tpu_inputs(jnp.bfloat16, batch=6)
    assert "pallas_call" not in program(wide)
