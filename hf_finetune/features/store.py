"""Features and decoded images on disk: a folder for each key, written aside and renamed, mapped into memory when read.

Beside the tensors, one file each, lies `manifest.json`: what the key was made of, sizes and hashes. It is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_finetune.features.disk import MANIFEST, aside, features_folder, remove, remove_abandoned
from hf_finetune.spec import Size

FORMAT = 1
HASHED = 2 * 10**9
"""Bytes up to which files are read through when opened; beyond, their size and a few rows are compared."""
SPARE = 10**9
"""Bytes that stay free on the disk."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STORED = {**DTYPES, "uint8": torch.uint8, "int32": torch.int32}
_NAMES = {dtype: name for name, dtype in _STORED.items()}


class StoreError(Exception):
    """Features cannot be stored or read; the text says why."""


@dataclass(frozen=True)
class Column:
    """One tensor of every sample."""

    shape: tuple[int, ...]
    """Of one sample; without its first dimension, the tokens, where `ragged`."""
    dtype: torch.dtype
    ragged: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample, or of a token where `ragged`."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of everything that decides what features are."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def bytes_of(columns: Mapping[str, Column], ends: np.ndarray, rows: int) -> int:
    """Return what features of `rows` samples take on disk; `ends` are the running sums of their lengths."""
    entries = {True: int(ends[-1]) if len(ends) else 0, False: rows}
    return sum(column.row_bytes * entries[column.ragged] for column in columns.values())


