"""From a path to raw splits: shipped sets, image folders, table files, `save_to_disk` folders, the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_finetune import shipped
from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import DataError, did_you_mean

FILE_BUILDERS: dict[str, tuple[str, dict[str, object]]] = {
    # an empty cell is a missing value; "NA", "None" and "null" are words somebody may have written
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
}
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
)
SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Role -> the names data sets use for it, the usual first."""


@dataclass(frozen=True)
class Source:
    """The raw splits of a data set as its own names call them."""

    name: str
    """Where the rows came from, for people."""
    splits: dict[str, Dataset]
    folder: Path | None = None
    """What relative image paths in a table are relative to."""
    notes: list[str] = field(default_factory=list)


def open_source(spec: DataSpec) -> Source:
    """Find and open what `data.path` names, without decoding images.

    Raises DataError when it does not exist, cannot be reached or cannot be read.
    """
    with _quiet():
        if isinstance(spec.path, list):
            return open_files([_existing(path) for path in spec.path])
        if spec.path.startswith("shipped/"):
            return Source(spec.path, dict(shipped.load_dataset(spec.path.removeprefix("shipped/"))))
        path = Path(spec.path).expanduser()
        if path.is_file():
            return open_files([path])
        if path.is_dir():
            return _open_folder(path)
        return _open_hub(spec)


def open_files(files: list[Path]) -> Source:
    """Open table files; files named after splits (train.csv, dev.csv, train-00000-of-00002.parquet) become them."""
    unknown = [file for file in files if file.suffix.lower() not in FILE_BUILDERS]
    if unknown:
        raise DataError(
            f"data '{unknown[0]}': a file of this kind cannot be read. "
            f"Allowed are {', '.join(FILE_BUILDERS)}, or a folder of images sorted into one folder per class."
        )
    stems = {file: re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", file.stem) or file.stem for file in files}
    known = {name for names in SPLIT_NAMES.values() for name in names}
    named = len(files) > 1 and (any(stem.lower() in known for stem in stems.values()))
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(stems[file] if named else "train", []).append(file)
    return Source(
        ", ".join(str(file) for file in files),
        {name: read_files(group) for name, group in groups.items()},
        folder=files[0].parent,
    )


def read_files(files: list[Path]) -> Dataset:
    """Read table files of one kind as one split. Raises DataError with the parser's complaint."""
    builder, options = FILE_BUILDERS[files[0].suffix.lower()]
    paths = [str(file.resolve()) for file in files]
    try:
        return datasets.load_dataset(builder, data_files={"train": paths}, split="train", **options)
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"data '{files[0]}': the file cannot be read as {builder}: {_first_line(cause)} "
            "Open it and repair that place; every row needs the same columns."
        ) from error


def _open_folder(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        return Source(
            str(path), dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}, folder=path
        )
    tables = [file for place in (path, path / "data") for file in _tables(place)]
    if any(file.stem == "metadata" for place in (path, *path.glob("*/")) for file in _tables(place)):
        loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
        return Source(str(path), dict(loaded), folder=path)
    if tables:
        return Source(str(path), open_files(tables).splits, folder=tables[0].parent)
    return _open_image_folder(path)


def _tables(place: Path) -> list[Path]:
    return (
        sorted(f for f in place.glob("*") if f.suffix.lower() in FILE_BUILDERS and f.is_file())
        if place.is_dir()
        else []
    )


def _open_image_folder(path: Path) -> Source:
    """Open root/<split>/<class>/… or root/<class>/… without reading a single image."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    roots = {folder.name: folder for folder in folders if folder.name.lower() in known} or {"train": path}
    found = {name: _images(root) for name, root in roots.items()}
    notes = [
        f"the folder '{root / name}' holds no image and is left out"
        for root, name in ((roots[split], name) for split, classes in found.items() for name in classes)
        if not found[next(split for split in roots if roots[split] == root)][name]
    ]
    names = sorted({name for classes in found.values() for name, files in classes.items() if files})
    if not names:
        inside = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"data '{path}': no data found there; the folder holds {inside}. "
            f"Expected is one folder of images per class (maybe inside train/ and val/), a folder from save_to_disk, "
            f"or files ending in {', '.join(FILE_BUILDERS)}."
        )
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    splits = {}
    for split, classes in found.items():
        rows = [(str(file), names.index(name)) for name, files in classes.items() for file in files]
        columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return Source(str(path), splits, folder=path, notes=notes)


def _images(root: Path) -> dict[str, list[Path]]:
    """Return class name -> sorted image files below root/<class>."""
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return {
        folder.name: sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        )
        for folder in classes
    }


def _open_hub(spec: DataSpec) -> Source:
    assert isinstance(spec.path, str)
    _refuse_missing_path(spec.path)
    try:
        loaded = datasets.load_dataset(spec.path, name=spec.config, revision=spec.revision)
    except Exception as error:
        raise DataError(_hub_message(spec, error)) from error
    revision = f" at {spec.revision}" if spec.revision else ""
    return Source(f"{spec.path}{revision} on the Hub", dict(loaded))


def _hub_message(spec: DataSpec, error: Exception) -> str:
    where = f"data '{spec.path}': "
    offline = isinstance(error, ConnectionError) or "OfflineMode" in str(error)
    if offline:
        return (
            f"{where}no file or folder of that name is here, and the Hub cannot be reached"
            f"{' (HF_HUB_OFFLINE is set)' if datasets.config.HF_HUB_OFFLINE else ''}. "
            "Check the path, or connect and try again; a set that was loaded once before is found in the cache."
        )
    if type(error).__name__ in ("DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"):
        at = f" with revision '{spec.revision}'" if spec.revision else ""
        return f"{where}the Hub has no data set of that name{at} that you may read. Check the spelling, or log in with `hf auth login`."
    return f"{where}it could not be loaded: {_first_line(error)}"


def _refuse_missing_path(path: str) -> None:
    looks_local = (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in FILE_BUILDERS
    )
    if looks_local:
        _existing(path)


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    if place.exists():
        return place
    siblings = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
    raise DataError(
        f"data '{path}': there is no such file or folder.{did_you_mean(place.name, siblings)} "
        "Give a path that exists, a Hub id (user/name) or shipped/…."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".") + "."


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars of `datasets`: the command line has its own."""
    was_on = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


__all__ = ["Source", "Value", "open_files", "open_source", "read_files"]
