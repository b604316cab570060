"""From splits to batches: samples as tensors, in an order that is a function of (seed, epoch).

A batch is `{"inputs": {…}, "labels": Tensor, "weights": Tensor (N,), "indices": LongTensor (N,)}`. Labels are
class numbers (N,), multi-hot floats (N, C) or floats (N,). A weight of 0 marks a sample that only keeps a
process in step.
"""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets import Dataset as Rows
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_finetune.augment.batch import mixers
from hf_finetune.augment.image import ImageTransform, build_eval_transform, build_train_transform
from hf_finetune.augment.presets import check_modality
from hf_finetune.augment.rng import sample_generator, sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.augment.text import change_text
from hf_finetune.data.columns import column_values
from hf_finetune.data.labels import Labels
from hf_finetune.data.order import cut_by_tokens, share_by_tokens
from hf_finetune.data.order import epoch_batches as epoch_batches
from hf_finetune.data.order import share as share
from hf_finetune.data.tokens import Tokens, encode
from hf_finetune.host import drop_freed_memory
from hf_finetune.models.backbone import FEATURES, ImageInput, TextInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MaxLength = int | Literal["auto"]
Sample = dict[str, Any]
Batch = dict[str, Any]
Key = tuple[int, int] | tuple[int, int, float]
"""(epoch, index) of a sample, maybe with its weight."""
Features = Callable[[int], dict[str, Tensor]]
"""Row of a set (or view times its size, plus row) -> what a frozen prefix made of it: for pixels, or beside tokens."""


class EvalSet(Dataset):
    """A split as the model is measured on it: `eval_set[index]`.

    With `on_device` the images of a batch are uint8, and `evaluation.to_device` makes them what the model reads.
    """

    def __init__(
        self,
        rows: Rows,
        labels: Labels,
        model_input: ImageInput | TextInput,
        *,
        max_length: MaxLength = "auto",
        on_device: bool = False,
    ) -> None:
        self.rows, self.labels, self.input, self.on_device = rows, labels, model_input, on_device
        self.tokens: Tokens | None = None
        self.transform: ImageTransform | None = None
        """For images."""
        if isinstance(model_input, ImageInput):
            self.transform = build_eval_transform(model_input, on_device=on_device)
        else:
            texts = [column_values(rows, name) for name in ("text", "text_pair") if name in rows.column_names]
            self.tokens = Tokens(texts, model_input, max_length)
        self.targets = targets_of(rows, labels)
        self.features: Features | None = None
        self.decoded: Callable[[int], Image.Image] | None = None
        """What `transform.fixed` makes of a row's image, from where it is kept."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What pads the samples; None for images."""
        return self.input.tokenizer if isinstance(self.input, TextInput) else None

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens per sample; None for images."""
        return None if self.tokens is None else self.tokens.lengths

    @property
    def notes(self) -> list[str]:
        """What the user should know about the samples: the share of texts that were cut."""
        if self.tokens is None or not self.tokens.cut_share:
            return []
        return [
            f"{self.tokens.cut_share:.1%} of the texts are longer than {self.tokens.max_length} tokens and "
            "are cut"
        ]

    def inputs(self, index: int) -> Sample:
        """Return the model's inputs for one row, unpadded."""
        stored = self.features(index) if self.features else {}
        if self.tokens is not None:
            return self.tokens[index] | stored
        return stored or self.pixels(index)

    def fixed(self, index: int) -> Image.Image:
        """Return a row's image as far as every view of it is the same."""
        assert self.transform is not None, "texts have no image"
        return self.transform.fixed(self.rows[index]["image"])

    def pixels(self, index: int) -> Sample:
        """Return the model's inputs for the image of a row."""
        assert self.transform is not None, "texts have no image"
        image = self.decoded(index) if self.decoded else self.fixed(index)
        return self.transform.inputs(image)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, self.inputs(index))

    def sample(self, index: int, inputs: Sample, weight: float = 1.0) -> Sample:
        """Return a row's inputs with its label, weight and index."""
        label = None if self.targets is None else self.targets[index]
        return {"inputs": inputs, "label": label, "weight": weight, "index": index}


