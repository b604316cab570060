"""Files that are whole and on the disk for good, whatever happens next: fsync, and replacement in one step."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file and bring it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file aside and put it in the place of the older one: a reader sees the one or the other, whole."""
    aside = path.with_name(f".{path.name}.tmp")
    write_text(aside, text)
    os.replace(aside, path)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, which makes new files and renamings in it last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring every file below `folder` to the disk, and every folder's list of names, `folder`'s own last."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))
