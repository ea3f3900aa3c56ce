"""The settings of the data: which source, and how its records become batches."""

from dataclasses import dataclass

from glide_jax.data.mixture import parse_mixture
from glide_jax.errors import UsageError, check_finite, did_you_mean

CROPS = ("centre", "random", "window")
CAPTION_LINES = ("choose", "join")
ON_DEVICE = ("auto", "yes", "no")


@dataclass(frozen=True)
class DataConfig:
    """Source of captioned images, and how its records become images and captions.

    Attributes:
        source: An .npz file; a folder of images with captions (`cat.png` and `cat.txt`, or a
            metadata file); a metadata file; tar shards (`shards/{000..099}.tar`, `shards/*.tar`,
            or their folder); parquet files with images and captions, their pattern or folder;
            a folder that `datasets` wrote with `save_to_disk`; a prepared tensorflow-datasets
            folder, or the name of one in the folder `data_dir`; `scenes64` or `scenes256` for
            procedural scenes; or `hf://datasets/USER/NAME`, a data set of the Hugging Face
            Hub. Folders, shards and parquet files may be `gs://` addresses.
        mixture: Several sources with their weights, instead of `source`: with `images:3 more:1`
            three of four images are from the first. All other data options apply to each source.
        split: Part of the source: `train+test_concept` of an .npz file, `train[:90%]` of
            tensorflow-datasets, the split in the names of parquet files, or a subfolder with this
            name.
        data_dir: Folder of the tensorflow-datasets that `source` names.
        caption_templates: Templates of captions. One is chosen at random each time a record is
            seen. They can use `{caption}` and every other text field of the record; `{a_caption}`
            is the caption with "a" or "an".
        concepts: Keep only records with these concepts, in data that have them. Empty: keep all.
        styles: Keep only records with these styles, in data that have them. Empty: keep all.
        image_field: Field of a record that has the image, with `/` between nested keys. Empty: the
            usual names are tried.
        caption_field: Field of a record that has the caption, with `/` between nested keys, for
            example `captions/text`. Of several captions one is chosen at random each time. Empty:
            the usual names are tried.
        caption_lines: Captions of a text file. `choose`: each line is a caption, and one is chosen
            at random each time. `join`: all lines together are one caption.
        metadata: A .jsonl, .json, .csv, .tsv or .parquet file that lists the images of a folder and
            their captions. Empty: `metadata.jsonl`, `metadata.csv` and so on, if there is one.
        min_side: Leave out images whose shorter side has fewer pixels. 0: no limit.
        max_aspect: Leave out images whose aspect ratio (longer side / shorter side) is larger, 1 or
            more. 0: no limit.
        min_score: Leave out records with a lower score, or without one. None: no limit.
        score_field: Field of the score, with `/` between levels: of metadata files, parquet files,
            tensorflow-datasets, or the JSON beside an image.
        crop: How images become squares: `centre`, the central square; `random`, a square of random
            scale and position; or `window`, one of the training size at a random position, not
            scaled.
        min_crop: Smallest side of a random square, in (0, 1], as a share of the shorter side of the
            image. Larger values crop less. 0.8 is the value in the code of ADM (2105.05233).
        flip: Mirror half of the images, except those whose caption says left, right or clockwise.
        group_by: Text field, such as `concept`. Records with the same value follow each other in
            every pass. The images in a batch are then similar, which suits a noised CLIP. The
            fields of every record are read once at the start. Empty: no groups.
        on_device: Whether all images are kept in device memory. `yes`: always; the data must fit,
            and the crop must be `centre` or `window`. `auto`: on GPUs and TPUs, if the source is
            an .npz file that fits. `no`: a loader on the host makes the batches. The order and the
            random numbers are the same with each value.
        workers: Number of worker processes that read and decode. 0: one thread of the training
            process.
        threads: Batches that each process prepares in parallel, at least 1. More than 1 helps if
            the data are read over a network.
        prefetch: Batches that each process keeps ready, at least 1. More need more memory.
    """

    source: str = ""
    mixture: tuple[str, ...] = ()
    split: str = "train"
    data_dir: str = "~/tensorflow_datasets"
    caption_templates: tuple[str, ...] = ("{caption}",)
    concepts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    image_field: str = ""
    caption_field: str = ""
    caption_lines: str = "choose"
    metadata: str = ""
    min_side: int = 0
    max_aspect: float = 0.0
    min_score: float | None = None
    score_field: str = ""
    crop: str = "centre"
    min_crop: float = 0.8
    flip: bool = False
    group_by: str = ""
    on_device: str = "auto"
    workers: int = 0
    threads: int = 1
    prefetch: int = 2

    def __post_init__(self):
        check_finite(vars(self))
        if self.mixture:
            parse_mixture(self.mixture)
        if self.crop not in CROPS:
            hint = did_you_mean(self.crop, CROPS)
            raise UsageError(f"crop is {' or '.join(CROPS)}, not {self.crop!r}{hint}")
        if self.caption_lines not in CAPTION_LINES:
            hint = did_you_mean(self.caption_lines, CAPTION_LINES)
            raise UsageError(f"caption_lines is choose or join, not {self.caption_lines!r}{hint}")
        if self.on_device not in ON_DEVICE:
            raise UsageError(f"on_device is {' or '.join(ON_DEVICE)}, not {self.on_device!r}")
        if self.min_side < 0:
            raise UsageError(f"min_side is a number of pixels, at least 0, not {self.min_side}")
        if self.max_aspect != 0 and self.max_aspect < 1:
            raise UsageError(f"max_aspect is at least 1 (or 0 for none), not {self.max_aspect:g}")
        if (self.min_score is None) != (not self.score_field):
            raise UsageError("min_score and score_field belong together: give both, or neither")
        if not 0 < self.min_crop <= 1:
            raise UsageError(f"min_crop is a share, 0 < min_crop <= 1, not {self.min_crop}")
        if not self.caption_templates:
            raise UsageError("caption_templates needs a template, for example '{caption}'")
        if self.workers < 0 or self.threads < 1 or self.prefetch < 1:
            raise UsageError("workers must be at least 0, threads and prefetch at least 1")
