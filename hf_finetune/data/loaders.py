"""From splits to batches: samples as tensors, batches in an order that is a function of (seed, epoch), torch loaders.

Every batch is `{"inputs": {...}, "labels": Tensor, "weights": Tensor (N,), "indices": LongTensor (N,)}`; labels are class
numbers (N,), or floats (N, C) for multi-label, or floats (N,) for regression. A weight of 0 marks a
sample that only keeps a process in step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_finetune.augment.batch import mixers
from hf_finetune.augment.image import build_eval_transform, build_train_transform
from hf_finetune.augment.presets import check_modality
from hf_finetune.augment.rng import sample_generator, sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.augment.text import build_text_transform
from hf_finetune.data.labels import Labels
from hf_finetune.data.order import epoch_batches as epoch_batches
from hf_finetune.data.order import share as share
from hf_finetune.data.splits import column_values

if TYPE_CHECKING:
    from hf_finetune.models.backbone import ImageInput, TextInput

MAX_TEXT_LENGTH = 512
Batch = dict[str, Any]
Key = tuple[int, int] | tuple[int, int, float]
"""(epoch, index) or (epoch, index, weight)."""


class EvalSet(Dataset):
    """The rows of a split as the model is measured on them: `set[index]`."""

    def __init__(
        self,
        rows: Rows,
        labels: Labels,
        model_input: ImageInput | TextInput,
        *,
        max_length: int | str = "auto",
    ) -> None:
        self.rows, self.labels, self.input = rows, labels, model_input
        self.targets = _targets(rows, labels)
        self.tokens = None if "image" in rows.column_names else tokenise(rows, model_input, max_length)
        self.transform = None if self.tokens else build_eval_transform(model_input)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens per sample, None for images."""
        return self.tokens.lengths if self.tokens else None

    def __getitem__(self, index: int) -> Batch:
        inputs = (
            self.tokens[index] if self.tokens else {"pixel_values": self.transform(self.rows[index]["image"])}
        )
        return self._sample(inputs, index, 1.0, 0)

    def _sample(self, inputs: dict[str, Any], index: int, weight: float, epoch: int) -> Batch:
        label = None if self.targets is None else self.targets[index]
        return {"inputs": inputs, "label": label, "weight": weight, "index": index, "epoch": epoch}


class TrainSet(EvalSet):
    """The rows of a split with augmentation: `set[epoch, index]` is the same view in every process and on every visit."""

    def __init__(
        self,
        rows: Rows,
        labels: Labels,
        model_input: ImageInput | TextInput,
        augmentations: Sequence[AugmentationSpec] = (),
        *,
        seed: int = 0,
        max_length: int | str = "auto",
    ) -> None:
        super().__init__(rows, labels, model_input, max_length=max_length)
        self.seed, self.augmentations = seed, list(augmentations)
        check_modality(self.augmentations, "text" if self.tokens else "image")
        if self.tokens is None:
            self.transform = build_train_transform(self.augmentations, model_input)
        self.change_text = (
            build_text_transform(self.augmentations) if self.tokens and self.augmentations else None
        )

    def __getitem__(self, key: Any) -> Batch:
        epoch, index, weight = (*key, 1.0)[:3]
        if self.tokens is None:
            image = self.rows[index]["image"]
            with sample_rng(self.seed, epoch, index):
                inputs = {"pixel_values": self.transform(image)}
        elif self.change_text is None:
            inputs = self.tokens[index]
        else:
            rng = sample_generator(self.seed, epoch, index)
            row = self.rows[index]
            texts = [self.change_text(row[name], rng) for name in ("text", "text_pair") if name in row]
            inputs = self.tokens.encode(*([text] for text in texts))[0]
        return self._sample(inputs, index, weight, epoch)


