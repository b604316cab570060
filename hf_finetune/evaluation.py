"""Measuring a model on a split: every sample once, whatever the number of processes and the last batch's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_finetune.augment.device import OPERATIONS, finish
from hf_finetune.data.labels import Labels
from hf_finetune.models.load import forward
from hf_finetune.parallel import gathered
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.tasks.metrics import compute


@dataclass(frozen=True)
class Evaluation:
    """A model's answers on a split, in the split's order."""

    loss: float
    metrics: dict[str, float]
    logits: np.ndarray
    """Shape (N, outputs)."""
    labels: np.ndarray
    """(N,) class indices or values, or (N, classes)."""

    def value(self, metric: str) -> float:
        """Return the value of a metric, `loss` included."""
        return self.loss if metric == "loss" else self.metrics[metric]

    def answers(self, labels: Labels) -> tuple[list[Any], list[Any]] | None:
        """Return true and predicted labels by row: class numbers, or lists of them; None for regression."""
        if labels.kind == "single":
            return self.labels.tolist(), self.logits.argmax(1).tolist()
        if labels.kind == "multi":
            return _chosen(self.labels > 0.5), _chosen(self.logits > 0)
        return None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    labels: Labels,
    metrics: Sequence[str],
    accelerator: Accelerator,
    *,
    forward: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor] = forward,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return loss and metrics of `model` over this process's share of a split, gathered over all processes.

    The loss is the plain mean over samples: no class weights, no label smoothing. `forward` runs the model on a batch's
    inputs.
    """
    was_training = model.training
    model.eval()
    indices, logits, targets, losses = [], [], [], []
    with gathered(model):
        for batch in batches:
            inputs = to_device(batch["inputs"], accelerator.device)
            batch_labels = batch["labels"].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                outputs = forward(model, inputs)
            losses.append(sample_losses(labels.kind, outputs, batch_labels).cpu())
            logits.append(outputs.float().cpu())
            targets.append(batch["labels"])
            indices.append(batch["indices"])
            on_batch()
    model.train(was_training)
    mine = [[torch.cat(part).numpy() if part else None for part in (indices, logits, targets, losses)]]
    shares = [share for share in gather_object(mine) if share[0] is not None]
    order = np.argsort(np.concatenate([share[0] for share in shares]))
    all_logits, all_targets, all_losses = (
        np.concatenate([share[part] for share in shares])[order] for part in (1, 2, 3)
    )
    values = compute([m for m in metrics if m != "loss"], labels.kind, all_targets, all_logits)
    return Evaluation(float(all_losses.mean(dtype=np.float64)), values, all_logits, all_targets)


def _chosen(labels: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in labels]


def to_device(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move a batch's inputs and finish its images there; these in channels_last, which convolutions run fastest in."""
    moved = {
        name: tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        if tensor.ndim == 4
        else tensor.to(device, non_blocking=True)
        for name, tensor in inputs.items()
        if name != OPERATIONS
    }
    if OPERATIONS in inputs:
        moved["pixel_values"] = finish(moved["pixel_values"], inputs[OPERATIONS])
    return moved
