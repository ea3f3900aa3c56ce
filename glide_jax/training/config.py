"""What a training run is made of; `configs/*.py` return one `TrainConfig` each."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from glide_jax.diffusion.schedule import PREDICTIONS
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Where captioned pictures come from, and how a caption is made of a record.

    Attributes:
        source: an .npz file, a folder of pictures with captions (`cat.png` and `cat.txt`), a
            prepared tensorflow-datasets folder, or the name of a data set looked up in `data_dir`.
        split: of the source, where it has any.
        data_dir: where named data sets lie.
        captions: templates, one drawn at random each time a record is seen; `{caption}` and any
            other text field of the record, `{a_caption}` for the caption with "a" or "an".
        concepts, styles: keep only these (data sets that have such fields); empty: keep all.
        workers: worker processes that read and decode; 0: in this process.
    """

    source: str = ""
    split: str = "train"
    data_dir: str = "~/tensorflow_datasets"
    captions: tuple[str, ...] = ("{caption}",)
    concepts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    workers: int = 0


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, its learning rate over time, and the moving average of the weights.

    Attributes:
        decay: "constant", or "cosine": from `learning_rate` to zero over the run.
        warmup: steps of linear warm-up.
        clip: largest global norm of the gradient; 0: no clipping.
        ema: rate of the moving average that is sampled from; it starts lower, as
            `min(ema, (1 + step) / (10 + step))`, so that short runs are not all initialisation.
    """

    learning_rate: float = 1e-4
    decay: str = "constant"
    warmup: int = 0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.9999


@dataclass(frozen=True)
class TrainConfig:
    """One recipe.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless `out` says otherwise.
        schedule, diffusion_steps: the noise schedule that is trained.
        prediction: what the network predicts: "eps", the noise (the released models), or "v", which
            weighs all noise levels alike (2202.00512).
        batch_size: pictures a step, over all devices.
        caption_dropout: share of captions that is emptied, for classifier-free guidance.
        dtype: of the trunk: "auto" (bfloat16 on TPUs and recent GPUs, float16 on older GPUs,
            float32 on CPUs), or one of these.
        init_from: a folder of weights to begin with (not the state of a run: that is resumed
            without asking).
        save_every, keep: steps between checkpoints, and how many of the newest stay.
        log_every, sample_every: steps between log lines, and between grids of samples (0: none).
        sample_prompts: what the grids show.
    """

    name: str
    model: ModelConfig
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    prediction: str = "eps"
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps: int = 100_000
    batch_size: int = 64
    caption_dropout: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    init_from: str = ""
    out: str = ""
    save_every: int = 1000
    keep: int = 3
    log_every: int = 50
    sample_every: int = 5000
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 25
    sample_guidance_scale: float = 3.0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError("steps and batch_size must be at least 1")
        if not 0 <= self.caption_dropout <= 1:
            raise UsageError(f"caption_dropout is a share from 0 to 1, not {self.caption_dropout}")
        if self.prediction not in PREDICTIONS:
            raise UsageError(f"prediction is {' or '.join(PREDICTIONS)}, not {self.prediction!r}")
        if self.save_every < 1 or self.log_every < 1:
            raise UsageError("save_every and log_every must be at least 1")

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints, logs and samples."""
        return Path(self.out or Path("runs") / self.name).expanduser().absolute()


def load_recipe(path: str | Path) -> TrainConfig:
    """The `TrainConfig` that `get_config()` of a recipe file returns.

    Raises:
        UsageError: there is no such file, or it has no `get_config`.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f": {path.parent} has {', '.join(near)}" if near else ""
        raise UsageError(f"there is no recipe {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{path} is no recipe: it has no function get_config()")
    return module.get_config()


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes a recipe as JSON (atomically: a killed run leaves the old file or the new one)."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=1))
    partial.replace(path)


def begin_run(config: TrainConfig) -> None:
    """Writes the recipe into the run's folder, unless another model is being trained there.

    The picture size may change: the network is convolutional.

    Raises:
        UsageError: the folder holds a run of another model.
        GlideError: the folder's recipe cannot be read.
    """
    path = config.folder / "config.json"
    if path.exists():
        before = replace(read_config(path).model, image_size=config.model.image_size)
        if before != config.model:
            raise UsageError(f"{config.folder} holds a run of another model: choose another --out")
    save_config(config, path)


def read_config(path: Path) -> TrainConfig:
    """The recipe that `save_config` wrote.

    Raises:
        GlideError: the file is missing or is no such recipe.
    """
    try:
        return _build(TrainConfig, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise GlideError(f"cannot read the recipe {path}: {error}") from None


def _build(kind: type, values: dict):
    parts = {"model": ModelConfig, "data": DataConfig, "optimiser": OptimiserConfig}
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown field {', '.join(unknown)}")
    built = {}
    for name, value in values.items():
        if kind is TrainConfig and name in parts:
            value = _build(parts[name], value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
