"""The noised CLIP, which scores how well a noised image and a caption agree  (GLIDE, sec. 4.4).

It has an image encoder `f(x_t, t)`, trained on noised images, and a text encoder `g(c)`. The
gradient of `f(x_t, t) . g(c)` with respect to `x_t` guides a diffusion model (GLIDE, 2112.10741,
sec. 2.4). Both are transformers; a norm and a projection follow at one position (CLIP, 2103.00020,
sec. 2.4).
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glide_jax.models.attention import attend
from glide_jax.models.layers import CONV_INIT, Conv, Dense, layer_norm
from glide_jax.models.presets import CLIPConfig

# Mean and standard deviation of red, green and blue in CLIP's training images, on 0..255.
PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)
# The limit of a learned scale (CLIP, sec. 2.5). OpenAI's noised CLIP has it as its constant scale.
MAX_LOGIT_SCALE = 100.0


class Features(NamedTuple):
    """The output of an encoder.

    Attributes:
        raw: `(B, embed_width)` float32, the embedding before it is normalised.
        probe: `(B, width)` float32, the input of the final norm: features for linear probes.
    """

    raw: jax.Array
    probe: jax.Array


def normalise(raw: jax.Array) -> jax.Array:
    """`z / (|z| + 1e-12)` over the last axis; the constant is that of the original code."""
    return raw / (jnp.linalg.norm(raw, axis=-1, keepdims=True) + 1e-12)


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return rows of a table. An index outside it gives NaN; jax would take the nearest row."""
    rows = jnp.asarray(table).at[index]  # Parameters may be numpy arrays, which have no `at`.
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def linear(features: int, std: float, dtype: jnp.dtype, name: str, use_bias: bool = True) -> Dense:
    """Return a linear layer whose weights start normal with standard deviation `std`."""
    init = nn.initializers.normal(std)
    return Dense(features, dtype=dtype, kernel_init=init, use_bias=use_bias, name=name)


def _check(name: str, array: jax.Array, shape: tuple[int, ...], kind: Any, note: str) -> None:
    """Raise ValueError unless `array` is `(B, *shape)` and its dtype is of that kind."""
    array = jnp.asarray(array)
    if array.shape[1:] != shape or array.ndim != 1 + len(shape):
        wanted = ", ".join(["B", *map(str, shape)]) + ("" if shape else ",")
        raise ValueError(f"{name} must be ({wanted}), not {array.shape}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} must be {note}, not {array.dtype}")


