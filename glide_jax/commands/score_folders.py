"""`glide-jax evaluate fid`: scores of a folder of images against another."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from glide_jax.errors import UsageError
from glide_jax.evaluation.captioned_sets import clip_score, read_captions
from glide_jax.evaluation.extractors import open_extractor
from glide_jax.evaluation.extractors.clean_clip import CleanCLIP, open_clean_clip
from glide_jax.evaluation.feature_files import features_of
from glide_jax.evaluation.features import SCORER, FeatureSpace, Scorer, open_scorer
from glide_jax.evaluation.frechet import Moments, read_statistics, save_statistics
from glide_jax.evaluation.image_sets import ImageSet, has_images, open_images
from glide_jax.evaluation.reports import write_json
from glide_jax.evaluation.set_scores import compare, measure, table
from glide_jax.folders import check_writable
from glide_jax.pipeline.options import NO_DEFAULT_SHOWN

WEIGHTS = (
    "--features needs one weight file or several: pt_inception-2015-12-05-6726825d.pth for FID "
    "(releases of github.com/mseitzer/pytorch-fid), dinov2_vitl14_pretrain.pth for FD-DINOv2 "
    "(github.com/facebookresearch/dinov2), a folder of CLIP (huggingface.co/openai), or scorer"
)


@dataclass(frozen=True)
class Fid:
    """Score a folder of images against another: FID, FD-DINOv2, kernel distance, precision, recall.

    You must have the weight files of the feature networks. Repeat the command to continue after an
    interruption: the features are kept beside the report and not computed again.

    Attributes:
        real: Folder of real images or of tar shards, or an .npz with images (arr_0, as ADM writes)
            or with statistics (mu and sigma, as for --reference).
        generated: Folder of generated images or of tar shards, or an .npz with images. Without it
            only the statistics of the real images are saved.
        reference: Statistics instead of the real images, for the Frechet distance only: an .npz
            with mu and sigma that --save-statistics, ADM or pytorch-fid wrote.
        features: Weight files of the feature networks: the Inception of FID, DINOv2, CLIP; scorer
            means the embeddings of --scorer. Each gives a line of the table.
        size: Side in pixels, such as 256, to which the central square of each image is scaled
            before the network's own resizing. Larger keeps more detail. Default: images are not
            changed, and all images of a set must have one size.
        captions: Captions of the generated images, for the CLIP score. Either a text file with one
            caption per line, in the order of the image names (2.png before 10.png), or the word
            beside. With beside, the caption of cat.png is in cat.txt (also in tar shards),
            otherwise it is the prompt that glide-jax sample stored in the image.
        clip_score_model: A CLIP that was trained on clean images, such as OpenAI's, for the CLIP
            score: a folder of transformers (huggingface.co/openai), or a state dict in a file.
            Without it the CLIP score is computed by --scorer.
        scorer: A noised CLIP of glide-jax: a name, a folder of weights, or a run of train.py. It
            computes the embeddings of --features scorer, and without --clip-score-model also
            the CLIP score.
        views: Views of each image whose embeddings the scorer averages: 10 crops, or 1, the image
            alone.
        nearest_k: The k of precision and recall, at least 1 and below the number of images. A
            larger k raises both.
        allow_few_images: Allow sets with no more images than the network has feature dimensions.
            The Frechet distance is then too large.
        save_statistics: An .npz for mu and sigma of the real images, for --reference; with one
            network in --features.
        out: The report, a .json file. Features are kept in the folder features beside it.
    """

    real: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    generated: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    reference: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    features: tuple[str, ...] = ()
    size: Annotated[int | None, NO_DEFAULT_SHOWN] = None
    captions: Annotated[str | None, NO_DEFAULT_SHOWN] = None
    clip_score_model: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    scorer: str = "emoji_scorer64"
    views: Literal[10, 1] = 10
    nearest_k: int = 3
    allow_few_images: bool = False
    save_statistics: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    out: Path = Path("evaluation/fid.json")

    def run(self) -> None:
        """Measure, print the table, and write the report."""
        self._check()
        real_path = str(self.reference or self.real)
        real = read_statistics(self.reference) if self.reference else self._open(self.real)
        generated = self._open(self.generated)
        captions: list[str] = []
        if self.captions is not None:
            if not isinstance(generated, ImageSet):
                raise UsageError(f"--captions needs generated images, not {self.generated}")
            captions = read_captions(self.captions, generated)
        if self.save_statistics is not None and isinstance(real, Moments):
            raise UsageError(f"--save-statistics needs images; {real_path} has statistics already")
        check_writable(self.out.parent)
        scorer = self._scorer()
        clip = None if self.clip_score_model is None else open_clean_clip(self.clip_score_model)
        # A missing file must end the command before the first network computes.
        spaces = [
            scorer if scorer and name == SCORER else open_extractor(name) for name in self.features
        ]
        measured = [self._measure(real, generated, space, real_path) for space in spaces]
        scores = [score for score in measured if score is not None]
        report: dict[str, Any] = {
            "real": real_path if self.features else None,
            "generated": self.generated,
            "size": self.size,
            "scores": scores,
        }
        judge = clip or scorer
        if captions and judge is not None and isinstance(generated, ImageSet):
            space = clip.image if clip else judge
            assert not isinstance(space, CleanCLIP)
            features, _ = features_of(generated, space, self._folder)
            report["clip_score"] = clip_score(judge, features, captions)
        if generated is not None:
            if scores:
                print(table(scores))
            if clip_scores := report.get("clip_score"):
                print(
                    f"CLIP score: {clip_scores['clip_score']:.4f}; 100 max(cos, 0): "
                    f"{clip_scores['clip_score_100']:.4f}; CLIP-S: {clip_scores['clip_s']:.4f} "
                    f"({clip_scores['clip']})"
                )
            write_json(self.out, report)
            print(self.out)

    @property
    def _folder(self) -> Path:
        """The folder of the files of features."""
        return self.out.parent / "features"

    def _check(self) -> None:
        if not self.features and self.captions is None:
            raise UsageError(WEIGHTS)
        if self.features and (self.real is None) == (self.reference is None):
            raise UsageError("give the real images to --real, or their statistics to --reference")
        if self.generated is None and self.save_statistics is None:
            raise UsageError("give the images to score to --generated, or --save-statistics")
        if self.save_statistics is not None and len(self.features) != 1:
            raise UsageError("--save-statistics is for one network: name one in --features")
        if self.reference is not None and len(self.features) > 1:
            raise UsageError("--reference is for one network: name one in --features")
        if self.save_statistics is not None and self.save_statistics.suffix != ".npz":
            raise UsageError(f"--save-statistics ends in .npz, not {self.save_statistics.name}")
        if self.clip_score_model is not None and self.captions is None:
            raise UsageError("--clip-score-model is for the CLIP score: give --captions")
        if self.out.suffix != ".json":
            raise UsageError(f"--out is a .json file, not {self.out}")
        if self.nearest_k < 1:
            raise UsageError(f"--nearest-k must be at least 1, not {self.nearest_k}")

    def _open(self, path: str | None) -> ImageSet | Moments | None:
        if path is None:
            return None
        if Path(path).suffix == ".npz" and not has_images(path):
            return read_statistics(Path(path))
        return open_images(path, self.size)

    def _scorer(self) -> Scorer | None:
        if SCORER not in self.features and (
            self.captions is None or self.clip_score_model is not None
        ):
            return None
        return open_scorer(self.scorer, views=self.views)

    def _measure(
        self,
        real: ImageSet | Moments | None,
        generated: ImageSet | Moments | None,
        space: FeatureSpace,
        real_path: str,
    ) -> dict[str, Any] | None:
        """Return the scores of one feature space; None without generated images."""
        assert real is not None
        few = self.allow_few_images
        left = measure(real, space, self._folder, path=real_path, allow_few=few)
        if self.save_statistics is not None:
            save_statistics(self.save_statistics, left.moments)
            print(self.save_statistics)
        if generated is None or self.generated is None:
            return None
        right = measure(generated, space, self._folder, path=self.generated, allow_few=few)
        scores = compare(left, right, space, path=real_path, nearest_k=self.nearest_k)
        scores["sizes"] = {"real": left.shape, "generated": right.shape}
        if left.shape and right.shape and left.shape != right.shape:
            sides = " and ".join(f"{w} x {h}" for h, w in (left.shape, right.shape))
            print(
                f"real and generated images have {sides} pixels: --size makes them alike",
                file=sys.stderr,
            )
        return scores
