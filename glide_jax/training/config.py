"""The fields of a recipe; `configs/*.py` return a `TrainConfig` or a `CLIPTrainConfig`."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glide_jax.data.data_config import DataConfig
from glide_jax.diffusion.losses import MIN_SNR_GAMMA, WEIGHTINGS
from glide_jax.diffusion.schedule import PREDICTION_TYPES
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.diffusion.timesteps import OPTIMISED, SPACINGS
from glide_jax.errors import GlideError, UsageError, check_finite, did_you_mean
from glide_jax.folders import expand_home, write_atomically
from glide_jax.models.presets import CLIPConfig, ModelConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.training.objective_fields import OBJECTIVES, check_objective
from glide_jax.training.optimiser_config import OptimiserConfig

PARALLELISMS = ("pmap", "fsdp", "hybrid")
TIMESTEP_DISTRIBUTIONS = ("uniform", "log-normal", "loss-aware")
ON_BAD_STEP = ("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The fields of every recipe.

    Attributes:
        name: Name of the run; its folder is `runs/<name>` unless `out` is set.
        model: Architecture of the network.
        noise_schedule: Noise schedule: "cosine" or "linear".
        diffusion_steps: Number of timesteps of the diffusion process; 1000 in the paper.
        data: Source of the images and captions.
        optimiser: The optimiser, its learning rate, and the EMA of the weights.
        steps: Total number of training steps, at least 1. Each updates the parameters once.
        minutes: Stop after this many minutes of training, not counting compilation, samples and
            validation; 0: no limit. Only for a single process. With a limit, the learning-rate
            decay "wsd" follows the time instead of the steps.
        batch_size: Images per step, in total over all devices of all processes; larger gives less
            noisy gradients, and needs more memory.
        accumulate: Gradient accumulation: number of microbatches per step, processed one after the
            other; larger needs less memory. It must divide `batch_size`.
        parallelism: "pmap": a full copy of the state (parameters, optimiser, EMA) on every
            device; "fsdp": the state sharded over all devices, for models that one device cannot
            hold; "hybrid": one copy per TPU slice or machine, sharded over its devices.
        devices_per_copy: Number of devices that share a copy of the state under "hybrid"; larger
            needs less memory and more traffic; 0: all devices of a TPU slice or of a machine.
        seed: Seed of the initial weights, the noise and the order of the data.
        dtype: Dtype of the trunk: "auto" (bfloat16 on TPUs, on recent GPUs and on CPUs with units
            for it, that is AMX; float16 on older GPUs; float32 on other CPUs), or one of these
            dtypes. The variable GLIDE_JAX_DTYPE, if set, says what "auto" is on every device.
        remat: Activation checkpointing: a step needs less memory and a third more time.
        init_from: Weights to start from: a name, a folder, a `.pt` file, `hf://user/name` or a run;
            empty: random weights. It is ignored when a stopped run is resumed.
        out: Folder of the run; empty: `runs/<name>`.
        on_bad_step: What to do at a bad step: "stop" the run, or "skip" the update. A step is bad
            if its loss or gradient is not finite, or its loss is too large (see `spike_factor`). A
            bad step never changes the weights.
        spike_factor: A step is bad if its loss exceeds this multiple of the running mean; larger
            tolerates more; 0: no limit.
        save_every: Steps between checkpoints, at least 1. A smaller number loses less work if the
            run is killed.
        keep: Number of newest checkpoints that are kept, at least 1.
        keep_every: Checkpoints at multiples of this number of steps are never deleted; 0: none.
        log_every: Steps between log lines, at least 1.
        sample_every: Steps between grids of samples; 0: none.
        validate_every: Steps between measurements of the held-out loss; 0: none.
        validation_split: Split of the data source for the held-out loss.
        validation_batches: Batches per measurement of the held-out loss, at least 1; more is slower
            and less noisy.
        profile: Steps to trace for TensorBoard's profiler, as "first:last" with first at least 2.
            Empty: no trace.
        wandb: Project of Weights & Biases to which the run is logged too, besides TensorBoard. It
            needs the extra wandb. Empty: none.
    """

    name: str
    model: ModelConfig | CLIPConfig
    noise_schedule: str = "cosine"
    diffusion_steps: int = 1000
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps: int = 100_000
    minutes: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    parallelism: str = "pmap"
    devices_per_copy: int = 0
    seed: int = 0
    dtype: str = "auto"
    remat: bool = False
    init_from: str = ""
    out: str = ""
    on_bad_step: str = "stop"
    spike_factor: float = 0.0
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
        check_finite(vars(self))
        check_finite({f"model.{name}": value for name, value in vars(self.model).items()})
        counts = ("steps", "batch_size", "accumulate", "keep", "validation_batches")
        for name in (*counts, "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        intervals = ("keep_every", "sample_every", "validate_every")
        for name in (*intervals, "spike_factor", "minutes", "devices_per_copy"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} cannot be negative")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"a batch of {self.batch_size} does not divide into {self.accumulate} microbatches"
            )
        if self.devices_per_copy and self.parallelism != "hybrid":
            raise UsageError("devices_per_copy is for --parallelism hybrid")
        for name, known in (("parallelism", PARALLELISMS), ("on_bad_step", ON_BAD_STEP)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")

    @property
    def folder(self) -> Path:
        """Folder of the run's checkpoints, logs and samples."""
        return expand_home(self.out or Path("runs") / self.name).absolute()

    @property
    def side(self) -> int:
        """Side of the training images, in pixels."""
        return self.model.image_size

    @property
    def starts_from(self) -> str:
        """The weights that a run starts from; empty: random weights."""
        return self.init_from


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A recipe of a GLIDE model: base, upsampler or inpainting, by its `model.variant`.

    Attributes:
        model: Architecture of the network.
        prediction_type: What the network predicts: "eps", the noise (the released models); "v", a
            mix of noise and image, which also trains the noisiest levels (2202.00512); "x_0", the
            clean image, for networks with large patches (2511.13720) and `model.residual`.
        weighting: Weighting of the loss over noise levels: "none", the squared error of the
            prediction (the paper); "min-snr" (2303.09556); or "v", the squared error of v.
        snr_gamma: Gamma of "min-snr", above 0; larger gives the least noisy levels more weight.
        huber_width: Width W of the pseudo-Huber loss, which is quadratic for errors of the
            prediction below W and linear above; smaller is closer to the absolute error; 0 turns
            it off: the squared error.
        timestep_distribution: Distribution of the timesteps, and so of the noise levels. "uniform":
            all timesteps are equally likely (the paper). "log-normal": log(alpha/sigma) is
            normal (EDM, 2206.00364). "loss-aware": timesteps with a larger loss are sampled more
            often and weighted less (2102.09672).
        half_log_snr_mean: Mean of log(alpha/sigma) for log-normal timesteps; with a larger mean,
            training images have less noise.
        half_log_snr_std: Standard deviation of log(alpha/sigma) for log-normal timesteps, above 0;
            with a larger one, the noise levels vary more.
        uniform_timestep_share: With log-normal timesteps, share of the images whose timestep is
            uniform, from 0 to 1; with a larger share, more images have extreme noise levels.
        objective: What is trained: "denoising", a diffusion model (the paper), or "consistency", a
            student that samples in few steps, with the options `distillation` in place of those
            from `weighting` to `uniform_timestep_share`.
        distillation: Teacher, noise levels and loss of the objective "consistency".
        lora: LoRA fine-tuning: low-rank pairs are trained, and the weights of `init_from` are
            frozen.
        caption_dropout: Share of captions replaced by the empty one, from 0 to 1, for
            classifier-free guidance. A larger share gives more training without a caption.
        low_res_timestep_share: For upsamplers with `model.low_res_timestep`: the small image is
            noised at a random timestep (noise-conditioning augmentation: CDM, 2106.15282). This
            share of the timesteps is used, from the clean end: above 0 and up to 1, and 0 for all
            other models. With a larger one, the upsampler accepts worse small images.
        mask_all_share: For inpainting: share of images that are masked completely, from 0 to 1.
            A larger share gives more training of text-to-image.
        train_image_size: Side of the training images in pixels, if it is not `model.image_size`:
            the network is convolutional and can learn from crops or smaller images. 0: the size
            of the model.
        sample_prompts: Prompts of the grids of samples.
        sample_steps: Sampling steps of the grids, and default stored with the weights; more is
            slower and more accurate.
        sample_guidance_scale: Classifier-free guidance scale of the grids, and default stored with
            the weights; 1 = off, larger follows the prompt more closely with less variety.
        sample_clip_guidance_scale: CLIP guidance scale stored with the weights as their default,
            for use with a noised CLIP; 0 = off, larger follows the prompt more closely. The grids
            use no CLIP guidance.
        sample_strength: For upsamplers, stored with the weights as their default: run only this
            share of the steps, the last ones, from the enlarged small image. Above 0 and up to 1;
            larger changes the image more. None: all steps, from noise.
        sample_sampler: Sampler of the grids, and default stored with the weights; empty: the
            general default of sampling.
        sample_spacing: Spacing of the noise levels of the grids, and default stored with the
            weights; empty: the general default of sampling.
    """

    model: ModelConfig
    prediction_type: str = "eps"
    weighting: str = "none"
    snr_gamma: float = MIN_SNR_GAMMA
    huber_width: float = 0.0
    timestep_distribution: str = "uniform"
    half_log_snr_mean: float = 0.0
    half_log_snr_std: float = 1.0
    uniform_timestep_share: float = 0.1
    objective: str = "denoising"
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    caption_dropout: float = 0.0
    low_res_timestep_share: float = 0.0
    mask_all_share: float = 0.1
    train_image_size: int = 0
    sample_every: int = 5000
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 25
    sample_guidance_scale: float = 3.0
    sample_clip_guidance_scale: float = 0.0
    sample_strength: float | None = None
    sample_sampler: str = ""
    sample_spacing: str = ""

    def __post_init__(self):
        super().__post_init__()
        shares = ("low_res_timestep_share", "mask_all_share", "uniform_timestep_share")
        for name in ("caption_dropout", *shares):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        for name, known in (
            ("prediction_type", PREDICTION_TYPES),
            ("weighting", WEIGHTINGS),
            ("timestep_distribution", TIMESTEP_DISTRIBUTIONS),
            ("objective", OBJECTIVES),
            ("sample_sampler", ("", *SOLVERS)),
            ("sample_spacing", ("", *SPACINGS, OPTIMISED)),
        ):
            if getattr(self, name) not in known:
                choose = " or ".join(filter(None, known))
                raise UsageError(f"{name} is {choose}, not {getattr(self, name)!r}")
        for name in ("snr_gamma", "half_log_snr_std"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.huber_width < 0:
            raise UsageError("huber_width cannot be negative")
        if self.model.residual and self.prediction_type != "x_0":
            raise UsageError('model.residual predicts x_0: prediction_type must be "x_0"')
        check_objective(self)
        if self.lora.rank:
            self._check_lora()
        if bool(self.low_res_timestep_share) != self.model.low_res_timestep:
            raise UsageError("low_res_timestep_share and model.low_res_timestep go together")
        # Each resolution of the UNet but the last halves the image; the small image has side / 4.
        step = max(self.model.size_multiple, 4 if self.model.upsamples else 1)
        if self.train_image_size < 0 or self.train_image_size % step:
            raise UsageError(
                f"train_image_size is a multiple of {step}, not {self.train_image_size}"
            )

    def _check_lora(self) -> None:
        """Check the fields that LoRA does not go with."""
        optimiser = self.optimiser
        for wrong, message in (
            (self.objective != "denoising", "lora.rank is for objective denoising"),
            (optimiser.kind != "adamw", "lora.rank is for optimiser.kind adamw"),
            (optimiser.freeze, "lora.rank freezes all weights: leave optimiser.freeze empty"),
            (optimiser.ema_widths, "lora.rank keeps one EMA: leave optimiser.ema_widths empty"),
        ):
            if wrong:
                raise UsageError(message)

    @property
    def side(self) -> int:
        """Side of the training images, in pixels."""
        return self.train_image_size or self.model.image_size

    @property
    def starts_from(self) -> str:
        """The weights that a run starts from, `init_from` or the teacher; empty: random weights."""
        return self.init_from or self.distillation.teacher


@dataclass(frozen=True, kw_only=True)
class CLIPTrainConfig(RunConfig):
    """A recipe of a noised CLIP: captions against images of every noise level.

    Attributes:
        model: Architecture of the CLIP.
        timestep_share: Share of the timesteps that the images are noised at, counted from the
            clean end, above 0 and up to 1. CLIP guidance needs 1 (every noise level); a CLIP
            that scores clean images needs less.
    """

    model: CLIPConfig
    timestep_share: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.timestep_share <= 1:
            raise UsageError(f"timestep_share is above 0 and up to 1, not {self.timestep_share}")
        if self.model.n_timestep < self.diffusion_steps:
            raise UsageError(
                f"model.n_timestep is {self.model.n_timestep}: it must be at least "
                f"{self.diffusion_steps}, the diffusion_steps"
            )
        if self.accumulate > 1:
            raise UsageError("a noised CLIP compares the whole batch: accumulate must be 1")
        if self.sample_every:
            raise UsageError("a noised CLIP makes no grids of samples: sample_every must be 0")


def trains_lora(config: RunConfig) -> bool:
    """Whether a recipe trains low-rank pairs alone."""
    return isinstance(config, TrainConfig) and config.lora.rank > 0


KINDS: dict[str, type[RunConfig]] = {"glide": TrainConfig, "clip": CLIPTrainConfig}


def save_config(config: RunConfig, path: Path) -> None:
    """Write a recipe as JSON, atomically: a killed run leaves the old file or the new one."""
    kind = next(k for k, t in KINDS.items() if type(config) is t)
    write_atomically(
        path, json.dumps({"kind": kind} | dataclasses.asdict(config), indent=1).encode()
    )


def check_same_model(config: RunConfig) -> None:
    """Check that the folder of a run holds no run of another model.

    The image size may differ: the network is convolutional.

    Raises:
        UsageError: the folder holds a run of another model.
        GlideError: the folder's recipe cannot be read.
    """
    path = config.folder / "config.json"
    if not path.exists():
        return
    recipe = read_config(path)
    recipe_model = recipe.model
    same_kind = type(recipe_model) is type(config.model)
    if isinstance(recipe_model, ModelConfig):
        recipe_model = replace(recipe_model, image_size=config.model.image_size)
    if not same_kind or recipe_model != config.model:
        raise UsageError(f"{config.folder} holds a run of another model: choose another --out")
    if isinstance(recipe, TrainConfig) and isinstance(config, TrainConfig):
        # With rank 0 the other fields of LoRA have no effect.
        stored_lora, lora = (c.lora if c.lora.rank else LoRAConfig() for c in (recipe, config))
        if stored_lora != lora:
            raise UsageError(
                f"{config.folder} holds a run with other lora fields: choose another --out"
            )


def write_config(config: RunConfig) -> None:
    """Write the recipe into the run's folder.

    Raises:
        GlideError: the recipe cannot be written.
    """
    path = config.folder / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None


def read_config(path: Path) -> RunConfig:
    """Return the recipe that `save_config` wrote.

    Raises:
        GlideError: the file is missing or holds no recipe.
    """
    try:
        values = json.loads(path.read_text())
        return _build(KINDS[values.pop("kind", "glide")], values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
        raise GlideError(f"cannot read the recipe {path}: {error}") from None


def _build(kind: type, values: dict[str, Any]) -> Any:
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    built = {}
    for name, value in values.items():
        field_type = known[name]
        if isinstance(field_type, type) and dataclasses.is_dataclass(field_type):
            value = _build(field_type, value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