class TrainSet(EvalSet):
    """A split with augmentation: `train_set[epoch, index]` is the same view in every process and run.

    Raises RecipeError for an augmentation of another modality. Mixing (`mixup`, `cutmix`) is the loop's
    business.
    """

    def __init__(
        self,
        rows: Rows,
        labels: Labels,
        model_input: ImageInput | TextInput,
        augmentations: Sequence[AugmentationSpec] = (),
        *,
        seed: int = 0,
        max_length: MaxLength = "auto",
        shrink: bool = False,
        on_device: bool = False,
    ) -> None:
        check_modality(augmentations, "image" if isinstance(model_input, ImageInput) else "text")
        super().__init__(rows, labels, model_input, max_length=max_length, on_device=on_device)
        self.augmentations, self.seed = list(augmentations), seed
        self.views: int | None = None
        """Views of each row that `features` holds."""
        if isinstance(model_input, ImageInput):
            self.transform = build_train_transform(
                self.augmentations, model_input, shrink=shrink, on_device=on_device
            )

    def unchanged(self) -> TrainSet:
        """Return the same rows as the model is measured on them: without augmentation."""
        plain = copy.copy(self)
        plain.augmentations = []
        if isinstance(self.input, ImageInput):
            plain.transform = build_train_transform([], self.input, on_device=self.on_device)
        return plain

    def __getitem__(self, key: Any) -> Sample:
        epoch, index, weight = (*key, 1.0)[:3]
        return self.sample(index, self.view(epoch, index), weight)

    def batches(self, *sizes: int | None) -> TrainBatches:
        """Return the batches of this set; arguments as for `TrainBatches`."""
        return TrainBatches(self, *sizes)  # type: ignore[arg-type]

    def shown(self) -> TrainSet:
        """Return a set whose rows can be looked at in any order."""
        return self

    def view(self, epoch: int, index: int) -> Sample:
        """Return the model's inputs for one row as this epoch shows it."""
        if self.features and self.views:
            epoch %= self.views
        stored = self.features(epoch * len(self) + index) if self.features else {}
        if stored and self.tokens is None:
            return stored
        return self.read(epoch, index) | stored

    def read(self, epoch: int, index: int) -> Sample:
        """Return a view of a row itself, whatever `features` holds."""
        if self.tokens is None:
            with sample_rng(self.seed, epoch, index):
                return self.pixels(index)
        if not self.augmentations:
            return self.tokens[index]
        changed = [[text] for text in self.words(epoch, index)]
        encoded, _ = encode(self.tokens.tokenizer, self.tokens.max_length, changed)
        return {name: lists[0] for name, lists in encoded.items()}

    def words(self, epoch: int, index: int) -> list[str]:
        """Return a row's text, or its pair, as this epoch shows it."""
        row, rng = self.rows[index], sample_generator(self.seed, epoch, index)
        return [
            change_text(row[name], self.augmentations, rng) for name in ("text", "text_pair") if name in row
        ]


def targets_of(rows: Rows, labels: Labels) -> Tensor | None:
    """Return the labels of a split as one tensor, or None when it has none."""
    if "label" not in rows.column_names:
        return None
    return torch.tensor(
        column_values(rows, "label"), dtype=torch.long if labels.kind == "single" else torch.float32
    )


