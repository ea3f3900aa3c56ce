"""The settings of the optimiser, its learning rate and the EMA of the weights."""

from dataclasses import dataclass

from glide_jax.errors import UsageError, check_finite

OPTIMISERS = ("adamw", "muon")
LR_DECAYS = ("constant", "cosine", "wsd")
# Just below 1/sqrt(12) = 0.2887, the width of the plain mean of all steps.
MAX_WIDTH = 0.28


def check_width(width: float) -> None:
    """Check the relative width of a power-function EMA.

    Raises:
        UsageError: no such EMA has this width.
    """
    if not 0 < width < MAX_WIDTH:
        raise UsageError(f"the width of an EMA is between 0 and {MAX_WIDTH}, not {width}")


@dataclass(frozen=True)
class OptimiserConfig:
    """The optimiser, its learning rate over time, and the EMA of the weights.

    Attributes:
        kind: "adamw", or "muon" (2502.16982), which makes the updates of convolutions and linear
            layers orthogonal and leaves the rest to AdamW.
        learning_rate: Peak learning rate, 0 or more; larger learns faster and less stably.
        muon_lr_ratio: Learning rate of Muon's part as a multiple of `learning_rate`, above 0.
        lr_decay: Learning rate after the warm-up: "constant"; "cosine", which falls to 0 at the
            last step; or "wsd" (warm-up-stable-decay, 2405.18392), constant and then falling
            linearly to 0 over the last `lr_decay_share` of the run.
        lr_decay_share: Share of the run, above 0 and up to 1, over which "wsd" falls.
        warmup: Steps of linear warm-up of the learning rate; 0: none. More is more stable at a high
            rate.
        beta_1: Decay rate of Adam's first moment, at least 0 and below 1; larger averages over more
            steps.
        beta_2: Decay rate of Adam's second moment, at least 0 and below 1; larger averages over
            more steps.
        epsilon: Adam's epsilon, above 0; larger makes updates smaller where gradients are small.
        weight_decay: Weight decay of the kernels, not of biases, norms and embeddings; larger
            keeps them smaller; 0: off.
        first_moment_dtype: Dtype of Adam's first moment: "float32", or "bfloat16", which saves
            memory.
        grad_clip: Largest global norm of the gradient; larger gradients are scaled down to it; 0:
            no clipping.
        freeze: Parts of the network that are not trained, given by the beginning of their parameter
            path, for example "text" (the text transformer) or "unet/down". They need no gradients
            and no optimiser state. Empty: everything is trained.
        ema: Decay rate of the EMA of the weights, at least 0 and below 1. Sampling uses the EMA.
            Larger averages over more steps. The rate starts lower, as `min(ema, (1 + step) / (10 +
            step))`: short runs thereby forget their first weights.
        ema_widths: Relative widths of further EMAs with a power-function profile, for example 0.05
            0.10; each is between 0 and 0.28. Larger averages over more of the training. From the
            snapshots of these EMAs, the command glide-jax weights ema makes the EMA of any width:
            post-hoc EMA (EDM2, 2312.02696, sec. 3.1).
        ema_snapshot_every: Steps between the snapshots of the EMAs of `ema_widths`, at least 1;
            larger needs less disk space, and makes the post-hoc EMA less exact.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-4
    muon_lr_ratio: float = 1.0
    lr_decay: str = "constant"
    lr_decay_share: float = 0.4
    warmup: int = 0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    first_moment_dtype: str = "float32"
    grad_clip: float = 1.0
    freeze: tuple[str, ...] = ()
    ema: float = 0.9999
    ema_widths: tuple[float, ...] = ()
    ema_snapshot_every: int = 5000

    def __post_init__(self):
        check_finite(vars(self))
        if self.learning_rate < 0:
            raise UsageError("learning_rate cannot be negative")
        for name, known in (("kind", OPTIMISERS), ("lr_decay", LR_DECAYS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        for name in ("beta_1", "beta_2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"{name} must be at least 0 and below 1, not {getattr(self, name)}"
                )
        for name in ("weight_decay", "grad_clip", "warmup"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} cannot be negative: {getattr(self, name)}")
        if not self.epsilon > 0:
            raise UsageError(f"epsilon must be above 0, not {self.epsilon}")
        if not 0 < self.lr_decay_share <= 1:
            raise UsageError(
                f"lr_decay_share is a share, 0 < share <= 1, not {self.lr_decay_share}"
            )
        if not self.muon_lr_ratio > 0:
            raise UsageError(f"muon_lr_ratio must be above 0, not {self.muon_lr_ratio}")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise UsageError(
                f"first_moment_dtype is float32 or bfloat16, not {self.first_moment_dtype!r}"
            )
        for width in self.ema_widths:
            check_width(width)
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise UsageError("ema_widths names a width twice")
        if self.ema_snapshot_every < 1:
            raise UsageError("ema_snapshot_every must be at least 1")
