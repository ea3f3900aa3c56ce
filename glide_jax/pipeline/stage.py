"""A model ready to run: its network on the devices, its tokenizer and its noise schedule."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from glide_jax.devices.mesh import pin_batch
from glide_jax.devices.placement import Placement
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.diffusion.guidance import Network
from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.models import cpu_products, winograd
from glide_jax.models.joined_projections import JOINED, join_projections
from glide_jax.models.precision import cast_trunk
from glide_jax.models.text import TextFeatures
from glide_jax.models.tokenizers import GPT2Tokenizer
from glide_jax.models.unet import GLIDE
from glide_jax.weights.registry import Model


@dataclass(frozen=True)
class GLIDEFunction:
    """`Network.fn` of a GLIDE model: the conditioning is a dictionary of its keyword arguments.

    Attributes:
        module: the network without its weights.
        mesh: the devices over which batches are split; None: unknown.
        is_sharded: whether they hold the weights in parts; otherwise each holds them whole.
    """

    module: GLIDE
    mesh: AbstractMesh | None = None
    is_sharded: bool = False

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.module.config.out_channels

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, cond: Mapping) -> jax.Array:
        on_mesh = pin_batch if self.is_sharded else jax.sharding.use_abstract_mesh
        with nullcontext() if self.mesh is None else on_mesh(self.mesh):
            output: Any = self.module.apply({"params": params}, x, t, **cond)
        return output


@partial(jax.jit, static_argnums=0)
def encode_text(
    model: GLIDE, params: Any, tokens: jax.Array, caption_mask: jax.Array
) -> TextFeatures:
    """Return the text features of captions: `tokens (B, L)` int32, `caption_mask (B, L)` bool."""
    features: Any = model.apply({"params": params}, tokens, caption_mask, method=GLIDE.encode_text)
    return features


@dataclass(frozen=True, eq=False)
class Stage:
    """A model ready to run, such as the base or the upsampler of a cascade.

    A `Pipeline` is a stage with sampling settings and, if it has one, an upsampler.

    Attributes:
        model: sizes and weights.
        dtype: dtype of the trunk: "float32", "bfloat16", "float16" or "auto" (by device, or by the
            variable GLIDE_JAX_DTYPE; see `trunk_dtype`).
        devices: number of this process's devices that share a batch, or "all".
    """

    model: Model
    dtype: str = "auto"
    devices: int | str = 1

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        return make_schedule(self.model.noise_schedule, self.model.diffusion_steps)

    @cached_property
    def network(self) -> Network:
        """The network and its weights, on the devices; those of the trunk in its dtype."""
        module = GLIDE(self.model.config, trunk_dtype(self.dtype))
        placement, params = Placement(self.devices), cast_trunk(self.model.params, module.dtype)
        is_sharded = placement.is_sharded(params)
        if not is_sharded:
            # On a TPU the keys and values of all blocks would be copied out of the joined result.
            layers = ("emb",) if placement.platform == "tpu" else tuple(JOINED)
            params = join_projections(params, layers)
        if placement.platform == "cpu" and not is_sharded:
            if module.dtype == jnp.float32:
                params = winograd.transform_kernels(params, self.model.config)
            # Other layers of bfloat16 need no arrangement.
            elif module.dtype == jnp.bfloat16 and placement.mesh.size == 1:
                params = cpu_products.arrange_kernels(params)
        params = placement.put_weights(params)
        params = params if is_sharded else placement.lay_out_kernels(params)
        denoiser = GLIDEFunction(module, placement.mesh.abstract_mesh, is_sharded)
        return Network(denoiser, params, self.model.prediction_type)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer:
        """The tokenizer of captions."""
        return GPT2Tokenizer(self.model.config.text_ctx)

    def encode_captions(self, captions: Sequence[str]) -> TextFeatures:
        """Return the text features of captions, on the host; those of "" are unconditional.

        One caption at a time: the same compiled program then serves every number of captions.
        """
        tokens, network = self.tokenizer(list(captions)), self.network
        features = [
            encode_text(network.fn.module, network.params, ids[None], mask[None])
            for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
        ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *features)
