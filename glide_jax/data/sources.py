"""`open_source`: from the name of a data set to a source of captioned images."""

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.emoji.npz import load_npz
from glide_jax.data.faults import Fault
from glide_jax.data.filters import filtered
from glide_jax.data.folder import open_folder
from glide_jax.data.hub_files import choose_split, saved_files, split_of
from glide_jax.data.mixture import mix, parse_mixture
from glide_jax.data.pairing import extension, pair
from glide_jax.data.parquet import is_listing, open_tables
from glide_jax.data.records import Source, digest
from glide_jax.data.row_groups import is_table_name
from glide_jax.data.scenes import SPLITS, ScenesSource
from glide_jax.data.sidecars import is_image
from glide_jax.data.tables import is_metadata
from glide_jax.data.tfds import newest_version, open_tfds
from glide_jax.data.tree import find
from glide_jax.data.webdataset import MANIFEST, is_packed_name, is_tar_name, open_webdataset
from glide_jax.errors import UsageError

# Procedural scenes by name, and the height and width of their images.
SCENES = {"scenes64": 64, "scenes256": 256}
SCENES_PER_PASS = 1_000_000
# Usual names of splits: `train`, `val2017`, `test_iid`. `train_station` is a class.
_SPLITS = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|(hold|held)[-_ ]?out)[-_ ]?\d*"
    r"|(val|valid|validation|dev|test|eval)[-_].+",
    re.IGNORECASE,
)


def open_source(config: DataConfig) -> Source:
    """Open what the settings name: .npz file, folder, shards, prepared data set, scenes, mixture.

    Raises:
        UsageError: no source is named, or it does not exist; the message says how to get one. Or
            the filters leave nothing.
        GlideError: the source is broken.
    """
    if config.mixture:
        weights = parse_mixture(config.mixture)
        opened = {n: open_source(replace(config, source=n, mixture=())) for n in weights}
        return mix(opened, list(weights.values()))
    return filtered(_open_unfiltered(config), config)


def _open_unfiltered(config: DataConfig) -> Source:
    """Open a source without filters."""
    if not config.source:
        raise UsageError(
            "this recipe names no data: add --data.source FOLDER (images, each with its caption "
            "in a .txt file beside it), tar shards, an .npz file, or a prepared tensorflow-datasets"
            " folder"
        )
    if config.source in SCENES:
        return _scenes(SCENES[config.source], config)
    name = storage.expand(config.source)
    if re.match(r"hf://(?!datasets/)", name):
        raise UsageError(f"{name} is no data set: write hf://datasets/USER/NAME")
    if storage.is_folder(name):
        return _folder(name, config)
    if name.endswith(".npz") and not storage.is_pattern(name):
        return _npz(name, config)
    if storage.is_pattern(name) or "::" in name or is_tar_name(name):
        return _files(name, config)
    if not storage.is_remote(name):
        # `coco_captions:1.1.0` is how tensorflow-datasets writes a version.
        prepared = storage.join(storage.expand(config.data_dir), name.replace(":", "/"))
        if storage.is_folder(prepared):
            return _folder(prepared, config)
    if storage.exists(name):
        return _file(name, config)
    raise UsageError(_missing(config.source, name if storage.is_remote(name) else prepared))


def _files(pattern: str, config: DataConfig) -> Source:
    """Open the tar, parquet or arrow files that a pattern or a name stands for."""
    paths = storage.matching(pattern)
    folders = {path for path in paths if os.path.isdir(path)}
    shards = [path for path in paths if is_tar_name(path) and path not in folders]
    others = [path for path in paths if not is_tar_name(path) or path in folders]
    if pattern.startswith("pipe:"):
        raise UsageError(f"{pattern} is a command, which is not run: name tar files")
    if not paths:
        raise UsageError(f"no file matches {pattern}")
    if len(others) == len(paths) and (tables := [p for p in others if is_table_name(p)]):
        unused = [Fault(path, "beside parquet files") for path in others if path not in tables]
        return _tables(pattern, tables, config, unused)
    if len(others) == len(paths):
        raise UsageError(
            f"{pattern} matches {paths[0]}, and no tar shards or parquet files: patterns are for "
            "shards; name the folder of images, or one .npz file"
        )
    return open_webdataset(shards, config, _not_of_shards(shards, others))


