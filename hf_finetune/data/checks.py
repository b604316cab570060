"""Bad rows, found and named before training: images that do not open, texts that are empty."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from PIL import ExifTags, Image, ImageOps

from hf_finetune.errors import DataError, first_line

MAX_HEADERS = 20_000
"""Images of a split whose headers are read up front; of more, only a sample is, to keep nobody waiting."""
SHOWN = 5


class RowError(DataError):
    """One row turned out to be unusable when it was read.

    torch rebuilds a worker's exception from its printed traceback, whose last part alone is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("RowError: ", 1)[-1].strip())


def read_image(cell: Any, name: str) -> Image.Image:
    """Decode an image cell (`{"bytes", "path"}`) to upright RGB. Raises RowError about the row `name`."""
    try:
        with Image.open(_file(cell)) as image:
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return to_rgb(ImageOps.exif_transpose(image) if turned else image)
    except Exception as error:
        raise RowError(
            f"data: the image {name} cannot be decoded: {_reason(error)}. "
            "Repair or remove it, or set `data.on_error: skip` to leave such rows out."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as PIL does (transparency is dropped), but scale 16-bit grey (PIL clips)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):  # type: ignore[operator]
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same pixels; PIL warns about the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def check_images(cells: Iterable[Any], *, full: bool) -> tuple[dict[int, str], list[int]]:
    """Return ({position: what is wrong}, short sides in pixels of the good ones).

    Reads the headers only, or with `full` every pixel, in threads.
    """
    cells, results = iter(cells), list[str | int]()
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        # a few at a time, since the pool holds all it is given
        while chunk := list(islice(cells, 256)):
            results += pool.map(lambda cell: check_image(cell, full=full), chunk)
    problems = {position: result for position, result in enumerate(results) if isinstance(result, str)}
    return problems, [result for result in results if isinstance(result, int)]


def image_sizes(cells: Iterable[Any]) -> list[tuple[int, int]]:
    """Return (height, width) of every image by its header, before it is turned upright; (0, 0) where that fails."""
    cells, sizes = iter(cells), list[tuple[int, int]]()
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        while chunk := list(islice(cells, 256)):
            sizes += pool.map(_image_size, chunk)
    return sizes


def check_texts(columns: Iterable[list[Any]]) -> dict[int, str]:
    """Return {position: what is wrong} for texts that are missing or empty."""
    return {
        position: "empty text" if cell is not None else "no text"
        for column in columns
        for position, cell in enumerate(column)
        if cell is None or not str(cell).strip()
    }


def refuse(where: str, problems: Mapping[int, str], rows: int, name: Callable[[int], str]) -> None:
    """Raise DataError that lists `problems` by kind with the first rows of each, and the two ways out."""
    places: dict[str, list[int]] = {}
    for position in sorted(problems):
        places.setdefault(problems[position], []).append(position)
    lines = []
    for problem, positions in list(places.items())[:SHOWN]:
        more = f" and {len(positions) - SHOWN:,} more" if len(positions) > SHOWN else ""
        named = ", ".join(name(position) for position in positions[:SHOWN])
        lines.append(f"\n  - {problem}, {len(positions):,} row{'s'[: len(positions) > 1]}: {named}{more}")
    if len(places) > SHOWN:
        lines.append(f"\n  - and {len(places) - SHOWN:,} more kinds of problem")
    raise DataError(
        f"{where}: {len(problems):,} of {rows:,} rows cannot be used (rows are counted from "
        f"0):{''.join(lines)}\nRepair or remove them, or set `data.on_error: skip` to leave them out."
    )


def _file(cell: Any) -> Any:
    content, path = cell["bytes"], cell["path"]
    if content is None and path is None:
        raise ValueError("the cell is empty")
    return io.BytesIO(content) if content is not None else path


def check_image(cell: Any, *, full: bool) -> str | int:
    """Return what is wrong with an image cell, or its short side in pixels."""
    try:
        with Image.open(_file(cell)) as image:
            if full:
                image.load()
            return int(min(image.size))
    except Exception as error:
        return f"the image cannot be decoded ({_reason(error)})"


def _image_size(cell: Any) -> tuple[int, int]:
    try:
        with Image.open(_file(cell)) as image:
            return image.height, image.width
    except Exception:
        return 0, 0  # whoever reads its pixels says what is wrong


def _reason(error: Exception) -> str:
    """Return a decoder's complaint in a few words, without the row's name, which the caller says."""
    words = {"UnidentifiedImageError": "it is no image PIL knows", "FileNotFoundError": "the file is missing"}
    return words.get(type(error).__name__) or first_line(error)[:200].rstrip(".")