class Block(nn.Module):
    """`x += attention(norm x); x += mlp(norm x)`.

    Keys have no bias: it would cancel in the softmax. The original code leaves its parameters
    uninitialised. The standard deviations here are those of the code of openai/CLIP, where both
    projections start smaller in a deeper network.
    """

    heads: int
    layers: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map `x (B, L, W)` to `(B, L, W)`; `mask` is boolean, `(L, L)` as (query, key)."""
        width = x.shape[-1]
        std, std_out = width**-0.5, (2 * self.layers * width) ** -0.5

        def heads(name: str, use_bias: bool = True) -> jax.Array:
            y = linear(width, std, self.dtype, name, use_bias)(h)
            return y.reshape(*y.shape[:2], self.heads, -1)

        h = layer_norm("norm_1")(x).astype(self.dtype)
        h = attend(heads("query"), heads("key", use_bias=False), heads("value"), mask)
        x = x + linear(width, std_out, self.dtype, "proj")(h)
        h = layer_norm("norm_2")(x).astype(self.dtype)
        # The exact (erf) form, as in OpenAI's noised CLIP; openai/CLIP has an approximation.
        h = linear(4 * width, (2 * width) ** -0.5, self.dtype, "fc_1")(h)
        return x + linear(width, std_out, self.dtype, "fc_2")(nn.gelu(h, approximate=False))


def read_out(x: jax.Array, embed_width: int) -> Features:
    """Return the features of one position `(B, W)`, in float32.

    Its layers become part of the module that calls it.
    """
    probe = x.astype(jnp.float32)
    h = layer_norm("norm_out")(probe)
    head = linear(embed_width, x.shape[-1] ** -0.5, jnp.float32, "head", use_bias=False)
    return Features(head(h), probe)


class ImageEncoder(nn.Module):
    """`f(x_t, t)`: a vision transformer with a class token for each timestep.

    Attributes:
        config: sizes; with `n_timestep=0` there is one class token, and no timestep.
        dtype: dtype of the blocks and of the patch projection; all else is float32.
        remat: see `NoisedCLIP`.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array | None = None) -> Features:
        """Return the features of noised images.

        Args:
            x: `(B, S, S, 3)` float32 with S the config's `image_size`. Clean images lie in
                [-1, 1]; noised ones exceed it, and are not clipped.
            t: `(B,)` integer timesteps of the training schedule, also when a respaced schedule is
                sampled. None if and only if `n_timestep` is 0. A timestep outside the table: NaN.

        Raises:
            ValueError: wrong shapes or dtypes, a missing `t`, or a `t` that the config excludes.
        """
        c, width = self.config, self.config.image_width
        _check("x", x, (c.image_size, c.image_size, 3), jnp.floating, "float, in [-1, 1]")
        if (t is None) == bool(c.n_timestep):
            raise ValueError(f"this CLIP {'needs' if t is None else 'takes no'} timesteps t")
        table = nn.initializers.normal(width**-0.5)

        # In float32: the 8 significant bits of bfloat16 are too few for a noised image on 0..255.
        pixels = (x.astype(jnp.float32) + 1) * 127.5
        pixels = (pixels - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
        h = Conv(
            width,
            (c.patch_size, c.patch_size),
            strides=(c.patch_size, c.patch_size),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=CONV_INIT,
            name="patch",
        )(pixels)
        h = h.reshape(len(x), -1, width).astype(jnp.float32)

        if t is not None:
            _check("t", t, (), jnp.integer, "integer (round it: each timestep has a row)")
            first_token = self.param("timestep_embedding", table, (c.n_timestep, width))
            first_token = look_up(first_token, t)
        else:
            first_token = self.param("class_embedding", table, (width,))
            first_token = jnp.broadcast_to(first_token, (len(x), width))
        h = jnp.concatenate([first_token[:, None], h], axis=1)
        h = h + self.param("position_embedding", table, (h.shape[1], width))
        h = layer_norm("norm_in")(h).astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.image_layers):
            h = block(c.image_heads, c.image_layers, self.dtype, name=f"block_{i}")(h)
        return read_out(h[:, 0], c.embed_width)


class TextEncoder(nn.Module):
    """`g(c)`: a causal transformer, read at the end token. Padding cannot change the result.

    Attributes:
        config: sizes.
        dtype: dtype of the blocks; all else is float32.
        remat: see `NoisedCLIP`.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> Features:
        """Return the features of captions.

        Args:
            tokens: `(B, max_text_len)` integer, from `glide_jax.models.tokenizers.CLIPTokenizer`. A
                token outside the table gives NaN.
            lengths: `(B,)` integer, start and end token included. A length outside
                [1, max_text_len] gives NaN.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        c, width = self.config, self.config.text_width
        _check("tokens", tokens, (c.max_text_len,), jnp.integer, "integer")
        _check("lengths", lengths, (), jnp.integer, "integer")
        embedding = self.param("token_embedding", nn.initializers.normal(0.02), (c.n_vocab, width))
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.01), (c.max_text_len, width)
        )
        h = (look_up(embedding, tokens) + positions).astype(self.dtype)
        causal = jnp.tril(jnp.ones((c.max_text_len, c.max_text_len), bool))
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.text_layers):
            h = block(c.text_heads, c.text_layers, self.dtype, name=f"block_{i}")(h, causal)
        return read_out(jax.vmap(look_up)(h, lengths - 1), c.embed_width)