def collate(samples: Sequence[Sample], *, tokenizer: PreTrainedTokenizerBase | None = None) -> Batch:
    """Return the batch of `samples`; texts are padded to the longest of them."""
    inputs = [sample["inputs"] for sample in samples]
    if tokenizer is None:
        batched = {name: torch.stack([each[name] for each in inputs]) for name in inputs[0]}
    else:
        stored = {name: [each[name] for each in inputs] for name in inputs[0] if name.startswith(FEATURES)}
        tokens = [{name: each[name] for name in each if name not in stored} for each in inputs]
        batched = dict(tokenizer.pad(tokens, return_tensors="pt"))
        side = tokenizer.padding_side
        batched |= {name: pad_sequence(rows, True, padding_side=side) for name, rows in stored.items()}
    batch: Batch = {
        "inputs": batched,
        "weights": torch.tensor([sample["weight"] for sample in samples]),
        "indices": torch.tensor([sample["index"] for sample in samples]),
    }
    if samples[0]["label"] is not None:
        batch["labels"] = torch.stack([sample["label"] for sample in samples])
    return batch


class TrainBatches(Sampler):
    """This process's micro-batches of an epoch; set `epoch` and `start` (batches to pass over) first."""

    def __init__(
        self,
        dataset: TrainSet,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        tokens: int | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.micro_batch_size = dataset, batch_size, micro_batch_size
        self.rank, self.world, self.tokens = rank, world, tokens
        self.pairs = bool(mixers(dataset.augmentations))
        self.epoch, self.start = 0, 0
        self.planned: deque[tuple[int, int]] = deque()
        """(size, micro-batches) of the global batches the loader has asked for and `iterate_batches` not yet."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Global batches in an epoch; None where one pass follows the other without an end."""
        return -(-len(self.dataset) // self.batch_size)

    def micro_batches(self) -> Iterator[tuple[int, list[tuple[list[Any], list[float]]]]]:
        """Yield for each global batch from `start` on its size and this process's micro-batches."""
        data = self.dataset
        batches = epoch_batches(len(data), self.batch_size, data.seed, self.epoch, data.lengths)
        place = self.rank, self.world, self.micro_batch_size
        for batch in batches[self.start :]:
            if self.tokens is None or data.lengths is None:
                yield len(batch), share(batch, *place, self.pairs)
            else:
                yield len(batch), share_by_tokens(batch, *place, data.lengths, self.tokens)

    def __iter__(self) -> Iterator[list[Any]]:
        # The key carries the epoch: workers that live on from an earlier epoch have no other way to know it.
        self.planned.clear()
        for size, micro_batches in self.micro_batches():
            self.planned.append((size, len(micro_batches)))
            for samples, weights in micro_batches:
                yield self.keys(samples, weights)

    def keys(self, samples: list[Any], weights: list[float]) -> list[Any]:
        """Return what the set is asked for: (epoch, index, weight)."""
        return [(self.epoch, index, weight) for index, weight in zip(samples, weights, strict=True)]

    def __len__(self) -> int:
        return sum(len(micro_batches) for _, micro_batches in self.micro_batches())


def train_loader(
    dataset: TrainSet,
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the one loader of a run, to be read through `iterate_batches`.

    `batch_size` counts samples per optimizer step over all processes, `micro_batch_size` those of one forward
    pass of this process (None = its whole share), `micro_batch_tokens` the tokens of its texts, padding included.
    """
    micro_batch_size = micro_batch_size or -(-batch_size // world)
    batches = dataset.batches(batch_size, micro_batch_size, rank, world, micro_batch_tokens)
    return DataLoader(dataset, batch_sampler=batches, **_options(dataset, workers, pin_memory))


def iterate_batches(loader: DataLoader, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
    """Return an epoch's global batches from batch `start` on, each as this process's micro-batches.

    Workers begin at once. A micro-batch also carries `"batch_size"`, the size of the global batch: what a sum over
    samples is divided by.
    """
    batches = loader.batch_sampler
    assert isinstance(batches, TrainBatches), "only what train_loader returns knows epochs"
    batches.epoch, batches.start = epoch, start
    return _joined(iter(loader), batches.planned)


def _joined(stream: Iterator[Batch], planned: deque[tuple[int, int]]) -> Iterator[list[Batch]]:
    while micro_batches := list(islice(stream, 1)):
        size, number = planned.popleft()
        micro_batches += islice(stream, number - 1)
        for batch in micro_batches:
            batch["batch_size"] = size
        yield micro_batches  # no other reference to the samples: who has used them can let them go


def iterate_epochs(loader: DataLoader, epoch: int, start: int, steps: int) -> Iterator[list[Batch]]:
    """Yield what `iterate_batches` returns, epoch after epoch, up to the end of the one in which `steps` are reached.

    Workers begin with an epoch as soon as the last batch of the one before is out: they work on while that is trained
    on and while the model is measured. A stream goes from pass to pass by itself.
    """
    sampler = loader.batch_sampler
    assert isinstance(sampler, TrainBatches), "only what train_loader returns knows epochs"
    batches = iterate_batches(loader, epoch, start)
    if sampler.steps_per_epoch is None:
        yield from batches
        return
    left = sampler.steps_per_epoch - start
    for following in count(epoch + 1):
        yield from islice(batches, left - 1)
        last, steps = next(batches), steps - left
        if steps > 0:
            batches, left = iterate_batches(loader, following), sampler.steps_per_epoch
        yield last
        if steps <= 0:
            return


def eval_loader(
    dataset: EvalSet,
    *,
    batch_size: int,
    tokens: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the loader of this process's own slice of a split: over all processes every sample once.

    Texts come sorted by length, so go by `indices`; with `tokens` a batch holds as many as have so many tokens,
    padding included, instead of `batch_size`. With fewer samples than processes one may get no batch.
    """
    mine = np.arange(len(dataset) * rank // world, len(dataset) * (rank + 1) // world)
    batches = eval_batches(mine, dataset.lengths, batch_size, tokens)
    return DataLoader(dataset, batch_sampler=batches, **_options(dataset, workers, pin_memory))


def eval_batches(
    indices: np.ndarray, lengths: np.ndarray | None, batch_size: int, tokens: int | None = None
) -> list[list[int]]:
    """Return batches of `batch_size` samples, of texts with `tokens` of as many as that holds, longest first."""
    if lengths is not None:  # longest first: memory runs out early or never
        indices = indices[np.argsort(-lengths[indices], kind="stable")]
    if lengths is not None and tokens is not None:
        return cut_by_tokens(indices.tolist(), lengths, tokens)
    return [indices[at : at + batch_size].tolist() for at in range(0, len(indices), batch_size)]


def eval_tokens(
    lengths: np.ndarray | None, batch_size: int, device: torch.device, asked: int | None = None
) -> int | None:
    """Return the tokens of a batch that is only measured: as asked, else what `batch_size` of the longest texts take.

    So memory is no issue, and short texts fill an accelerator as long ones do. A CPU is no faster for it: None there.
    """
    if lengths is None or (asked is None and device.type == "cpu"):
        return None
    return asked or batch_size * int(lengths.max())


def loader_over(
    dataset: EvalSet, batches: Sequence[list[Any]], *, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return a loader of the batches of these keys, in this order."""
    options = _options(dataset, workers, pin_memory) | {"persistent_workers": False}
    return DataLoader(dataset, batch_sampler=batches, **options)


def _options(dataset: EvalSet, workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "collate_fn": partial(collate, tokenizer=dataset.tokenizer),
        "num_workers": workers,
        "persistent_workers": workers > 0,
        # an iterator draws a seed for its workers: from here, so that reading data leaves torch's own generator alone
        "generator": torch.Generator(),
        "worker_init_fn": _start_worker,
        "pin_memory": pin_memory,
    }


def _start_worker(worker: int) -> None:
    """Keep a worker to one thread, the others are its siblings', and let it end when its process says so only."""
    drop_freed_memory()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A terminal or a cluster signals workers too. Their process decides: it may still need them for the last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
