"""A picture of what augmentation does: samples beside views of them, as the model receives them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from hf_finetune.augment.batch import mix, mixers
from hf_finetune.augment.device import OPERATIONS, finish
from hf_finetune.augment.image import build_eval_transform, denormalise
from hf_finetune.data.targets import soft_targets
from hf_finetune.models.backbone import ImageInput

if TYPE_CHECKING:
    from hf_finetune.data.loaders import TrainSet


def save_augment_grid(train_set: TrainSet, path: Path, *, samples: int = 8, views: int = 6) -> None:
    """Write a PNG of `samples` training rows, each next to its views of the first `views` epochs.

    Images are shown as the model receives them, mixed pairs included (rows 0 and 1, 2 and 3, …); of texts the
    words.
    """
    indices = _spread(train_set, samples)
    draw = _draw_images if isinstance(train_set.input, ImageInput) else _draw_texts
    figure = draw(train_set, indices, views)
    names = ", ".join(each.name for each in train_set.augmentations) or "no augmentation"
    figure.suptitle(names, fontsize=11)
    figure.savefig(path, dpi=100)


def _draw_images(train_set: TrainSet, indices: list[int], views: int) -> Figure:
    image_input = train_set.input
    assert isinstance(image_input, ImageInput)
    plain = build_eval_transform(image_input)
    originals = torch.stack([plain(train_set.rows[index]["image"]) for index in indices])
    targets = train_set.targets
    assert targets is not None
    targets = soft_targets(targets[indices], train_set.labels)
    columns = [("original", originals, targets)]
    mixing = mixers(train_set.augmentations)
    for epoch in range(views):
        pixels, mixed = _views(train_set, epoch, indices), targets
        if mixing:
            pixels, mixed = mix(pixels, targets, indices, mixing=mixing, seed=train_set.seed, epoch=epoch)
        columns.append((f"epoch {epoch + 1}", pixels, mixed))

    size = 1.6
    figure = Figure(figsize=(size * len(columns), (size + 0.2) * len(indices) + 0.7), layout="constrained")
    axes = figure.subplots(len(indices), len(columns), squeeze=False)
    for column, (heading, pixels, labels) in enumerate(columns):
        for row, image in enumerate(denormalise(pixels, image_input)):
            axis = axes[row, column]
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()
            title = _label_words(train_set, labels[row]) if column == 0 or mixing else ""
            axis.set_title(f"{heading}\n{title}".rstrip() if row == 0 else title, fontsize=8)
    return figure


def _views(train_set: TrainSet, epoch: int, indices: list[int]) -> torch.Tensor:
    samples = [train_set.view(epoch, index) for index in indices]
    inputs = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    pixels = inputs["pixel_values"]
    return finish(pixels, inputs[OPERATIONS]) if OPERATIONS in inputs else pixels


def _draw_texts(train_set: TrainSet, indices: list[int], views: int) -> Figure:
    lines = []
    for index in indices:
        row = train_set.rows[index]
        label = "" if train_set.targets is None else _label_words(train_set, train_set.targets[index])
        lines.append(
            f"[{label}]  " + "  ||  ".join(row[name] for name in ("text", "text_pair") if name in row)
        )
        lines += [
            f"    {epoch + 1}:  " + "  ||  ".join(train_set.words(epoch, index)) for epoch in range(views)
        ]
    text = "\n".join(
        textwrap.shorten(line, 150, placeholder=" …") if line[0] == "[" else line[:150] for line in lines
    )
    figure = Figure(figsize=(14, 0.17 * len(lines) + 0.7))
    figure.text(0.01, 1 - 0.5 / (0.17 * len(lines) + 0.7), text, family="monospace", fontsize=9, va="top")
    return figure


def _label_words(train_set: TrainSet, label: torch.Tensor) -> str:
    """Return a label as people read it: its name, several with their shares, or the number."""
    labels = train_set.labels
    if labels.kind == "regression":
        return f"{float(label):.3g}"
    if label.ndim == 0:
        return labels.names[int(label)]
    shares = [(name, float(value)) for name, value in zip(labels.names, label, strict=True) if value > 0.005]
    whole = all(value > 0.995 for _, value in shares)
    return ", ".join(name if whole else f"{value:.2f} {name}" for name, value in shares) or "no label"


def _spread(train_set: TrainSet, samples: int) -> list[int]:
    """Return the samples to show: of every class in turn, so that neighbours, which mixing pairs, differ."""
    count = min(samples, len(train_set))
    if train_set.labels.kind != "single" or train_set.targets is None:
        return np.linspace(0, len(train_set) - 1, count).round().astype(int).tolist()
    classes = train_set.targets.numpy()
    # a row's place within its class, then its class
    place = np.zeros(len(classes), dtype=int)
    for each in np.unique(classes):
        members = np.flatnonzero(classes == each)
        place[members] = np.arange(len(members))
    return np.lexsort((classes, place))[:count].tolist()
