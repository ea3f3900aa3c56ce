"""From the name of some data to a source of captioned pictures."""

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

# Procedural scenes by name, and the side of their pictures; so many are in a pass.
SCENES = {"scenes64": 64, "scenes256": 256}
SCENES_A_PASS = 1_000_000


def open_source(config: DataConfig) -> Source:
    """What `config.source` names: an .npz file, a folder, tar shards, a prepared data set, scenes.

    Raises:
        UsageError: nothing is named, or nothing is there; the message says how to get one.
        GlideError: what is there is broken.
    """
    if not config.source:
        raise UsageError(
            "this recipe names no data: add --data.source FOLDER (pictures, each with its caption "
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
    places = [name]
    if not storage.is_remote(name):
        # `coco_captions:1.1.0` is how tensorflow-datasets writes a version.
        places.append(storage.join(storage.expand(config.data_dir), name.replace(":", "/")))
    for folder in dict.fromkeys(places):
        if storage.is_folder(folder):
            return _folder(folder, config)
    raise UsageError(_missing(config.source, places[-1]))


def _folder(folder: str, config: DataConfig) -> Source:
    split = storage.join(folder, config.split)
    own = storage.is_folder(split)
    names = storage.find(split if own else folder)
    if version := newest_version(folder, names):
        return open_tfds(version, config)
    # Every recipe asks for "train", which a folder without parts is.
    if not own and config.split != DataConfig.split:
        raise UsageError(f"{folder} has no split {config.split!r}: there is no folder {split}")
    folder = split if own else folder
    if shards := [storage.join(folder, name) for name in names if name.endswith(".tar")]:
        source = open_webdataset(shards, config)
    else:
        source = open_folder(folder, names, config)
    return replace(source, label=f"{source.label}, {config.split}") if own else source


def _npz(path: str, config: DataConfig) -> Source:
    pictures = load_npz(
        path,
        config.split.split("+"),
        config.concepts or None,
        config.styles or None,
        caption=config.caption_field or "caption",
    )
    return Source(pictures, pictures.label, digest([pictures.indices.tobytes()]))


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
    scenes = ScenesSource(SCENES_A_PASS, size, config.split)
    return Source(scenes, f"{config.source}, {config.split}", digest([scenes.fingerprint]))


def _missing(name: str, last: str) -> str:
    if name == "emoji64":
        how = "`python -m glide_jax.data.emoji.npz --help` says how to make it"
    else:
        how = (
            "prepare it with tensorflow-datasets (file_format='array_record'), or name other data "
            "with --data.source: a folder of pictures with captions, or tar shards"
        )
    nor = f" (nor {last})" if last != name else ""
    return f"there is no data set {name}{nor}: {how}"
