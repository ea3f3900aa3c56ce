"""`open_source`: from the name of a data set to a source of captioned images."""

from dataclasses import replace

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.emoji.npz import load_npz
from glide_jax.data.folder import open_folder
from glide_jax.data.records import Source, digest
from glide_jax.data.scenes import SPLITS, ScenesSource
from glide_jax.data.tfds import newest_version, open_tfds
from glide_jax.data.webdataset import open_webdataset
from glide_jax.errors import UsageError

# Procedural scenes by name, and the height and width of their images.
SCENES = {"scenes64": 64, "scenes256": 256}
SCENES_PER_PASS = 1_000_000


def open_source(config: DataConfig) -> Source:
    """Open what `config.source` names: .npz file, folder, tar shards, prepared data set, scenes.

    Raises:
        UsageError: no source is named, or it does not exist; the message says how to get one.
        GlideError: the source is broken.
    """
    if not config.source:
        raise UsageError(
            "this recipe names no data: add --data.source FOLDER (images, each with its caption "
            "in a .txt file beside it), tar shards, an .npz file, or a prepared tensorflow-datasets"
            " folder"
        )
    if config.source in SCENES:
        return _scenes(SCENES[config.source], config)
    name = storage.expand(config.source)
    if name.endswith(".npz"):
        return _npz(name, config)
    if ".tar" in name.rpartition("/")[2] or name.endswith(".tgz"):
        if paths := storage.matching(name):
            return open_webdataset(paths, config)
        raise UsageError(f"no file matches {name}")
    candidates = [name]
    if not storage.is_remote(name):
        # `coco_captions:1.1.0` is how tensorflow-datasets writes a version.
        candidates.append(storage.join(storage.expand(config.data_dir), name.replace(":", "/")))
    for folder in dict.fromkeys(candidates):
        if storage.is_folder(folder):
            return _folder(folder, config)
    raise UsageError(_missing(config.source, candidates[-1]))


def _folder(folder: str, config: DataConfig) -> Source:
    split = storage.join(folder, config.split)
    own = storage.is_folder(split)
    names = storage.find(split if own else folder)
    if version := newest_version(folder, names):
        return open_tfds(version, config)
    # Every recipe asks for "train"; a folder without subfolders for splits is that.
    if not own and config.split != DataConfig.split:
        raise UsageError(f"{folder} has no split {config.split!r}: there is no folder {split}")
    folder = split if own else folder
    if shards := [storage.join(folder, name) for name in names if name.endswith(".tar")]:
        source = open_webdataset(shards, config)
    else:
        source = open_folder(folder, names, config)
    return replace(source, label=f"{source.label}, {config.split}") if own else source


def _npz(path: str, config: DataConfig) -> Source:
    records = load_npz(
        path,
        config.split.split("+"),
        config.concepts or None,
        config.styles or None,
        caption=config.caption_field or "caption",
    )
    return Source(records, records.label, digest([records.indices.tobytes()]))


def _scenes(size: int, config: DataConfig) -> Source:
    if config.split not in SPLITS:
        raise UsageError(
            f"scenes have the splits {' and '.join(SPLITS)}, not {config.split!r}: "
            "add --data.split train"
        )
    if config.concepts or config.styles:
        raise UsageError(
            "scenes have neither concepts nor styles: add --data.concepts --data.styles, both empty"
        )
    scenes = ScenesSource(SCENES_PER_PASS, size, config.split)
    return Source(scenes, f"{config.source}, {config.split}", digest([scenes.fingerprint]))


def _missing(name: str, last: str) -> str:
    if name == "emoji64":
        how = "`glide-jax data --help` says how to make it"
    else:
        how = (
            "prepare it with tensorflow-datasets (file_format='array_record'), or name other data "
            "with --data.source: a folder of images with captions, or tar shards"
        )
    nor = f" (nor {last})" if last != name else ""
    return f"there is no data set {name}{nor}: {how}"
