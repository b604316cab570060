"""The data of a benchmark as a folder that every tool reads: given, a part of it, one that is shipped, or generated."""

from __future__ import annotations

import colorsys
import csv
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = (500, 375)
"""Width and height of a generated image: the usual one of ImageNet and of photos on the web."""
QUALITY = 90
SHAPES = ("circle", "square", "triangle", "bar")
"""The classes of generated images."""


def data_folder(data: str, rows: int | None, folder: Path) -> Path:
    """Return the folder of `data`, with `rows` rows evenly taken from each split; `folder` for what must be written.

    Args:
        data: an image folder, a folder with train.csv and dev.csv, or `shipped/…`.
    """
    given = _written_out(data, folder / "shipped") if data.startswith("shipped/") else Path(data).resolve()
    if rows is None:
        return given
    return (
        _part_of_table(given, rows, folder)
        if (given / "train.csv").is_file()
        else _part_of_images(given, rows, folder)
    )


def held_out(root: Path) -> str:
    """Return what the folder of the validation images is called."""
    return next(name for name in ("val", "validation") if (root / name).is_dir())


def generate_images(count: int, seed: int, folder: Path) -> Path:
    """Write `count` training JPEGs and a quarter as many to be measured on, one folder per class."""
    for split in ("train", "val"):
        for shape in SHAPES:
            (folder / split / shape).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        write = partial(_write_image, seed=seed, count=count, folder=folder)
        list(pool.map(write, range(count + max(len(SHAPES), count // 4)), chunksize=8))
    return folder


def _write_image(number: int, *, seed: int, count: int, folder: Path) -> None:
    shape = SHAPES[number % len(SHAPES)]
    path = folder / ("train" if number < count else "val") / shape / f"{number:06}.jpg"
    draw_image(seed, number).save(path, quality=QUALITY)


def draw_image(seed: int, number: int) -> Image:
    """Return picture `number`: clouds with as much detail as a photo, and shapes of one kind and hue.

    The detail falls with its frequency as in photos (power 1/f^2), so that a decoder has a photo's work to do.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    rng, (width, height) = np.random.default_rng((seed, number)), SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean
    grey, *tints = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, s=(height, width))
        for _ in range(4)
    )
    clouds = np.stack([grey / grey.std() + 0.3 * tint / tint.std() for tint in tints], axis=-1)
    slope = np.linspace(-1, 1, height)[:, None, None] * rng.normal(size=3)
    light = 128 + 45 * clouds + 25 * slope
    image = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    kind = number % len(SHAPES)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 5))):
        hue = kind / len(SHAPES) + float(rng.uniform(-0.05, 0.05))
        colour = tuple(
            int(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, 0.8, float(rng.uniform(0.5, 1)))
        )
        radius = int(rng.integers(25, 90))
        x, y = int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius))
        box = (x - radius, y - radius, x + radius, y + radius)
        if SHAPES[kind] == "circle":
            draw.ellipse(box, fill=colour)
        elif SHAPES[kind] == "square":
            draw.rectangle(box, fill=colour)
        elif SHAPES[kind] == "triangle":
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        else:
            draw.rectangle((x - radius, y - radius // 4, x + radius, y + radius // 4), fill=colour)
    return image


def random_weights(architecture: str, seed: int, folder: Path) -> Path:
    """Write a timm architecture with random weights to `folder`, in Hub layout: the same start for every tool."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model(architecture.removeprefix("timm/"), pretrained=False)
    save_for_hf(model, str(folder), safe_serialization=True)
    # transformers' timm wrapper passes `num_classes` itself and fails on a second one.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _written_out(name: str, folder: Path) -> Path:
    """Write a shipped data set as a folder of images, or of train.csv and dev.csv."""
    from hf_finetune import shipped

    splits: Any = shipped.load_dataset(name.removeprefix("shipped/"))
    for split, called in (("train", "train"), ("validation", "val")):
        rows = splits[split]
        names = rows.features["label"].names
        if "image" in rows.column_names:
            for number, row in enumerate(rows):
                place = folder / called / names[row["label"]]
                place.mkdir(parents=True, exist_ok=True)
                row["image"].save(place / f"{number:06}.png")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            table = [["text", "label"], *([row["text"], row["label"]] for row in rows)]
            _write_table(folder / ("train.csv" if split == "train" else "dev.csv"), table)
    return folder


def _part_of_table(given: Path, rows: int, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.csv", "dev.csv"):
        with (given / name).open(encoding="utf-8", newline="") as file:
            header, *table = csv.reader(file)
        _write_table(folder / name, [header, *_evenly(table, rows)])
    return folder


def _part_of_images(given: Path, rows: int, folder: Path) -> Path:
    for split in ("train", held_out(given)):
        for path in _evenly(sorted(path for path in (given / split).glob("*/*") if path.is_file()), rows):
            place = folder / split / path.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / path.name).symlink_to(path)
    return folder


def _evenly(rows: list[Any], count: int) -> list[Any]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _write_table(path: Path, table: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table)
