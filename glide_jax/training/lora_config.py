"""The fields of LoRA, part of a `TrainConfig`."""

from dataclasses import dataclass

from glide_jax.errors import UsageError, check_finite
from glide_jax.weights.lora import KINDS


@dataclass(frozen=True)
class LoRAConfig:
    """Fine-tuning by low-rank pairs beside frozen weights  (LoRA, 2106.09685).

    Attributes:
        rank: Rank of the pairs. Larger changes the model more freely, and needs more memory. 0: no
            LoRA, the weights themselves are trained.
        alpha: Scale of the pairs, above 0: a kernel becomes `W + alpha / rank * A B`. Larger learns
            faster.
        layers: Layers that get a pair: "attention", those of the UNet (queries, keys, values and
            outputs, of pixels and of text), and "text", those of the text transformer (the same,
            and its MLPs).
    """

    rank: int = 0
    alpha: float = 16.0
    layers: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self):
        check_finite(vars(self))
        if self.rank < 0:
            raise UsageError("lora.rank cannot be negative")
        if not self.alpha > 0:
            raise UsageError(f"lora.alpha must be above 0, not {self.alpha:g}")
        if not self.layers or set(self.layers) - set(KINDS):
            layers = " ".join(self.layers) or "none"
            raise UsageError(f"lora.layers are one or more of {', '.join(KINDS)}, not {layers}")

    @property
    def scale(self) -> float:
        """Factor of the product of a pair; 0 without LoRA."""
        return self.alpha / self.rank if self.rank else 0.0
