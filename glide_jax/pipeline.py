"""The object that a notebook holds: prompts in, pictures out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import Guidance, Network, branches_of, classifier_free, clip
from glide_jax.diffusion.sampling import Plan, plan, sample, stream
from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.diffusion.solvers import SOLVERS, Solver
from glide_jax.errors import UsageError, nearest
from glide_jax.models.text import TextFeatures
from glide_jax.models.unet import GLIDE
from glide_jax.pictures import Pictures
from glide_jax.runtime import trunk_dtype
from glide_jax.tokenizers import GPT2Tokenizer
from glide_jax.weights.registry import Model, load_model


@dataclass(frozen=True)
class Settings:
    """How a picture is sampled; with the prompt, the seed and its number, what makes it again.

    Attributes:
        steps: network evaluations, or a respacing string of the release ("100", "ddim50",
            "fast27", "10,10,3,2,2").
        sampler: "dpm++2m" (few steps), "ddim", or "ddpm" (the paper's ancestral sampling).
        guidance_scale: of classifier-free guidance; 1 is none, 3 the paper's choice.
        spacing: "logsnr" (even in log signal-to-noise) or "uniform" (even in time).
        eta: noise of "ddim", from 0 (deterministic) to 1 (as much as "ddpm").
        guidance: what acts on the prediction, instead of classifier-free guidance at
            `guidance_scale` and clipping of the picture to its range.
    """

    steps: int | str = 25
    sampler: str = "dpm++2m"
    guidance_scale: float = 3.0
    spacing: str = "logsnr"
    eta: float = 0.0
    guidance: tuple[Guidance, ...] | None = None

    def changed(self, **values: Any) -> "Settings":
        """These settings with some replaced; None leaves a value as it is.

        Raises:
            UsageError: there is no such setting.
        """
        names = [f.name for f in fields(self)]
        for name in values:
            if name not in names:
                raise UsageError(f"there is no setting {name!r}{nearest(name, names)}")
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def solver(self) -> Solver:
        """The solver that `sampler` names.

        Raises:
            UsageError: there is none of that name, or it has no eta.
        """
        if self.sampler not in SOLVERS:
            raise UsageError(
                f"unknown sampler {self.sampler!r}{nearest(self.sampler, SOLVERS)}: "
                f"choose one of {', '.join(SOLVERS)}"
            )
        if self.eta and self.sampler != "ddim":
            raise UsageError(f"eta belongs to the sampler ddim, not to {self.sampler}")
        solver = SOLVERS[self.sampler]
        return partial(solver, eta=self.eta) if self.sampler == "ddim" else solver

    def guidances(self) -> tuple[Guidance, ...]:
        """What acts on the prediction, innermost first."""
        if self.guidance is not None:
            return tuple(self.guidance)
        free = () if self.guidance_scale == 1 else (classifier_free(scale=self.guidance_scale),)
        return (*free, clip())

    def plan(self, schedule: Schedule) -> Plan:
        """The plan of these settings on a noise schedule."""
        grid = make_grid(schedule, self.steps, self.spacing)
        return plan(schedule, grid, self.solver(), self.guidances())


@dataclass(frozen=True)
class Denoiser:
    """`Network.fn` of a GLIDE model: conditioning is a dictionary of its keyword arguments."""

    model: GLIDE

    def __call__(self, params: Any, x: jax.Array, t: jax.Array, cond: Mapping) -> jax.Array:
        return self.model.apply({"params": params}, x, t, **cond)


@partial(jax.jit, static_argnums=0)
def encode_text(model: GLIDE, params: Any, tokens: jax.Array, mask: jax.Array) -> TextFeatures:
    """Text features of captions: `tokens (B, L)` int32, `mask (B, L)` bool."""
    return model.apply({"params": params}, tokens, mask, method=GLIDE.encode_text)


@dataclass(frozen=True)
class Pipeline:
    """A model ready to draw; make one with `glide_jax.load`.

    Attributes:
        model: sizes and weights.
        dtype: of the trunk: "auto" (by device), "float32", "bfloat16" or "float16".
    """

    model: Model
    dtype: str = "auto"
    settings: Settings = field(default_factory=Settings)

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        return make_schedule(self.model.schedule, self.model.diffusion_steps)

    @cached_property
    def network(self) -> Network:
        """The network and its weights, on the device."""
        module = GLIDE(self.model.config, trunk_dtype(self.dtype))
        params = jax.device_put(self.model.params)
        return Network(Denoiser(module), params, self.model.prediction)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer:
        """The tokenizer of captions."""
        return GPT2Tokenizer(self.model.config.text_ctx)

    def text_features(self, prompts: Sequence[str]) -> TextFeatures:
        """`TextFeatures` of prompts; the empty prompt is the unconditional one."""
        tokens = self.tokenizer(list(prompts))
        return encode_text(self.network.fn.model, self.network.params, tokens.ids, tokens.mask)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        first: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> Pictures:
        """Draws `num` pictures of each prompt.

        Picture i of a run is drawn from `fold_in(key(seed), i)` alone, so that `first=i, num=1` makes
        it again, whatever was drawn beside it.

        Args:
            prompts: one, or several; "" is unconditional.
            seed: of the run.
            first: number of the first picture.
            progress: show a progress bar.
            **settings: any field of `Settings`.

        Raises:
            UsageError: a setting is unknown or cannot be carried out, or there is no prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num < 1:
            raise UsageError("give at least one prompt, and a num of at least 1")
        settings = self.settings.changed(**settings)
        run = settings.plan(self.schedule)
        captions = [prompt for prompt in prompts for _ in range(num)]
        batch, size = len(captions), self.model.config.image_size

        conds = self._conditions(captions, settings.guidances())
        keys = picture_keys(seed, first + np.arange(batch))
        x = jax.vmap(lambda key: jax.random.normal(key, (size, size, 3)))(keys[:, 0])
        arguments = {"main": self.network}, conds, run, x, keys[:, 1]
        if progress:
            with tqdm.tqdm(total=len(run), unit="step", desc=f"{batch} pictures") as bar:
                for done, state in stream(*arguments):
                    jax.block_until_ready(state.x)
                    bar.update(done - bar.n)
        else:
            state = sample(*arguments)
        return Pictures(
            images=to_uint8(state.x),
            prompts=tuple(captions),
            seed=seed,
            first=first,
            weights=self.model.name,
            settings=describe(settings),
        )

    def _conditions(self, captions: Sequence[str], guidances: Sequence[Guidance]) -> dict[str, Any]:
        """Conditioning of each branch; every distinct caption is encoded once."""
        branches = branches_of(guidances)
        texts = {
            b.name: captions if b.prompt is None else [b.prompt] * len(captions) for b in branches
        }
        distinct = list(dict.fromkeys(text for some in texts.values() for text in some))
        features = self.text_features(distinct)

        def rows(some: Sequence[str]) -> dict[str, TextFeatures]:
            index = np.array([distinct.index(text) for text in some])
            return {"text": jax.tree.map(lambda leaf: leaf[index], features)}

        return {name: rows(some) for name, some in texts.items()}


def picture_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """`(B, 2)` keys of pictures: for the noise that each begins with, and for that of its steps."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.asarray(numbers))


def to_uint8(x: jax.Array) -> np.ndarray:
    """`[-1, 1] -> 0..255`, rounded to even as the released code does."""
    return np.asarray(jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8))


def describe(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, for a picture's metadata."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    guidance = values.pop("guidance")
    if guidance is not None:
        values["guidance"] = [
            {"name": g.fn.__name__, "span": g.span}
            | {k: np.asarray(v).tolist() for k, v in g.args.items()}
            for g in guidance
        ]
    return values


def load(weights: str | Path = "emoji64", *, dtype: str = "auto") -> Pipeline:
    """A pipeline from weights: a name ("emoji64"), a folder of weights, or a run of `train.py`.

    Raises:
        UsageError: no such weights.
        GlideError: they are broken.
    """
    model = load_model(weights)
    return Pipeline(model, dtype, Settings().changed(**model.defaults))
