"""Losses by kind of label, one value per sample: how they are averaged is the loop's business."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_finetune.data.spec import LabelKind


def sample_losses(
    kind: LabelKind,
    logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of each sample, shape (N,), in fp32, or in fp64 for logits in fp64.

    Args:
        kind: `single` is cross-entropy, `multi` binary cross-entropy averaged over classes, `regression` squared error.
        logits: shape (N, outputs), any float type.
        targets: (N,) class indices or (N, classes) probabilities for `single`, (N, classes) for `multi`, (N,) else.
        class_weights: shape (classes,), mean 1 over the training samples. Losses are multiplied, not renormalised per
            batch, so a sample counts the same in whatever batch and process it falls.
        label_smoothing: share of the target spread over all classes.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    if kind == "single":
        return F.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
        )
    if kind == "multi":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (losses * class_weights if class_weights is not None else losses).mean(dim=1)
    return F.mse_loss(logits.squeeze(1), targets, reduction="none")


@torch.no_grad()
def probabilities(kind: LabelKind, logits: Tensor) -> Tensor:
    """Return class probabilities, or the predicted values for regression, as (N, outputs)."""
    logits = logits.float()
    return {"single": lambda: logits.softmax(1), "multi": logits.sigmoid, "regression": lambda: logits}[
        kind
    ]()
