"""From a path to raw splits: shipped sets, image folders, table files, `save_to_disk` folders, the Hub."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, Image, Value
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi

from hf_finetune import shipped
from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import DataError, FinetuneError, HubError, did_you_mean, first_line
from hf_finetune.fetch import COMMIT, Wanted, from_the_hub, hub_folder, pin, refusal, verify

# an empty cell is a missing value; "NA", "None" and "null" are words that somebody may have written
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""File ending -> builder of `datasets` and its options."""
STREAMED_ROWS = 1_000
"""Rows of a parquet file that a stream decodes at once; left to itself `datasets` takes as many as the first row group
has, and fails where these are none."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
)
SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Role -> the names data sets use for it, the first one found counts."""
_KNOWN_SPLITS = frozenset(name for names in SPLIT_NAMES.values() for name in names)
_PART_NUMBER = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")


@dataclass(frozen=True)
class Source:
    """The raw splits of a data set, by its own names."""

    name: str
    """Where the rows come from, for people."""
    splits: dict[str, Any]
    """Name -> `Dataset`, or `IterableDataset` of what is streamed."""
    folder: Path | None = None
    """What relative image paths and file names are relative to."""
    notes: tuple[str, ...] = ()
    commit: str | None = None
    """Of a Hub data set: the commit that was read."""


def open_source(spec: DataSpec) -> Source:
    """Find and open what `data.path` names, without decoding an image.

    Raises DataError when it does not exist or cannot be read, HubError when the Hub does not answer and the cache
    does not hold it.
    """
    streaming = spec.streaming
    with quiet():
        if isinstance(spec.path, list):
            return open_files([_existing(path) for path in spec.path], streaming)
        if spec.path.startswith("shipped/"):
            return Source(spec.path, dict(shipped.load_dataset(spec.path.removeprefix("shipped/"))))
        path = Path(spec.path).expanduser()
        if path.is_file():
            return open_files([path], streaming)
        return open_folder(path, streaming) if path.is_dir() else _open_hub(spec)


def open_files(files: list[Path], streaming: bool = False) -> Source:
    """Open table files; several that are named like splits (train.csv, dev.csv) are the splits.

    Raises DataError for a kind of file that cannot be read, and for a file that is broken.
    """
    stems = {file: _PART_NUMBER.sub("", file.stem) for file in files}
    are_splits = len(files) > 1 and any(stem.lower() in _KNOWN_SPLITS for stem in stems.values())
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(stems[file] if are_splits else "train", []).append(file)
    name = ", ".join(str(file) for file in files)
    splits = {split: read_files(group, streaming) for split, group in groups.items()}
    return Source(name, splits, folder=files[0].parent)


def read_files(files: list[Path], streaming: bool = False) -> Any:
    """Read table files of one kind, one after the other. Raises DataError with the parser's complaint."""
    kinds = {file.suffix.lower(): file for file in files}
    for suffix, file in kinds.items():
        if suffix not in FILE_BUILDERS:
            raise DataError(
                f"data '{file}': a file of this kind cannot be read. Allowed are {', '.join(FILE_BUILDERS)}; "
                "images are given as the folder that holds one folder per class."
            )
    if len(kinds) > 1:
        raise DataError(
            f"data '{files[0].parent}': {' and '.join(file.name for file in kinds.values())} are of "
            "different kinds and could be the same rows twice. Name the file to read in data.path or "
            "data.train."
        )
    builder, options = FILE_BUILDERS[next(iter(kinds))]
    if streaming and builder == "parquet":
        options = {**options, "batch_size": STREAMED_ROWS}
    paths = [str(file.resolve()) for file in files]
    try:
        with quiet():
            return datasets.load_dataset(
                builder, data_files={"train": paths}, split="train", streaming=streaming, **options
            )
    except Exception as error:
        raise DataError(
            f"data '{', '.join(str(file) for file in files)}': it cannot be read as {builder}: "
            f"{_sentence(error.__cause__ or error)} Every row needs the same columns, in UTF-8; repair that place."
        ) from error