class NoisedCLIP(nn.Module):
    """Both encoders and the scale of their similarity  (GLIDE, sec. 4.4; CLIP, sec. 2.3).

    For guidance, call `encode_text` once per prompt and take the gradient of `similarity` with
    respect to `x` at each step. For training, see `contrastive_loss`.

    Attributes:
        config: sizes; see `glide_jax.models.presets`.
        dtype: dtype of the trunks; parameters, norms, softmax, tables, projections to the
            embedding and the embeddings stay float32.
        remat: activation checkpointing in training: less memory, more time.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.image = ImageEncoder(c, self.dtype, self.remat)
        self.text = TextEncoder(c, self.dtype, self.remat)
        if c.learn_logit_scale:
            start = nn.initializers.constant(math.log(c.logit_scale))
            self.log_scale = self.param("log_scale", start, ())

    def image_features(self, x: jax.Array, t: jax.Array | None = None) -> Features:
        """Return raw embeddings and probe features of noised images; see `ImageEncoder`."""
        return self.image(x, t)

    def text_features(self, tokens: jax.Array, lengths: jax.Array) -> Features:
        """Return raw embeddings and probe features of captions; see `TextEncoder`."""
        return self.text(tokens, lengths)

    def encode_image(self, x: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """Return the embeddings of noised images: `(B, embed_width)` float32, of length 1.

        Args:
            x: `(B, S, S, 3)` float32; see `ImageEncoder`.
            t: `(B,)` integer, or None.

        Raises:
            ValueError: see `ImageEncoder`.
        """
        return normalise(self.image(x, t).raw)

    def encode_text(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Return the embeddings of captions: `(B, embed_width)` float32, of length 1.

        Args:
            tokens: `(B, max_text_len)` integer.
            lengths: `(B,)` integer.

        Raises:
            ValueError: see `TextEncoder`.
        """
        return normalise(self.text(tokens, lengths).raw)

    def scale(self) -> jax.Array:
        """Return the factor from cosine to logit, a float32 scalar; a learned one is at most 100.

        A learned scale keeps its gradient at the limit; without it, it could never decrease again.
        """
        if not self.config.learn_logit_scale:
            return jnp.float32(self.config.logit_scale)
        limit = jnp.minimum(self.log_scale, math.log(MAX_LOGIT_SCALE))
        return jnp.exp(self.log_scale + jax.lax.stop_gradient(limit - self.log_scale))

    def similarity(self, x: jax.Array, t: jax.Array | None, text: jax.Array) -> jax.Array:
        """`k f(x_t, t) . g(c)` of each image and its caption, k the logit scale  (GLIDE, sec. 2.4).

        Args:
            x: `(B, S, S, 3)` float32.
            t: `(B,)`, rounded to the nearest row of the table: a sampler may visit fractional
                timesteps.
            text: `(B, embed_width)` from `encode_text`.

        Returns:
            `(B,)` float32.
        """
        if not self.config.n_timestep:
            t = None
        elif t is not None:
            t = jnp.round(t).astype(jnp.int32)
        return self.scale() * jnp.sum(self.encode_image(x, t) * text, axis=-1)

    def __call__(
        self, x: jax.Array, t: jax.Array | None, tokens: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        """Return the logits `k f(x_t, t) . g(c)` of every image with every caption.

        Args:
            x, t: B noised images and their timesteps.
            tokens, lengths: N captions.

        Returns:
            `(B, N)` float32. In training N = B, and entry i of row i and of column i is the correct
            one (CLIP, fig. 3).
        """
        return self.scale() * self.encode_image(x, t) @ self.encode_text(tokens, lengths).T


def init_params(model: NoisedCLIP, key: jax.Array) -> dict[str, Any]:
    """Return newly initialised parameters: nested dictionaries of float32 arrays."""
    c = model.config
    x = jnp.zeros((1, c.image_size, c.image_size, 3))
    t = jnp.zeros((1,), jnp.int32) if c.n_timestep else None
    tokens, lengths = jnp.zeros((1, c.max_text_len), jnp.int32), jnp.ones((1,), jnp.int32)
    return dict(model.init(key, x, t, tokens, lengths)["params"])
