"""Bad rows, found and named before training: images that do not open, empty texts, labels that are missing or unknown."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from hf_finetune.errors import DataError

MAX_HEADERS = 20_000
"""Images of a split whose headers are read up front; reading more would keep the user waiting."""
SHOWN = 5


class RowError(DataError):
    """One row turned out to be unusable when it was read.

    torch rebuilds a worker's exception from its printed traceback; only the last part of that is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("RowError: ", 1)[-1].strip())


def read_image(cell: Any, name: str) -> Image.Image:
    """Decode an image cell (`{"bytes", "path"}` or a PIL image) to upright RGB. Raises RowError naming the row."""
    try:
        image = cell if isinstance(cell, Image.Image) else Image.open(_opened(cell))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise RowError(
            f"data: the image {name} cannot be decoded: {reason(error)} "
            "Repair or remove it, or set `data.on_error: skip` to leave such rows out."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as PIL does (transparency is dropped), with 16-bit grey scaled and not clipped."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_images(cells: list[Any], *, full: bool) -> tuple[dict[int, str], list[int]]:
    """Return ({position: what is wrong}, short sides in pixels), reading headers only, or with `full` every pixel."""
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        results = list(pool.map(lambda cell: _check_image(cell, full), cells))
    problems = {position: result for position, result in enumerate(results) if isinstance(result, str)}
    return problems, [result for result in results if isinstance(result, int)]


def check_texts(columns: list[list[Any]]) -> dict[int, str]:
    """Return {position: what is wrong} for texts that are missing or empty."""
    return {
        position: "empty text" if cell is not None else "no text"
        for column in columns
        for position, cell in enumerate(column)
        if cell is None or not str(cell).strip()
    }


def refuse(where: str, problems: list[str], rows: int) -> None:
    """Raise DataError that shows the first of `problems` and the two ways out."""
    shown = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
    more = f"\n  - and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    verb = "row" if len(problems) == 1 else "rows"
    raise DataError(
        f"{where}: {len(problems):,} of {rows:,} {verb} cannot be used:{shown}{more}\n"
        "Repair or remove them, or set `data.on_error: skip` to leave them out."
    )


def reason(error: Exception) -> str:
    """Return a decoder's complaint in one short sentence."""
    words = {"UnidentifiedImageError": "it is no image PIL knows", "FileNotFoundError": "the file is missing"}
    text = words.get(type(error).__name__) or (str(error).splitlines() or [type(error).__name__])[0]
    return text[:200].rstrip(".") + "."


def _opened(cell: Any) -> Any:
    if cell is None or (cell.get("bytes") is None and cell.get("path") is None):
        raise ValueError("the cell is empty")
    return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else Path(cell["path"])


def _check_image(cell: Any, full: bool) -> str | int:
    try:
        with Image.open(_opened(cell)) as image:
            if full:
                image.load()
            return int(min(image.size))
    except Exception as error:
        return f"the image cannot be decoded: {reason(error)}"
