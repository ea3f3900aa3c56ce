"""Low-rank pairs beside the kernels of a network  (LoRA, 2106.09685): files, and merging.

A kernel `W (in, out)` becomes `W + scale A B`, with `A (in, r)`, `B (r, out)` and the scale
`alpha / r`. A file holds the pairs alone, as "unet/mid_attn/qkv/lora_a" and ".../lora_b".
"""

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.models.layers import LORA_PAIR
from glide_jax.weights.store import flatten, map_arrays, save_arrays, unflatten

# The layers that can have a pair, by kind: where they are, and their names.
KINDS = {
    "attention": ("unet/", ("qkv", "text_kv", "proj")),
    "text": ("text/block_", ("qkv", "proj", "fc_1", "fc_2")),
}
KERNEL = "/kernel"
FORMAT = "glide-jax lora 1"


@dataclass(frozen=True, eq=False)
class LoRA:
    """Trained low-rank pairs.

    Attributes:
        name: the file or the run that they are from.
        pairs: `A (in, r)` and `B (r, out)`, float32, by the path of their layer.
        rank: r.
        alpha: the pairs count by `alpha / rank`.
        base: name of the weights that they were trained beside.
        checksum: `checksum` of these weights; empty: unknown.
    """

    name: str
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    base: str = ""
    checksum: str = ""

    @property
    def scale(self) -> float:
        """Factor of the product of a pair."""
        return self.alpha / self.rank


def adapted_layers(params: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    """Return the paths of the layers that get a pair, in the order of the tree.

    Raises:
        UsageError: the network has no layer of one of the kinds.
    """
    paths = [path.removesuffix(KERNEL) for path in flatten(params) if path.endswith(KERNEL)]
    chosen: dict[str, None] = {}
    for kind in kinds:
        start, names = KINDS[kind]
        of_kind = [p for p in paths if p.startswith(start) and p.rsplit("/", 1)[-1] in names]
        if not of_kind:
            raise UsageError(f"the network has no {kind} layers: change lora.layers")
        chosen |= dict.fromkeys(of_kind)
    return [path for path in paths if path in chosen]


def to_pairs(tree: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the pairs of a tree by the path of their layer.

    Raises:
        ValueError: the tree holds something other than pairs.
    """
    flat = {path: np.asarray(array, np.float32) for path, array in flatten(tree).items()}
    layers = sorted({path.rpartition("/")[0] for path in flat})
    wanted = {f"{layer}/{name}" for layer in layers for name in LORA_PAIR}
    if not layers or set(flat) != wanted:
        raise ValueError(f"{min(set(flat) ^ wanted, default='nothing')} is no part of a pair")
    return {
        layer: (flat[f"{layer}/{LORA_PAIR[0]}"], flat[f"{layer}/{LORA_PAIR[1]}"])
        for layer in layers
    }


def checksum(params: Mapping[str, Any]) -> str:
    """Return a checksum of parameters in float32, whatever file they came from."""
    total = 0
    for path, array in sorted(flatten(params).items()):
        values = np.ascontiguousarray(np.asarray(array, np.float32))
        total = zlib.crc32(values.reshape(-1).view(np.uint8).data, zlib.crc32(path.encode(), total))
    return f"{total:08x}"


# --- merging


def merge(params: Mapping[str, Any], loras: Sequence[tuple[LoRA, float]]) -> dict[str, Any]:
    """Return parameters with kernels `W + sum_i weight_i alpha_i / r_i A_i B_i`, float32.

    The sum is in float64. A kernel without a pair of a weight other than 0 stays the same array.

    Args:
        params: of the network; they are not changed.
        loras: pairs, each with a weight, which may be negative.

    Raises:
        UsageError: a weight is not finite.
        GlideError: pairs do not fit the network.
    """
    flat = flatten(params)
    sums: dict[str, np.ndarray] = {}
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {lora.name} must be finite, not {weight}")
        for layer, (a, b) in lora.pairs.items():
            kernel = flat.get(layer + KERNEL)
            shape = None if kernel is None else np.shape(kernel)
            if shape != (a.shape[0], b.shape[1]):
                reason = "has no such layer" if shape is None else f"has a kernel of {shape}"
                raise GlideError(
                    f"{lora.name} does not fit these weights: its pair of {layer} is for a kernel "
                    f"of {(a.shape[0], b.shape[1])}, the network {reason}"
                )
            if weight:
                product = a.astype(np.float64) @ b.astype(np.float64)
                sums[layer] = sums.get(layer, 0) + weight * lora.scale * product
    for layer, delta in sums.items():
        kernel = np.asarray(flat[layer + KERNEL])
        flat[layer + KERNEL] = (kernel.astype(np.float64) + delta).astype(np.float32)
    return unflatten(flat)


def print_other_base(loras: Sequence[LoRA], params: Mapping[str, Any], name: str) -> None:
    """Print a note on stderr for pairs that were trained beside other weights."""
    if not any(lora.checksum for lora in loras):
        return
    own_checksum = checksum(params)
    for lora in loras:
        if lora.checksum not in ("", own_checksum):
            base = lora.base or "random weights"
            print(
                f"note: {lora.name} was trained on {base}, whose weights are not those of {name}",
                file=sys.stderr,
            )


# --- files


def save_lora(path: Path, lora: LoRA) -> None:
    """Write pairs as a safetensors file.

    Raises:
        GlideError: the file cannot be written.
    """
    arrays = {
        f"{layer}/{name}": array
        for layer, pair in lora.pairs.items()
        for name, array in zip(LORA_PAIR, pair, strict=True)
    }
    metadata = {"format": FORMAT, "rank": str(lora.rank), "alpha": repr(lora.alpha)}
    save_arrays(path, arrays, metadata | {"base": lora.base, "checksum": lora.checksum})


def read_lora(path: Path) -> LoRA:
    """Read the pairs that `save_lora` wrote.

    Raises:
        GlideError: the file is missing, is damaged, or holds something else.
    """
    arrays, metadata = map_arrays(path)
    if metadata.get("format") != FORMAT:
        raise GlideError(f"{path} holds no pairs of glide-jax: make it by glide-jax weights lora")
    try:
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
        pairs = to_pairs(unflatten(arrays))
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"rank {rank} and alpha {alpha} are out of range")
        for layer, (a, b) in pairs.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != rank or b.shape[0] != rank:
                raise ValueError(f"the pair of {layer} is not of rank {rank}")
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"the pair of {layer} is not finite")
    except (KeyError, ValueError, UsageError) as error:
        raise GlideError(f"{path} is damaged ({error}): make it again") from None
    base, total = metadata.get("base", ""), metadata.get("checksum", "")
    return LoRA(str(path), pairs, rank, alpha, base, total)
