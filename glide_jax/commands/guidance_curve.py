"""`glide-jax evaluate curve`: fidelity, diversity and CLIP score along guidance scales."""

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import OmitArgPrefixes

from glide_jax.devices.processes import own_process
from glide_jax.errors import UsageError
from glide_jax.evaluation.captioned_sets import BESIDE, clip_score, read_captions
from glide_jax.evaluation.extractors import Extractor, open_extractor
from glide_jax.evaluation.extractors.clean_clip import CleanCLIP, open_clean_clip
from glide_jax.evaluation.feature_files import features_of
from glide_jax.evaluation.figures import figure_class
from glide_jax.evaluation.guidance_figure import write_curve_figure
from glide_jax.evaluation.image_sets import ImageSet, open_images
from glide_jax.evaluation.metrics import inception_score
from glide_jax.evaluation.reports import write_json
from glide_jax.evaluation.set_scores import Side, compare, measure
from glide_jax.folders import check_writable
from glide_jax.pipeline.loading import load
from glide_jax.pipeline.options import (
    NO_DEFAULT_SHOWN,
    SampleModelOptions,
    SamplingOptions,
    ShardOptions,
    check_scales,
)
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.prompt_files import read_prompt_file
from glide_jax.pipeline.shard_files import missing_shards
from glide_jax.pipeline.sharded import sample_shards

# CLIP guidance as in the paper: without classifier-free guidance, by the ancestral sampler.
CLIP_GUIDED = {"guidance_scale": 1.0, "sampler": "ddpm"}