def open_folder(path: Path, streaming: bool = False) -> Source:
    """Open a folder: from `save_to_disk`, of table files (at the top or in data/), or of images.

    Raises DataError when it holds none of these.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(
                f"data '{path}': a folder from save_to_disk that cannot be read: {_sentence(error)} Save "
                "it again."
            ) from error
        splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
        return Source(str(path), splits, folder=path)
    if any(file.stem == "metadata" for place in (path, *path.glob("*/")) for file in _tables(place)):
        # images with a table beside them that says what they show: the layout of `datasets`' imagefolder
        return Source(str(path), dict(datasets.load_dataset("imagefolder", data_dir=str(path))), folder=path)
    for place in (path, path / "data"):
        if tables := _tables(place):
            return Source(str(path), open_files(tables, streaming).splits, folder=place)
    return _open_image_folder(path)


def _tables(place: Path) -> list[Path]:
    """Return the table files directly in `place`."""
    if not place.is_dir():
        return []
    return sorted(file for file in place.iterdir() if file.suffix.lower() in FILE_BUILDERS and file.is_file())


def _open_image_folder(path: Path) -> Source:
    """Open <split>/<class>/… or <class>/… by listing files: no image is read, nothing is copied."""
    folders = _subfolders(path)
    roots = {folder.name: folder for folder in folders if folder.name.lower() in _KNOWN_SPLITS} or {
        "train": path
    }
    splits, notes = {}, []
    for split, root in roots.items():
        images, labels = [], []
        for folder in _subfolders(root):
            found, others = _images(folder)
            images += found
            labels += [folder.name] * len(found)
            if others:
                notes.append(
                    f"{len(others):,} files in '{folder}' are left out: "
                    f"by their ending they are no images ({others[0]})"
                )
            elif not found:
                notes.append(f"the folder '{folder}' holds no image and is left out")
        if images:
            features = Features({"image": Image(decode=False), "label": Value("string")})
            splits[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    if not splits:
        inside = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"data '{path}': there is no data in this folder; it holds {inside}. Expected is one folder of "
            "images per class (these may lie in train/ and val/), a folder from save_to_disk, or files "
            f"ending in {', '.join(FILE_BUILDERS)}."
        )
    return Source(str(path), splits, folder=path, notes=tuple(notes))


def _subfolders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the image files anywhere below `folder`, and the names of the other files, sorted."""
    files = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and name != "Thumbs.db"
    ]
    images = sorted(file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)
    return images, sorted(
        {os.path.basename(file) for file in files} - {os.path.basename(file) for file in images}
    )


