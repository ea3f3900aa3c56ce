"""Where captioned pictures come from, and how records become batches."""

from dataclasses import dataclass

from glide_jax.errors import UsageError, nearest

CROPS = ("centre", "random")


@dataclass(frozen=True)
class DataConfig:
    """Where captioned pictures come from, and how a picture and a caption are made of a record.

    Attributes:
        source: an .npz file; a folder of pictures with captions (`cat.png` and `cat.txt`, or a
            metadata file); tar shards (`shards/{000..099}.tar`, `shards/*.tar`, or their folder); a
            prepared tensorflow-datasets folder, or the name of one in `data_dir`; `scenes64` or
            `scenes256`, procedural scenes. Folders and shards may lie at a `gs://` address.
        split: of the source, where it has any: `train+test_concept` of an .npz file, `train[:90%]`
            of tensorflow-datasets, or the folder of that name in a folder.
        data_dir: where named data sets lie.
        captions: templates, one drawn at random each time a record is seen; `{caption}` and any
            other text field of the record, `{a_caption}` for the caption with "a" or "an".
        concepts, styles: keep only these (data sets that have such fields); empty: keep all.
        image_field, caption_field: where a record keeps them, `/` between levels
            (`captions/text`); empty: the usual names are tried. Several captions: one drawn at
            random each time.
        metadata: the JSON-lines, .csv or .tsv file of a folder; empty: `metadata.jsonl` or
            `metadata.csv` where there is one.
        crop: "centre", the middle square; "random", a square of random scale and place.
        min_crop: least side of a random square, as a share of the picture's shorter side (0.8
            in the code of ADM, 2105.05233).
        flip: mirror half of the pictures, but none whose caption says left, right or clockwise.
        group_by: a text field, such as "concept": in each pass, records that have it alike come one
            after the other. So a batch of a CLIP has pictures that only the rest of their captions
            tells apart. Empty: none; every record's texts are read once at the start.
        workers: worker processes that read and decode; 0: a thread of this process.
        threads: batches that a process makes at the same time; more than 1 where reading waits
            for a network.
        prefetch: batches that each process keeps ready.
    """

    source: str = ""
    split: str = "train"
    data_dir: str = "~/tensorflow_datasets"
    captions: tuple[str, ...] = ("{caption}",)
    concepts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    image_field: str = ""
    caption_field: str = ""
    metadata: str = ""
    crop: str = "centre"
    min_crop: float = 0.8
    flip: bool = False
    group_by: str = ""
    workers: int = 0
    threads: int = 1
    prefetch: int = 2

    def __post_init__(self):
        if self.crop not in CROPS:
            hint = nearest(self.crop, CROPS)
            raise UsageError(f"crop is {' or '.join(CROPS)}, not {self.crop!r}{hint}")
        if not 0 < self.min_crop <= 1:
            raise UsageError(f"min_crop is a share, 0 < min_crop <= 1, not {self.min_crop}")
        if not self.captions:
            raise UsageError("captions needs a template, for example '{caption}'")
        if self.workers < 0 or self.threads < 1 or self.prefetch < 1:
            raise UsageError("workers must be at least 0, threads and prefetch at least 1")
