"""The noised CLIP's parameter tree <-> two flat dictionaries under the released names.

One table of names serves both encoders, both directions and every size.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.models.presets import CLIPConfig
from glide_jax.weights.released import assemble, differences
from glide_jax.weights.store import flatten

# Ours -> theirs, within an encoder; then within one of its blocks.
_INPUT = {
    "patch/kernel": "patch_proj",
    "timestep_embedding": "w_t",
    "class_embedding": "pred_state",
    "token_embedding": "w_voc",
    "position_embedding": "w_pos",
}
_ENDS = {"norm_in": "input.ln", "norm_out": "output.ln", "head": "output.f"}
_BLOCK = {
    "norm_1": "f_attn.ln",
    "query": "f_attn.f_q",
    "key": "f_attn.f_k",
    "value": "f_attn.f_v",
    "proj": "f_attn.f_c",
    "norm_2": "f_mlp.ln",
    "fc_1": "f_mlp.f_1",
    "fc_2": "f_mlp.f_2",
}
_NORM_LEAVES = {"scale": "g", "bias": "b"}
_LINEAR_LEAVES = {"kernel": "w", "bias": "b"}


def clip_released_name(path: str) -> str:
    """The released name of an encoder's parameter, e.g. `block_3/query/kernel` ->
    `blocks.block_3.f_attn.f_q.w`.

    Args:
        path: keys of the encoder's tree, joined by "/".
    """
    if path in _INPUT:
        return f"blocks.input.{_INPUT[path]}"
    module, leaf = path.rsplit("/", 1)
    if m := re.fullmatch(r"(block_\d+)/(.+)", module):
        name = f"{m[1]}.{_BLOCK[m[2]]}"
    else:
        name = _ENDS[module]
    return f"blocks.{name}.{(_NORM_LEAVES if name.endswith('.ln') else _LINEAR_LEAVES)[leaf]}"


def _to_ours(array: np.ndarray, kernel: bool) -> np.ndarray:
    """Patch projections OIHW -> HWIO, linear layers (out, in) -> (in, out)."""
    if not kernel:
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_theirs(array: np.ndarray, kernel: bool) -> np.ndarray:
    if not kernel:
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def clip_abstract_params(config: CLIPConfig) -> dict[str, Any]:
    """The parameter tree of a noised CLIP as `jax.ShapeDtypeStruct`s: no memory is used."""
    return jax.eval_shape(partial(init_params, NoisedCLIP(config)), jax.random.key(0))


def clip_misfits(flat: Mapping[str, np.ndarray], config: CLIPConfig) -> list[str]:
    """Paths of parameters that a noised CLIP lacks, does not have, or has in another shape."""
    return differences(flat, clip_abstract_params(config))


def clip_from_released(
    config: CLIPConfig,
    image_state_dict: Mapping[str, np.ndarray],
    text_state_dict: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The parameter tree of a noised CLIP from the arrays of its two released files.

    Args:
        image_state_dict, text_state_dict: torch layout, any float dtype; each file's names are
            its own ("blocks.input.w_pos" is in both).

    Returns:
        Nested dictionaries of float32 numpy arrays, as `NoisedCLIP(config).apply` takes them.
        The files hold no scale: where it is learned, it starts at the config's.

    Raises:
        GlideError: parameters are missing, unexpected, or of the wrong shape or dtype; it names
            them.
    """
    abstract, params = clip_abstract_params(config), {}
    shapes = clip_released_shapes(abstract)
    for side, state_dict in (("image", image_state_dict), ("text", text_state_dict)):
        wanted = flatten(abstract[side])
        names = {path: clip_released_name(path) for path in wanted}
        what = f"noised CLIP's {side} encoder"
        params[side] = assemble(wanted, names, shapes[side], state_dict, _to_ours, what)
    if config.learn_logit_scale:
        params["log_scale"] = np.array(math.log(config.logit_scale), np.float32)
    return params


def clip_released_shapes(params: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the released form of both encoders, "image" and "text"; `params` may be
    abstract."""
    return {
        side: {
            # A view of one element has the strides of nothing: no memory for its size.
            clip_released_name(path): _to_theirs(
                np.broadcast_to(np.float32(0), leaf.shape), path.endswith("/kernel")
            ).shape
            for path, leaf in flatten(params[side]).items()
        }
        for side in ("image", "text")
    }


def clip_to_released(
    params: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The opposite of `clip_from_released`: the image encoder's and the text encoder's arrays.

    In torch layout under released names. A learned scale has no name there (the original reads
    it from a configuration file) and is left out.
    """
    image, text = (
        {
            clip_released_name(path): np.ascontiguousarray(
                _to_theirs(np.asarray(array), path.endswith("/kernel"))
            )
            for path, array in flatten(params[side]).items()
        }
        for side in ("image", "text")
    )
    return image, text