def _tables(
    pattern: str, paths: Sequence[str], config: DataConfig, unused: Sequence[Fault]
) -> Source:
    """Open the parquet files of a pattern; of several splits, those of the wanted one."""
    if len({split_of(path) for path in paths}) > 1:
        paths, others = choose_split(pattern, paths, config.split, DataConfig.split)
        unused = [*unused, *others]
    return open_tables(pattern, paths, config, unused)


def _file(path: str, config: DataConfig) -> Source:
    """Open a single file without a known ending: a metadata file, or a tar by content."""
    folder, _, name = path.rpartition("/")
    if is_table_name(name) and not is_listing(path):
        return open_tables(path, [path], config)
    if is_table_name(name) or extension(name) in ("jsonl", "ndjson", "json", "csv", "tsv"):
        folder = folder or "."
        tree = find(folder)
        return open_folder(folder, tree.names, replace(config, metadata=name), tree.unused)
    if is_packed_name(name):
        raise UsageError(f"{path} is an archive that is not read: unpack it, and name its folder")
    if storage.read_with(path, tarfile.is_tarfile):
        return open_webdataset([path], config)
    raise UsageError(
        f"{path} is not read: name a folder, tar shards, parquet files or an .npz file"
    )


def _not_of_shards(shards: Sequence[str], others: Sequence[str]) -> list[Fault]:
    """Return the files beside shards, apart from those that describe them: `0_stats.json`."""
    stems = tuple(path.rpartition(".")[0] for path in shards)
    others = [name for name in others if name.rpartition("/")[2] != MANIFEST]
    stray = [name for name in others if is_image(name) or not name.startswith(stems)]
    return [Fault(name, "beside tar shards") for name in stray]


def _folder(folder: str, config: DataConfig) -> Source:
    split = _split(folder, config)
    chosen = storage.join(folder, split) if split else folder
    names, unused = find(chosen)
    if (saved := saved_files(chosen, names, config.split)) is not None:
        paths = [storage.join(chosen, name) for name in saved]
        return open_tables(chosen, paths, config, unused)
    if tables := _table_files(chosen, names, config):
        # A folder that is a split already has no further ones.
        within = [split_of(name) for name in tables]
        wanted = config.split if not split or any(within) else DataConfig.split
        files, others = choose_split(chosen, tables, wanted, DataConfig.split)
        paths = [storage.join(chosen, name) for name in files]
        return open_tables(chosen, paths, config, [*others, *unused])
    if version := newest_version(folder, names):
        return open_tfds(version, config)
    # Every recipe asks for "train"; a folder without subfolders for splits is that.
    if not split and config.split != DataConfig.split:
        missing = storage.join(folder, config.split)
        raise UsageError(f"{folder} has no split {config.split!r}: there is no folder {missing}")
    if split:
        unused = [*unused, *_beside_splits(folder, split)]
    if split and (table := _table_above(folder, names, config)):
        split_names = [f"{split}/{name}" for name in names]
        listed = replace(config, metadata=table)
        source = open_folder(folder, split_names, listed, unused, within=f"{split}/")
    else:
        source = _open(chosen, names, config, unused)
    return replace(source, label=f"{source.label}, {config.split}") if split else source


def _table_files(folder: str, names: Sequence[str], config: DataConfig) -> list[str]:
    """Return the parquet and arrow files of a folder, if its images are in them."""
    if config.metadata or any(map(is_tar_name, names)):
        return []
    tables = [name for name in names if is_table_name(name)]
    data_tables = [name for name in tables if not is_metadata(name)] or tables
    if not data_tables or is_listing(storage.join(folder, data_tables[0])):
        return []
    others = [name for name in names if name not in data_tables]
    captioned = any(map(is_image, others)) and bool(pair(others).images)
    return [] if captioned or any(map(is_metadata, others)) else data_tables


