"""The folder of features and decoded images as people see it: what is kept, what can go. Loads nothing heavy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Return the folder of everything kept between runs: HF_FINETUNE_CACHE, or the user's cache folder."""
    if own := os.environ.get("HF_FINETUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_finetune"


def features_folder() -> Path:
    """Return the folder that holds one folder for each key."""
    return cache_root() / "features"


@dataclass(frozen=True)
class Kept:
    """One folder of the cache, for people."""

    folder: Path
    size: int
    """Bytes on disk."""
    rows: int
    used: float
    """time.time() of its last use."""
    parts: dict[str, Any]
    """All that decided what they are."""

    @property
    def what(self) -> str:
        """Where the layers were cut and in which number format they computed, or that it is images."""
        if not self.parts:
            return "damaged"
        if "cut" not in self.parts:
            return "decoded images"
        return f"up to {self.parts['cut'][0]}, {self.parts['precision']}"


def kept() -> list[Kept]:
    """Return what the cache holds, what was used last first; what cannot be read counts as never used."""
    found = []
    for folder in _folders():
        size = 0
        try:
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            used = (folder / MANIFEST).stat().st_mtime
            found.append(Kept(folder, size, int(manifest["rows"]), used, dict(manifest["parts"])))
        except (OSError, ValueError, KeyError, TypeError):
            found.append(Kept(folder, size, 0, 0.0, {}))
    return sorted(found, key=lambda each: each.used, reverse=True)


def prune(keep: int) -> list[Kept]:
    """Remove what was used longest ago until `keep` bytes are left; return what was removed."""
    remove_abandoned()
    removed, total = [], 0
    for each in kept():
        total += each.size
        if total > keep and discard(each.folder.name):
            removed.append(each)
    return removed


def discard(key: str) -> bool:
    """Remove the features under a key, in one move: nobody finds them half removed. Return whether they went."""
    leaving = aside(key)
    try:
        (features_folder() / key).rename(leaving)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    remove(leaving)
    return True


def remove(folder: Path) -> None:
    """Remove a folder, whatever is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def aside(key: str) -> Path:
    """Return a folder that nobody takes for finished, marked with the process that writes it."""
    return features_folder() / f".{key}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def remove_abandoned() -> None:
    """Remove what processes of this machine that are no more have left half written."""
    if not features_folder().is_dir():
        return
    for folder in features_folder().glob(".*"):
        _, _, *host, pid, _ = folder.name.split(".") if folder.name.count(".") >= 4 else [""] * 5
        if pid.isdigit() and ".".join(host) == socket.gethostname() and not _is_alive(int(pid)):
            remove(folder)


def _folders() -> Iterator[Path]:
    root = features_folder()
    if root.is_dir():
        yield from (
            each for each in sorted(root.iterdir()) if each.is_dir() and not each.name.startswith(".")
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
