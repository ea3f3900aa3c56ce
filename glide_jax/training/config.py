"""What a training run is made of; `configs/*.py` return a `TrainConfig` or a `CLIPTrainConfig`."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glide_jax.data.data_config import DataConfig
from glide_jax.diffusion.losses import WEIGHTINGS
from glide_jax.diffusion.schedule import PREDICTIONS
from glide_jax.errors import GlideError, UsageError, nearest
from glide_jax.models.presets import CLIPConfig, ModelConfig

PARALLELISMS = ("pmap", "fsdp")
ON_BAD_STEP = ("stop", "skip")


# 1 / sqrt(12): the width of the plain mean of all steps.
WIDEST = 0.28


def check_width(width: float) -> None:
    """Raises UsageError unless an average over a power function can have this relative width."""
    if not 0 < width < WIDEST:
        raise UsageError(f"the width of an average is between 0 and {WIDEST}, not {width}")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, its learning rate over time, and the moving averages of the weights.

    Attributes:
        decay: "constant", or "cosine": from `learning_rate` to zero over the run.
        warmup: steps of linear warm-up.
        moments: dtype of Adam's first moment: "float32", or "bfloat16", which saves memory.
        grad_clip: largest global norm of the gradient; larger gradients are scaled down; 0: off.
        freeze: parts of the network that stay as they began, by the start of their path: "text"
            (the text transformer), "unet/down". They cost neither gradients nor optimiser state.
        ema: rate of the moving average that is sampled from; it starts lower, as
            `min(ema, (1 + step) / (10 + step))`, so that short runs are not all initialisation.
        ema_power: relative widths of power-function averages to keep beside it (EDM2, 2312.02696,
            sec. 3.1), e.g. 0.05 0.10; from their snapshots `python -m glide_jax.weights ema` makes
            an average of any width after training.
        ema_every: steps between snapshots of these.
    """

    learning_rate: float = 1e-4
    decay: str = "constant"
    warmup: int = 0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    moments: str = "float32"
    grad_clip: float = 1.0
    freeze: tuple[str, ...] = ()
    ema: float = 0.9999
    ema_power: tuple[float, ...] = ()
    ema_every: int = 5000

    def __post_init__(self):
        if self.decay not in ("constant", "cosine"):
            raise UsageError(f"decay is constant or cosine, not {self.decay!r}")
        if self.moments not in ("float32", "bfloat16"):
            raise UsageError(f"moments are float32 or bfloat16, not {self.moments!r}")
        for width in self.ema_power:
            check_width(width)
        if len(set(self.ema_power)) < len(self.ema_power):
            raise UsageError("ema_power names a width twice")
        if self.ema_every < 1:
            raise UsageError("ema_every must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every recipe says.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless `out` says otherwise.
        schedule, diffusion_steps: the noise schedule that is trained.
        steps: updates, in all.
        batch_size: pictures a step, over all devices of all hosts.
        accumulate: parts that a batch is worked through in, one after the other, to save memory.
        parallelism: over devices: "pmap" (parameters on every device) or "fsdp" (parameters, optimiser
            and averages sharded: models that one device cannot hold).
        dtype: of the trunk: "auto" (bfloat16 on TPUs and recent GPUs, float16 on older GPUs,
            float32 on CPUs), or one of these.
        remat: compute activations again in the backward pass: less memory, a third more time.
        init_from: weights to begin with: a name, a folder, a `.pt` file, another run (not the
            state of a run: that is resumed without asking).
        out: folder of the run.
        on_bad_step: after a loss or gradient that is not finite, or a loss `spike` times its
            average: "stop", or "skip" the update and go on; the update is never made.
        spike: see `on_bad_step`; 0: only what is not finite is bad.
        save_every, keep, keep_every: steps between checkpoints, how many of the newest stay, and
            of which steps they stay for good (multiples; 0: none).
        log_every, sample_every, validate_every: steps between log lines, grids of samples, and
            measurements of the held-out loss (0: none).
        validation_split: of the data source, for the held-out loss.
        validation_batches: how many batches of it.
        profile: steps "first:last" to trace for TensorBoard's profiler.
        wandb: project to log to beside TensorBoard (needs `pip install wandb`).
    """

    name: str
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps: int = 100_000
    batch_size: int = 64
    accumulate: int = 1
    parallelism: str = "pmap"
    seed: int = 0
    dtype: str = "auto"
    remat: bool = False
    init_from: str = ""
    out: str = ""
    on_bad_step: str = "stop"
    spike: float = 0.0
    save_every: int = 1000
    keep: int = 3
    keep_every: int = 0
    log_every: int = 50
    sample_every: int = 0
    validate_every: int = 0
    validation_split: str = "validation"
    validation_batches: int = 16
    profile: str = ""
    wandb: str = ""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        for name in ("keep_every", "sample_every", "validate_every", "spike"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} cannot be negative")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"a batch of {self.batch_size} does not divide into {self.accumulate} parts"
            )
        for name, known in (("parallelism", PARALLELISMS), ("on_bad_step", ON_BAD_STEP)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints, logs and samples."""
        return Path(self.out or Path("runs") / self.name).expanduser().absolute()

    @property
    def side(self) -> int:
        """Of the squares that the network learns from, in pixels."""
        return self.model.image_size


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A recipe of a GLIDE model: base, upsampler or inpainting, by its `model.variant`.

    Attributes:
        prediction: what the network predicts: "eps", the noise (the released models), or "v", which
            weighs all noise levels alike (2202.00512).
        weighting: of the loss over noise levels: "none" (the paper), or "min-snr" (2303.09556,
            gamma 5).
        caption_dropout: share of captions that is emptied, for classifier-free guidance.
        low_res_noise: upsamplers with `model.low_res_level`: noise is added to the small picture
            at timesteps below this share of the chain (CDM, 2106.15282); 0: none.
        mask_all: inpainting: share of pictures of which nothing is known, which keeps the model's
            drawing from text alone.
        train_size: side of the squares that it learns from, where it is not the size it draws at: a
            network of convolutions learns from parts, or from smaller pictures; 0: the same.
        sample_prompts, sample_steps, sample_guidance_scale: what the grids show, and how.
        sample_clip_scale: CLIP guidance that suits the weights, where a noised CLIP is loaded with
            them; the grids do without.
        sample_strength: upsamplers: the share of the steps, the last ones, that are taken, from the
            small picture enlarged; None: all of them, from noise.
    """

    model: ModelConfig
    prediction: str = "eps"
    weighting: str = "none"
    caption_dropout: float = 0.0
    low_res_noise: float = 0.0
    mask_all: float = 0.1
    train_size: int = 0
    sample_every: int = 5000
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 25
    sample_guidance_scale: float = 3.0
    sample_clip_scale: float = 0.0
    sample_strength: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("caption_dropout", "low_res_noise", "mask_all"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        for name, known in (("prediction", PREDICTIONS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        if bool(self.low_res_noise) != self.model.low_res_level:
            raise UsageError("low_res_noise and model.low_res_level go together")
        # Each level but the last halves the picture; the small picture has a quarter of the side.
        step = max(2 ** (len(self.model.channel_mult) - 1), 4 if self.model.upsamples else 1)
        if self.train_size < 0 or self.train_size % step:
            raise UsageError(f"train_size is a multiple of {step}, not {self.train_size}")

    @property
    def side(self) -> int:
        """Of the squares that the network learns from, in pixels."""
        return self.train_size or self.model.image_size


@dataclass(frozen=True, kw_only=True)
class CLIPTrainConfig(RunConfig):
    """A recipe of a noised CLIP: captions against pictures of every noise level.

    Attributes:
        noise: noise levels are those of timesteps below this share of the chain: 1, all of them,
            to guide; less for a CLIP that is to judge clean pictures.
    """

    model: CLIPConfig
    noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.noise <= 1:
            raise UsageError(f"noise is a share, 0 < noise <= 1, not {self.noise}")
        if self.accumulate > 1:
            raise UsageError("a noised CLIP compares the whole batch: accumulate must be 1")


KINDS: dict[str, type[RunConfig]] = {"glide": TrainConfig, "clip": CLIPTrainConfig}


def save_config(config: RunConfig, path: Path) -> None:
    """Writes a recipe as JSON (atomically: a killed run leaves the old file or the new one)."""
    kind = next(k for k, t in KINDS.items() if type(config) is t)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"kind": kind} | dataclasses.asdict(config), indent=1))
    partial.replace(path)


def check_run(config: RunConfig) -> None:
    """Refuses a folder in which another model is being trained.

    The picture size may change: the network is convolutional.

    Raises:
        UsageError: the folder holds a run of another model.
        GlideError: the folder's recipe cannot be read.
    """
    path = config.folder / "config.json"
    if not path.exists():
        return
    before = read_config(path).model
    same = type(before) is type(config.model)
    if isinstance(before, ModelConfig):
        before = replace(before, image_size=config.model.image_size)
    if not same or before != config.model:
        raise UsageError(f"{config.folder} holds a run of another model: choose another --out")


def write_config(config: RunConfig) -> None:
    """Writes the recipe into the run's folder.

    Raises:
        GlideError: it cannot be written.
    """
    path = config.folder / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None


def read_config(path: Path) -> RunConfig:
    """The recipe that `save_config` wrote.

    Raises:
        GlideError: the file is missing or is no such recipe.
    """
    try:
        values = json.loads(path.read_text())
        return _build(KINDS[values.pop("kind", "glide")], values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GlideError(f"cannot read the recipe {path}: {error}") from None


def _build(kind: type, values: dict[str, Any]) -> Any:
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r}{nearest(unknown[0], known)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(known[name]):
            value = _build(known[name], value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