def _table_above(folder: str, names: Sequence[str], config: DataConfig) -> str:
    """Return the metadata file beside the folders of splits, if the captions are there alone."""
    if config.metadata or any(is_metadata(name) or is_tar_name(name) for name in names):
        return ""
    tables = [name for name in storage.children(folder)[1] if is_metadata(name)]
    return tables[0] if len(tables) == 1 and not pair(names).images else ""


def _open(folder: str, names: list[str], config: DataConfig, unused: list[Fault]) -> Source:
    shards = [name for name in names if is_tar_name(name)]
    if not shards or config.metadata:
        return open_folder(folder, names, config, unused)
    stray = _not_of_shards(shards, [name for name in names if name not in set(shards)])
    paths = [storage.join(folder, name) for name in shards]
    return open_webdataset(paths, config, [*stray, *unused])


def _is_split(name: str) -> bool:
    return bool(_SPLITS.fullmatch(name))


def _split(folder: str, config: DataConfig) -> str:
    """Return the subfolder that is the split; empty if the folder is not divided into splits.

    A folder called `train` beside `plane` and `car` is a class. Beside `test` it is a split.

    Raises:
        UsageError: the folder has splits, but not that one; or the split's folder is a class.
    """
    wanted = config.split
    folders, files = storage.children(folder)
    # A folder of another case, `Train`, if there is no other like it.
    alike = [name for name in folders if name.casefold() == wanted.casefold()]
    split = wanted if wanted in folders else alike[0] if len(alike) == 1 else ""
    others = [name for name in folders if name != split]
    splits = [name for name in others if _is_split(name)]
    if not split:
        # A path, or a folder that was hidden from the list.
        if storage.is_folder(storage.join(folder, wanted)) and not alike:
            return wanted
        if len(splits) > 1 and len(splits) == len(others):
            raise UsageError(
                f"{folder} has the splits {', '.join(splits)}, and no {wanted!r}: "
                "choose with --data.split"
            )
        return ""
    loose = any(map(is_image, files))
    if not _is_split(split) or splits or not (others or loose):
        return split
    if wanted != DataConfig.split:
        beside = f"the folders beside {split} are no splits ({', '.join(others[:3])})"
        raise UsageError(
            f"{folder} has no split {wanted!r}: {beside if others else 'images lie beside it'}; to "
            f"train on that folder alone, add --data.source {storage.join(folder, split)}"
        )
    return ""


def _beside_splits(folder: str, split: str) -> list[Fault]:
    """Return the folders and images beside splits that belong to none of them."""
    folders, files = storage.children(folder)
    other_folders = [f"{name}/" for name in folders if name != split and not _is_split(name)]
    return [Fault(name, "beside the splits") for name in [*other_folders, *filter(is_image, files)]]


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
    if config.min_score is not None:
        raise UsageError("scenes have no scores: leave --data.min-score out")
    if config.concepts or config.styles:
        raise UsageError(
            "scenes have neither concepts nor styles: add --data.concepts --data.styles, both empty"
        )
    scenes = ScenesSource(SCENES_PER_PASS, size, config.split)
    return Source(scenes, f"{config.source}, {config.split}", digest([scenes.fingerprint]))


def _missing(name: str, last: str) -> str:
    if name == "emoji64":
        remedy = "`glide-jax data --help` says how to make it"
    elif name.startswith("hf://"):
        remedy = "check its name; for a private or gated one, log in first: hf auth login"
    else:
        remedy = (
            "prepare it with tensorflow-datasets (file_format='array_record'), or name other data "
            "with --data.source: a folder of images with captions, or tar shards"
        )
    nor = f" (nor {last})" if last != name else ""
    return f"there is no data set {name}{nor}: {remedy}"
