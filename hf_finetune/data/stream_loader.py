"""From a stream to batches: rows travel undecoded with the keys, so that any number of workers decodes the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_finetune.augment.image import build_train_transform
from hf_finetune.augment.presets import check_modality
from hf_finetune.augment.rng import sample_generator, sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.augment.text import change_text
from hf_finetune.data.checks import read_image
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import MaxLength, Sample, TrainBatches, TrainSet, share
from hf_finetune.data.stream_splits import hold
from hf_finetune.data.streams import Row, Stream
from hf_finetune.data.tokens import encode, kept_tokens
from hf_finetune.models.backbone import ImageInput, TextInput

SHOWN_ROWS = 64
"""Rows of which a picture of the augmentations shows some."""


class StreamSet(TrainSet):
    """A stream with augmentation: `stream_set[pass, row]` is the same view in every process and run.

    Raises RecipeError for an augmentation of another modality.
    """

    def __init__(
        self,
        rows: Stream,
        labels: Labels,
        model_input: ImageInput | TextInput,
        augmentations: Sequence[AugmentationSpec] = (),
        *,
        seed: int = 0,
        max_length: MaxLength = "auto",
        on_device: bool = False,
    ) -> None:
        check_modality(augmentations, "image" if isinstance(model_input, ImageInput) else "text")
        self.stream, self.labels, self.input, self.on_device = rows, labels, model_input, on_device
        self.augmentations, self.seed, self.max_length = list(augmentations), seed, max_length
        self.tokens, self.targets, self.features, self.views, self.decoded = None, None, None, None, None
        self.transform = None
        if isinstance(model_input, ImageInput):
            self.transform = build_train_transform(self.augmentations, model_input, on_device=on_device)

    def __len__(self) -> int:
        return len(self.stream)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None}  # a worker is sent its rows

    def __getitem__(self, key: Any) -> Sample:
        epoch, row, weight = key
        kind = torch.long if self.labels.kind == "single" else torch.float32
        inputs, label = self._view(epoch, row), torch.tensor(row["label"], dtype=kind)
        return {"inputs": inputs, "label": label, "weight": weight, "index": row["row"]}

    def batches(self, *sizes: int | None) -> StreamBatches:
        """Return the batches of this stream; arguments as for `TrainBatches`."""
        return StreamBatches(self, *sizes)  # type: ignore[arg-type]

    def shown(self) -> TrainSet:
        """Return some of the rows as a set that is held, to look at."""
        held = hold(self.stream.take(SHOWN_ROWS), self.labels, "train")
        common: dict[str, Any] = {
            "seed": self.seed, "max_length": self.max_length, "on_device": self.on_device
        }  # fmt: skip
        return TrainSet(held, self.labels, self.input, self.augmentations, **common)

    def _view(self, epoch: int, row: Row) -> Sample:
        if isinstance(self.input, ImageInput):
            assert self.transform is not None, "images have one"
            image = read_image(row["image"], row["name"])
            with sample_rng(self.seed, epoch, row["row"]):
                return self.transform.inputs(self.transform.fixed(image))
        texts = [row[name] for name in ("text", "text_pair") if name in row]
        if self.augmentations:
            rng = sample_generator(self.seed, epoch, row["row"])
            texts = [change_text(text, self.augmentations, rng) for text in texts]
        kept = kept_tokens(self.input, self.max_length)
        encoded, _ = encode(self.input.tokenizer, kept, [[text] for text in texts])
        return {name: lists[0] for name, lists in encoded.items()}


class StreamBatches(TrainBatches):
    """This process's micro-batches of a stream: every process reads all rows and decodes its own."""

    dataset: StreamSet

    @property
    def steps_per_epoch(self) -> None:
        """A stream goes from pass to pass by itself."""
        return None

    def micro_batches(self) -> Iterator[tuple[int, list[tuple[list[Any], list[float]]]]]:
        """Yield for each global batch on its size and this process's micro-batches of keys, without an end."""
        steps_per_epoch = math.ceil(len(self.dataset) / self.batch_size)
        first = self.epoch * steps_per_epoch + self.start
        for number, rows in self.dataset.stream.batches(self.batch_size, first):
            parts = share(range(len(rows)), self.rank, self.world, self.micro_batch_size, self.pairs)
            yield (
                len(rows),
                [([(number, rows[place]) for place in places], weights) for places, weights in parts],
            )

    def keys(self, samples: list[Any], weights: list[float]) -> list[Any]:
        """Return what the set is asked for: (pass, row, weight)."""
        return [(number, row, weight) for (number, row), weight in zip(samples, weights, strict=True)]

    def __len__(self) -> int:
        raise TypeError("a stream has no length")