@dataclass(frozen=True)
class Curve:
    """Generate images at several guidance scales, and score those of each scale.

    The scores against real images are those of figure 6 of the paper: FID, inception score,
    precision, recall and CLIP score. The images are written to tar shards, as by glide-jax sample
    --shards. Repeat the command to continue after an interruption.

    Attributes:
        prompts_file: Captions: a text file with one per line, a table, or a JSON file such as
            COCO's captions_val2014.json.
        real: Folder of real images or of tar shards, or an .npz with images.
        inception: Weight file of the Inception network of FID,
            pt_inception-2015-12-05-6726825d.pth, from the releases of
            github.com/mseitzer/pytorch-fid.
        clip_score_model: The CLIP of the CLIP score, trained on images without noise: a folder of
            transformers (huggingface.co/openai), or a file of a state dict.
        prompts_field: The column or field of --prompts-file that has the captions. Default:
            caption, text, prompt or a similar name.
        num: Images per point: this many random captions, with one image each.
        seed: Seed of the images and of the choice of captions.
        scales: Scales of classifier-free guidance. Each gives one point of the curve.
        clip_guidance_scales: Scales of CLIP guidance by the CLIP of --clip-model. Each gives one
            point of the curve, without classifier-free guidance, and with the sampler ddpm unless
            you set --sampler.
        size: Side to which the central square of real images is scaled. Default: the side of the
            generated images.
        nearest_k: The k of precision and recall.
        allow_few_images: Accept sets that have no more images than the network has dimensions. FID
            is then too large.
        out: Folder for the shards, curve.json and curve.png.
    """

    prompts_file: Path
    real: str
    inception: Path
    clip_score_model: Path
    prompts_field: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    num: int = 30_000
    seed: int = 0
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    clip_guidance_scales: tuple[float, ...] = ()
    size: Annotated[int | None, NO_DEFAULT_SHOWN] = None
    nearest_k: int = 3
    allow_few_images: bool = False
    out: Path = Path("curve")
    sharding: OmitArgPrefixes[ShardOptions] = field(default_factory=ShardOptions)
    model: OmitArgPrefixes[SampleModelOptions] = field(default_factory=SampleModelOptions)
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        """Generate what is missing, score every point, and write report and figure."""
        # What is missing must end the command before the first image.
        figure_class()
        if self.num < 1:
            raise UsageError(f"--num must be at least 1, not {self.num}")
        if not self.scales and not self.clip_guidance_scales:
            raise UsageError("give --scales or --clip-guidance-scales")
        swept = (
            {"clip_guidance_scale": self.clip_guidance_scales} if self.clip_guidance_scales else {}
        )
        check_scales(self.model, self.sampling.given_settings() | swept)
        prompts = self._prompts()
        inception, clip = open_extractor(self.inception), open_clean_clip(self.clip_score_model)
        if inception.classes is None:
            raise UsageError(f"{self.inception} is {inception.name}, not the Inception of FID")
        check_writable(self.out)
        pipe = load(**self.model.load_arguments())
        if self.clip_guidance_scales and pipe.clip is None:
            raise UsageError(
                "--clip-guidance-scales needs a noised CLIP that guides: give --clip-model"
            )
        side = (pipe.upsampler or pipe).model.config.image_size
        real_images = open_images(self.real, self.size or side)
        points = self._points()
        unfinished = [f for f, _, changed in points if not self._sample(pipe, prompts, f, changed)]
        if unfinished:
            print(f"{unfinished[0]} is unfinished: this command scores when all shards are there")
            return
        real = self._measure(real_images, inception, self.real)
        scored = []
        for folder, (kind, scale), _ in points:
            scored.append(
                {"kind": kind, "scale": scale, **self._score(folder, real, inception, clip)}
            )
            print(_line(scored[-1]), flush=True)
            self._write(pipe, scored, clip)
        title = f"{pipe.model.name}: {self.num:,} images a point, seed {self.seed}; {clip.name}"
        write_curve_figure(scored, title, self.out / "curve.png")
        print(f"curve.json and curve.png in {self.out}")

    @cached_property
    def own_process(self) -> tuple[int, int]:
        """The index of this process, and the number of processes; see `own_process`."""
        return own_process(self.sharding.process_id, self.sharding.num_processes)

    def _prompts(self) -> list[str]:
        prompts = read_prompt_file(self.prompts_file, self.prompts_field)
        if len(prompts) < self.num:
            raise UsageError(
                f"{self.prompts_file} has {len(prompts):,} captions: set --num to that or less, "
                f"not {self.num:,}"
            )
        return random.Random(self.seed).sample(prompts, self.num)

    def _points(self) -> list[tuple[Path, tuple[str, float], dict[str, Any]]]:
        """Return the folder of each point, its kind and scale, and its settings."""
        chosen = self.sampling.given_settings()
        points: list[tuple[Path, tuple[str, float], dict[str, Any]]] = []
        for kind, values, fixed in (
            ("guidance_scale", self.scales, {"clip_guidance_scale": 0.0} | chosen),
            ("clip_guidance_scale", self.clip_guidance_scales, CLIP_GUIDED | chosen),
        ):
            for scale in dict.fromkeys(values):
                points.append(
                    (self.out / f"{kind}_{scale:g}", (kind, scale), fixed | {kind: scale})
                )
        return points

    def _sample(
        self, pipe: Pipeline, prompts: list[str], folder: Path, settings: dict[str, Any]
    ) -> bool:
        """Generate the shards of a point that are missing; return whether all are there."""
        upsampler = {"steps": self.model.upsampler_steps, "sampler": self.model.upsampler_sampler}
        line = sample_shards(
            pipe,
            prompts,
            folder,
            shard_size=self.sharding.shard_size,
            process=self.own_process,
            seed=self.seed,
            batch_size=self.model.batch_size,
            upsampler={name: value for name, value in upsampler.items() if value is not None},
            **settings,
        )
        print(line, flush=True)
        return not missing_shards(folder)

    def _measure(self, images: ImageSet, space: Extractor, path: str) -> Side:
        return measure(images, space, self._features, path=path, allow_few=self.allow_few_images)

    @property
    def _features(self) -> Path:
        return self.out / "features"

    def _score(
        self, folder: Path, real: Side, inception: Extractor, clip: CleanCLIP
    ) -> dict[str, Any]:
        """Return the measures of a point."""
        images = open_images(folder)
        generated = self._measure(images, inception, str(folder))
        measures = compare(real, generated, inception, path=self.real, nearest_k=self.nearest_k)
        assert generated.features is not None
        # The class probabilities come from the same features: no image is read a second time.
        logits = generated.features @ np.asarray(inception.params["fc"]["kernel"])
        measures["inception_score"] = inception_score(np.asarray(jax.nn.softmax(logits, axis=1)))
        features, _ = features_of(images, clip.image, self._features)
        scores = clip_score(clip, features, read_captions(BESIDE, images))
        return measures | {
            name: scores[name] for name in ("clip_score", "clip_score_100", "clip_s")
        }

    def _write(self, pipe: Pipeline, points: list[dict[str, Any]], clip: CleanCLIP) -> None:
        report = {
            "weights": pipe.model.name,
            "real": self.real,
            "prompts_file": str(self.prompts_file),
            "num": self.num,
            "seed": self.seed,
            "clip": {"name": clip.name, "checksum": clip.checksum},
            "sampling": self.sampling.given_settings(),
            "points": points,
        }
        write_json(self.out / "curve.json", report)


def _line(point: dict[str, Any]) -> str:
    """Return the measures of a point on one line."""
    return (
        f"{point['kind'].replace('_', ' ')} {point['scale']:g}: "
        f"FID {point['frechet_distance']:.2f}, inception score {point['inception_score']:.2f}, "
        f"precision {point['precision']:.3f}, recall {point['recall']:.3f}, "
        f"CLIP score {point['clip_score']:.2f}"
    )