class Tokens:
    """Tokenised texts without padding, kept flat so that a million of them fit in memory."""

    def __init__(self, tokenizer: Any, max_length: int, texts: Sequence[Sequence[str]]) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.flat: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        self.truncated = 0
        for start in range(0, len(texts[0]), 1000):
            encoded = self.encode(*(column[start : start + 1000] for column in texts))
            lengths += [len(each["input_ids"]) for each in encoded]
            for name in encoded[0]:
                parts = [np.asarray(each[name], dtype=np.int32) for each in encoded]
                self.flat.setdefault(name, []).append(np.concatenate(parts))
        self.lengths = np.asarray(lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.columns = {name: np.concatenate(parts) for name, parts in self.flat.items()}
        self.flat = {}

    def encode(self, *texts: Sequence[str]) -> list[dict[str, list[int]]]:
        """Tokenise texts (and their pairs), cut to `max_length`."""
        encoded = self.tokenizer(
            *map(list, texts), truncation=True, max_length=self.max_length, padding=False
        )
        return [{name: encoded[name][i] for name in encoded} for i in range(len(texts[0]))]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        part = slice(self.starts[index], self.starts[index + 1])
        return {name: column[part].tolist() for name, column in self.columns.items()}


def tokenise(rows: Rows, text_input: Any, max_length: int | str = "auto") -> Tokens:
    """Tokenise the texts of a split in one pass. `max_length` auto = what the backbone takes, at most 512 tokens."""
    limit = min(text_input.max_length, MAX_TEXT_LENGTH if max_length == "auto" else int(max_length))
    texts = [column_values(rows, name) for name in ("text", "text_pair") if name in rows.column_names]
    return Tokens(text_input.tokenizer, limit, texts)


def _targets(rows: Rows, labels: Labels) -> Tensor | None:
    if "label" not in rows.column_names:
        return None
    values = column_values(rows, "label")
    return torch.tensor(values, dtype=torch.long if labels.kind == "single" else torch.float32)


def collate(
    samples: Sequence[Batch],
    *,
    tokenizer: Any = None,
) -> Batch:
    """Return the batch of `samples`, texts padded to the longest."""
    batch: Batch = {
        "weights": torch.tensor([sample["weight"] for sample in samples]),
        "indices": torch.tensor([sample["index"] for sample in samples]),
    }
    if samples[0]["label"] is not None:
        batch["labels"] = torch.stack([sample["label"] for sample in samples])
    if tokenizer is not None:
        batch["inputs"] = dict(tokenizer.pad([sample["inputs"] for sample in samples], return_tensors="pt"))
        return batch
    batch["inputs"] = {"pixel_values": torch.stack([sample["inputs"]["pixel_values"] for sample in samples])}
    return batch


class TrainBatches(Sampler):
    """The micro-batches of one process for one epoch; set `epoch` and `start` (batches to pass over) before iterating."""

    def __init__(
        self, dataset: TrainSet, batch_size: int, micro_batch_size: int, rank: int, world: int, seed: int
    ) -> None:
        self.n, self.lengths, self.pairs = len(dataset), dataset.lengths, bool(mixers(dataset.augmentations))
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, so optimizer steps, of an epoch."""
        return -(-self.n // self.batch_size)

    def global_batches(self) -> list[list[int]]:
        """Return the epoch's global batches from `start` on."""
        return epoch_batches(self.n, self.batch_size, self.seed, self.epoch, self.lengths)[self.start :]

    def share_of(self, batch: list[int]) -> list[tuple[list[int], list[float]]]:
        """Return this process's micro-batches of a global batch."""
        return share(batch, self.rank, self.world, self.micro_batch_size, self.pairs)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.global_batches():
            for indices, weights in self.share_of(batch):
                yield [(self.epoch, index, weight) for index, weight in zip(indices, weights, strict=True)]


def train_loader(
    dataset: TrainSet,
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the one loader of a run; read it through `iterate_batches`.

    `batch_size` counts samples over all processes, `micro_batch_size` those of one forward pass (None = one pass).
    """
    micro = micro_batch_size or -(-batch_size // world)
    return DataLoader(
        dataset,
        batch_sampler=TrainBatches(dataset, batch_size, micro, rank, world, dataset.seed),
        collate_fn=_collate_for(dataset),
        **_worker_options(workers, pin_memory),
    )


def iterate_batches(loader: DataLoader, epoch: int, start: int = 0) -> Iterator[tuple[int, list[Batch]]]:
    """Yield the global batches of an epoch from batch `start` on: (its samples over all processes, this process's
    micro-batches)."""
    sampler = loader.batch_sampler
    assert isinstance(sampler, TrainBatches)
    sampler.epoch, sampler.start = epoch, start
    plan = [(len(batch), len(sampler.share_of(batch))) for batch in sampler.global_batches()]
    micro_batches = iter(loader)
    for size, count in plan:
        yield size, [next(micro_batches) for _ in range(count)]


def eval_loader(
    dataset: EvalSet,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the loader of this process's own slice of a split: no sample twice, none left out over all processes.

    Texts come sorted by length within the slice; `indices` says which row is which. A process may get no batch.
    """
    n = len(dataset)
    mine = np.arange(n * rank // world, n * (rank + 1) // world)
    if dataset.lengths is not None:
        mine = mine[np.argsort(dataset.lengths[mine], kind="stable")]
    batches = [mine[start : start + batch_size].tolist() for start in range(0, len(mine), batch_size)]
    options = _worker_options(workers, pin_memory)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_collate_for(dataset), **options)


def _collate_for(dataset: EvalSet) -> Callable[[Sequence[Batch]], Batch]:
    return partial(collate, tokenizer=dataset.tokens.tokenizer if dataset.tokens else None)


def _worker_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "persistent_workers": workers > 0,
        "worker_init_fn": _one_thread,
    }


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def worker_count(workers: int | str, modality: str, processes: int = 1) -> int:
    """Return the worker processes `data.workers` means: auto = none for texts, for images by the cores free."""
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if modality == "text" else min(8, max(0, cores // processes - 1))
