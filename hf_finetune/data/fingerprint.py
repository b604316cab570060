"""What identifies a split's content, and how large it is."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset

from hf_finetune.data.columns import column_values, gather, image_cells

WHOLE = 20_000
"""Images inside a table count by all their bytes up to so many rows, by their number of bytes beyond."""


def fingerprint(rows: Dataset) -> str:
    """Return a hash of the rows' labels and texts or images in their order, wherever they lie.

    An image file counts by its name and size, an image inside a table by its bytes (see `WHOLE`).
    """
    plain = [name for name in rows.column_names if name not in ("image", "row")]
    parts = [repr(column_values(rows, name)).encode() for name in plain]
    if "image" in rows.column_names:
        parts += [f"{name} {size}".encode() for name, size in image_sizes(rows)]
        if len(rows) <= WHOLE and _in_table(rows):
            contents = (cell["bytes"] for cell in image_cells(rows))
            parts += [hashlib.blake2b(content).digest() for content in contents if content]
    return digest(*parts)


def size_in_bytes(rows: Dataset) -> int:
    """Return the bytes of the rows' texts or encoded images."""
    if "image" in rows.column_names:
        return sum(size for _, size in image_sizes(rows))
    texts = [name for name in ("text", "text_pair") if name in rows.column_names]
    return sum(len(text.encode()) for name in texts for text in column_values(rows, name))


def image_sizes(rows: Dataset) -> list[tuple[str, int]]:
    """Return (file name, bytes) of every image, without reading those that lie in the table; 0 for a missing file."""
    cells = rows.data.column("image")
    paths = gather(rows, pc.struct_field(cells, "path"))
    sizes = gather(rows, pc.binary_length(pc.struct_field(cells, "bytes")))
    return [
        (os.path.basename(path or ""), _file_size(path) if size is None else size)
        for path, size in zip(paths, sizes, strict=True)
    ]


def digest(*parts: bytes) -> str:
    """Return a short hash of the parts, sensitive to where one ends and the next begins."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def _in_table(rows: Dataset) -> bool:
    contents: pa.ChunkedArray = pc.struct_field(rows.data.column("image"), "bytes")
    return bool(contents.null_count < len(contents))


def _file_size(path: Any) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else 0