def _open_hub(spec: DataSpec) -> Source:
    path = str(spec.path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in FILE_BUILDERS:
        _existing(path)
    wanted = Wanted(f"data '{path}'", path, "dataset", spec.revision)
    name, notes = f"{path}@{spec.revision}" if spec.revision else path, list[str]()
    began = time.time()
    try:
        pinned = pin(wanted)
    except FinetuneError:
        # `datasets` may have prepared it from files that have left the Hub's cache since.
        if spec.revision or (found := _prepared(spec)) is None:
            raise
        notes.append(
            f"data '{path}': the Hub cannot be asked; taken from the cache, commit {found.name[:12]}"
        )
        return Source(name, _read_prepared(path, found), notes=tuple(notes), commit=found.name)
    if pinned.unreachable:
        if (found := _prepared(spec, pinned.commit)) is None:
            raise refusal(wanted, pinned.unreachable)
        notes.append(str(pinned.note))
        return Source(name, _read_prepared(path, found), notes=tuple(notes), commit=pinned.commit)
    if spec.streaming:
        try:
            streams: Any = datasets.load_dataset(path, spec.config, revision=pinned.commit, streaming=True)
        except Exception as error:
            raise _hub_problem(spec, wanted, error) from error
        return Source(name, dict(streams), notes=tuple(notes), commit=pinned.commit)
    if (
        found := _prepared(spec.model_copy(update={"config": spec.config or "default"}), pinned.commit)
    ) is not None:
        return Source(name, _read_prepared(path, found), commit=pinned.commit)
    try:
        builder = datasets.load_dataset_builder(path, name=spec.config, revision=pinned.commit)
        if builder.hash != pinned.commit:  # where the Hub falters, `datasets` takes whatever commit it has
            raise ConnectionError("the Hub stopped answering")
        builder.download_and_prepare()
        loaded: Any = builder.as_dataset()
        verify(wanted, hub_folder(wanted), since=began)
    except HubError:
        shutil.rmtree(builder.cache_dir, ignore_errors=True)
        raise
    except Exception as error:
        verify(wanted, hub_folder(wanted), since=began)
        if (found := _prepared(spec, pinned.commit)) is not None and from_the_hub(error):
            notes.append(
                f"data '{path}': the Hub stopped answering; taken from the cache, commit {found.name[:12]}"
            )
            return Source(name, _read_prepared(path, found), notes=tuple(notes), commit=pinned.commit)
        raise _hub_problem(spec, wanted, error) from error
    return Source(name, dict(loaded), notes=tuple(notes), commit=pinned.commit)


def _prepared(spec: DataSpec, commit: str = "*") -> Path | None:
    """Return the folder in which `datasets` keeps a Hub data set at a commit, the newest one for any; None without one.

    Raises DataError when it holds several configurations and none is named.
    """
    user, slash, name = str(spec.path).rpartition("/")
    home = (
        Path(datasets.config.HF_DATASETS_CACHE)
        / f"{user}{'___' if slash else ''}{camelcase_to_snakecase(name)}"
    )
    found = [
        folder
        for folder in home.glob(f"{spec.config or '*'}/*/{commit}")
        if COMMIT.fullmatch(folder.name) and (folder / "dataset_info.json").is_file()
    ]
    configs = sorted({folder.parts[-3] for folder in found})
    if spec.config is None and len(configs) > 1:
        raise DataError(
            f"data '{spec.path}': it needs a configuration. It has {configs}. Name one in data.config."
        )
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def _read_prepared(path: str, folder: Path) -> dict[str, Dataset]:
    builder = Cache(
        repo_id=path,
        dataset_name=path.rpartition("/")[2],
        config_name=folder.parts[-3],
        version=folder.parts[-2],
        hash=folder.name,
    )
    builder.download_and_prepare()
    loaded: Any = builder.as_dataset()
    return dict(loaded)


def _hub_problem(spec: DataSpec, wanted: Wanted, error: Exception) -> FinetuneError:
    path, text = wanted.id, str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        listed = re.search(r"\[.*?\]", text, flags=re.DOTALL)
        there = f" It has {listed[0]}." if listed else ""
        asked = (
            "it needs a configuration"
            if spec.config is None
            else f"there is no configuration '{spec.config}'"
        )
        return DataError(f"data '{path}': {asked}.{there} Name one in data.config.")
    if isinstance(error, datasets.exceptions.DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
        return DataError(
            f"data '{path}': this repository holds no file that `datasets` reads. Expected are parquet, csv, json or "
            "image files."
        )
    if "scripts are no longer supported" in text:
        return DataError(
            f"data '{path}': it comes as a script, which is not run. Take its parquet export, if it has one: "
            "`data.revision: refs/convert/parquet`."
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # it does not keep what the Hub said
        try:
            HfApi().auth_check(path, repo_type="dataset")
        except Exception as refused:
            return refusal(wanted, refused)
    if from_the_hub(error):
        return refusal(wanted, error)
    return DataError(f"data '{path}': it could not be loaded: {_sentence(error.__cause__ or error)}")


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    if place.exists():
        return place
    siblings = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
    raise DataError(
        f"data '{path}': there is no such file or folder.{did_you_mean(place.name, siblings)} "
        "Give a path that exists, a Hub id (user/name), or shipped/digits or shipped/reviews."
    )


def _sentence(error: BaseException) -> str:
    return first_line(error)[:300].rstrip(".") + "."


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the bars and log lines of `datasets`: what matters reaches the user as an error or a note."""
    were_on, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if were_on:
            datasets.enable_progress_bars()