@dataclass(frozen=True)
class Stored:
    """Features that can be read; call it with a row's number."""

    folder: Path
    columns: dict[str, Column]
    tensors: dict[str, Tensor]
    ends: np.ndarray

    def __call__(self, row: int) -> dict[str, Tensor]:
        """Return the features of one sample, by name."""
        found = {}
        for name, column in self.columns.items():
            if column.ragged:
                found[name] = self.tensors[name][int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]
            else:
                found[name] = self.tensors[name][row]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Send where the features lie to a worker that is not forked, not the features."""
        return _remapped, (self.folder, self.columns, self.ends)


def open_features(key: str) -> Stored | None:
    """Return the features under a key; None where there are none.

    Raises:
        StoreError: they are damaged.
    """
    folder = features_folder() / key
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():  # renamed as a whole, so somebody took it apart
            raise StoreError(f"{folder}: {MANIFEST} is missing") from None
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: {MANIFEST} cannot be read ({error})") from None
    try:
        return _mapped(folder, manifest)
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"{folder}: damaged ({type(error).__name__}: {error})") from None


def _mapped(folder: Path, manifest: dict[str, Any]) -> Stored:
    if manifest["format"] != FORMAT:
        raise StoreError(f"{folder}: of another version")
    columns = {}
    for number, (name, about) in enumerate(manifest["columns"].items()):
        columns[name] = Column(tuple(about["shape"]), _STORED[about["dtype"]], about["ragged"])
        path = folder / f"{number}.bin"
        if path.stat().st_size != about["bytes"] or (about["hash"] and _hash(path) != about["hash"]):
            raise StoreError(f"{folder}: {path.name} is damaged")
    ends = np.load(folder / "ends.npy") if manifest["has_ends"] else np.zeros(0, np.int64)
    with suppress(OSError):
        os.utime(folder / MANIFEST)  # what was used last is pruned last
    return _remapped(folder, columns, ends)


def _remapped(folder: Path, columns: dict[str, Column], ends: np.ndarray) -> Stored:
    """Map files that are known to be right."""
    tensors = {}
    for number, (name, column) in enumerate(columns.items()):
        path = folder / f"{number}.bin"
        entries = path.stat().st_size // column.dtype.itemsize
        flat = torch.from_file(str(path), shared=False, size=entries, dtype=column.dtype)
        tensors[name] = flat.view(-1, *column.shape)
    return Stored(folder, columns, tensors, ends)


class Writer:
    """Writes the features of a key; several processes may write rows of their own."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], ends: np.ndarray, rows: int) -> None:
        self.folder, self.columns, self.ends, self.rows = folder, dict(columns), ends, rows
        self._files: list[int] = []
        try:
            for number in range(len(self.columns)):
                self._files.append(os.open(folder / f"{number}.bin", os.O_WRONLY))
        except OSError as error:
            raise StoreError(f"not every process can write {folder.parent} ({error.strerror})") from None

    @staticmethod
    def reserve(key: str, columns: Mapping[str, Column], ends: np.ndarray, rows: int) -> Path:
        """Make the folder aside, with room for all rows; return it.

        Raises:
            StoreError: the disk has no room.
        """
        root = features_folder()
        needed = bytes_of(columns, ends, rows)
        folder = aside(key)
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned()
            if shutil.disk_usage(root).free < needed + SPARE:
                raise StoreError(f"the disk of {root} has no room for {Size(needed)}")
            folder.mkdir()
            for number, column in enumerate(columns.values()):
                entries = (int(ends[-1]) if len(ends) else 0) if column.ragged else rows
                with (folder / f"{number}.bin").open("wb") as file:
                    if entries and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, entries * column.row_bytes)
                    else:
                        file.truncate(entries * column.row_bytes)
            return folder
        except OSError as error:
            remove(folder)
            raise StoreError(f"{root} cannot be written ({error.strerror})") from None

    def write(self, rows: Sequence[int], features: Mapping[str, Tensor], pad_left: bool = False) -> None:
        """Write the features of these rows, one batch, padding left out.

        Raises:
            StoreError: the disk is full, or a value does not fit the number format.
        """
        for file, (name, column) in zip(self._files, self.columns.items(), strict=True):
            batch = features[name].detach().to("cpu")
            converted = batch.to(column.dtype)
            whole = not column.dtype.is_floating_point
            if not whole and not torch.isfinite(converted).all() and torch.isfinite(batch).all():
                raise StoreError(f"{_NAMES[column.dtype]} is too small for its values")
            for row, values in zip(rows, converted, strict=True):
                start = row
                if column.ragged:
                    start = int(self.ends[row - 1]) if row else 0
                    count = int(self.ends[row]) - start
                    values = values[len(values) - count :] if pad_left else values[:count]
                content = values.contiguous().flatten().view(torch.uint8).numpy().data
                try:
                    _write_all(file, content, start * column.row_bytes)
                except OSError as error:
                    raise StoreError(f"{self.folder.parent} cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Bring what this process has written to the disk.

        Raises:
            StoreError: it does not get there.
        """
        try:
            for file in self._files:
                os.fsync(file)
        except OSError as error:
            raise StoreError(f"{self.folder.parent} cannot be written ({error.strerror})") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files."""
        for file in self._files:
            os.close(file)
        self._files = []

    def finish(self, key: str, parts: Mapping[str, Any]) -> None:
        """Make the features valid, once every process has closed; what another run has finished meanwhile stays."""
        try:
            about = {name: self._about(number) for number, name in enumerate(self.columns)}
            if len(self.ends):
                with (self.folder / "ends.npy").open("wb") as lengths:
                    np.save(lengths, self.ends)
                    os.fsync(lengths.fileno())
            manifest = {"format": FORMAT, "rows": self.rows, "has_ends": bool(len(self.ends)), "columns": about,
                        "parts": dict(parts), "created": time.time()}  # fmt: skip
            with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            try:
                self.folder.rename(self.folder.parent / key)
            except OSError:
                if not (self.folder.parent / key / MANIFEST).is_file():
                    raise
                remove(self.folder)
        except OSError as error:
            raise StoreError(f"{self.folder.parent} cannot be written ({error.strerror})") from None

    def _about(self, number: int) -> dict[str, Any]:
        column, path = list(self.columns.values())[number], self.folder / f"{number}.bin"
        size = path.stat().st_size
        return {
            "shape": list(column.shape),
            "dtype": _NAMES[column.dtype],
            "ragged": column.ragged,
            "bytes": size,
            "hash": _hash(path) if size <= HASHED else None,
        }


def _write_all(file: int, content: memoryview, offset: int) -> None:
    while len(content):
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _hash(path: Path) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hashed.update(block)
    return hashed.hexdigest()
