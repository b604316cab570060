"""One linear layer fitted to convergence: L-BFGS along a path of weight decays, or ridge with exact leave-one-out.

Features are centred by dimension and divided by one number, the root of their mean variance, which is folded back into
weight and bias. One number, not one for each dimension: a dimension that hardly moves is as unimportant as the backbone
made it, while a scale of its own would blow its noise up. Sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10 ** (power / 2) for power in range(4, -13, -1))
"""Weight decays tried, the strongest first: 100 to 1e-6 by half powers of ten; the loss is a mean over rows."""
MAX_ITERATIONS = 2000
HISTORY = 20
TOLERANCE = 1e-6
"""The gradient's largest entry at the end, as a share of the one at the start."""
CHUNK = 8192
"""Rows in float64 at a time."""

Losses = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> the loss of each row."""


@dataclass(frozen=True)
class Fit:
    """A linear layer and how it was found."""

    weight: Tensor
    """(outputs, features), float64, for features as they are."""
    bias: Tensor
    """(outputs,)"""
    strength: float
    """Of the weight decay: half of it times the squared weights, for features of unit variance, joins the mean loss."""
    iterations: int = 1
    converged: bool = True
    left_out: Tensor | None = None
    """(rows, outputs) ridge: the score of each row by a fit without it."""


@dataclass(frozen=True)
class Scale:
    """What features are centred and divided by."""

    mean: Tensor
    """(features,)"""
    spread: float

    def of(self, x: Tensor) -> Tensor:
        """Return features scaled, in float64."""
        return (x.double() - self.mean) / self.spread

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias for features as they are, given those for scaled ones."""
        raw = weight / self.spread
        return raw, bias - raw @ self.mean


def scale_of(x: Tensor, weights: Tensor | None = None) -> Scale:
    """Return the scale of features (N, D), rows counted by `weights` (N,)."""
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device) if weights is None else weights
    total = weights.sum()
    mean = _sum(x, lambda rows, at: weights[at] @ rows) / total
    variance = _sum(x, lambda rows, at: (weights[at] @ (rows - mean).square()).sum()) / (total * x.shape[1])
    return Scale(mean, float(variance.sqrt()) or 1.0)


def mean_loss(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, losses: Losses) -> float:
    """Return the mean loss of a linear layer over all rows."""
    with torch.no_grad():
        return float(_sum(x, lambda rows, at: losses(F.linear(rows, weight, bias), y[at]).sum())) / len(x)


def lbfgs_path(
    x: Tensor,
    y: Tensor,
    outputs: int,
    losses: Losses,
    *,
    strengths: Sequence[float] = STRENGTHS,
    on_pass: Callable[[float, float], None] = lambda strength, loss: None,
) -> Iterator[Fit]:
    """Yield the layer that minimises mean loss + strength/2 |weight|^2 for each strength.

    Each starts from the one before. The bias is not penalised. Full batches and a strong Wolfe line search (Liu and
    Nocedal 1989).

    Args:
        x: features (N, D).
        y: targets, as `losses` takes them.
        outputs: of the layer.
        losses: convex in the logits.
        strengths: the strongest first.
        on_pass: told strength and objective after each pass over the rows; may raise to interrupt.
    """
    scale = scale_of(x)
    squares, directions, spread = _along(scale.of(x))
    # In these directions, each divided by the root of its curvature (a quarter of the variance, as the logistic loss
    # has it at zero, and the decay), the problem is round: tens of passes do where plain features take thousands.
    stretched = torch.zeros(outputs, len(squares), dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, device=x.device, requires_grad=True)
    unit = mean_loss(spread, y, stretched, bias, losses) or 1.0  # regression may be in any: it starts at 1

    def roundness(strength: float) -> Tensor:
        return (squares / len(x) / 4 + strength).rsqrt()

    def objective(strength: float) -> Tensor:
        stretched.grad = bias.grad = None
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for start in range(0, len(x), CHUNK):
            at, weight = slice(start, start + CHUNK), stretched * roundness(strength)
            part = losses(F.linear(spread[at], weight, bias), y[at]).sum() / len(x) / unit
            part.backward()
            total += part.detach()
        decay = strength / 2 * (stretched * roundness(strength)).square().sum() / unit
        decay.backward()
        total += decay.detach()
        on_pass(strength, float(total) * unit)
        return total

    objective(strengths[0])
    steepest = (
        max(
            float(each.grad.abs().max())
            for each in (stretched, bias)
            if each.grad is not None and each.numel()
        )
        or 1.0
    )
    before = strengths[0]
    for strength in strengths:
        with torch.no_grad():
            stretched.mul_(roundness(before) / roundness(strength))
        before = strength
        optimizer = torch.optim.LBFGS(
            [stretched, bias], max_iter=MAX_ITERATIONS, max_eval=2 * MAX_ITERATIONS, history_size=HISTORY,
            tolerance_grad=TOLERANCE * steepest, tolerance_change=1e-12, line_search_fn="strong_wolfe",
        )  # fmt: skip
        optimizer.step(partial(objective, strength))
        iterations = int(optimizer.state[stretched]["n_iter"])
        weight = (stretched.detach() * roundness(strength)) @ directions.T
        folded = scale.folded(weight, bias.detach().clone())
        yield Fit(*folded, strength, iterations, converged=iterations < MAX_ITERATIONS)


def ridge(
    x: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    views: int = 1,
    strengths: Sequence[float] = STRENGTHS,
) -> Iterator[Fit]:
    """Yield the layer that minimises mean squared error + strength |weight|^2 for each strength.

    One eigendecomposition of the smaller of features x features and rows x rows serves all strengths. Leaving a row out
    is exact: its residual is divided by one minus its leverage (Allen 1974, PRESS). Where a sample has several views
    all of them are left out, by a small system for each sample.

    Args:
        x: features (N, D), view after view.
        targets: (N, outputs), float64.
        weights: of the rows (N,); None for equal ones.
        views: of each sample.
        strengths: to try.
    """
    n = len(x)
    weights = torch.ones(n, dtype=torch.float64, device=x.device) if weights is None else weights.double()
    total, root = weights.sum(), weights.sqrt()[:, None]
    scale = scale_of(x, weights)
    middle = weights @ targets / total
    rows = scale.of(x) * root
    wanted = (targets - middle) * root
    squares, directions, spread = _along(rows)
    along = spread.T @ wanted  # (r, outputs)
    by_sample = spread.view(views, n // views, -1).transpose(0, 1)  # (samples, views, r)
    of_mean = root.view(views, -1).T  # what the free bias adds to the leverage
    constant = of_mean[:, :, None] * of_mean[:, None, :] / total
    identity = torch.eye(views, dtype=torch.float64, device=x.device) * (
        1 + 1e-12
    )  # a single row has leverage 1
    for strength in strengths:
        shrunk = 1 / (squares + strength * total)
        found = along * shrunk[:, None]
        residual = wanted - spread @ found
        leverage = (by_sample * shrunk) @ by_sample.transpose(1, 2) + constant
        grouped = residual.view(views, n // views, -1).transpose(0, 1)
        without = torch.linalg.solve(identity - leverage, grouped).transpose(0, 1).reshape(n, -1)
        # a row of weight 0 (a class that does not count) has its own prediction in no fit
        error = torch.where(root > 0, without / root, torch.zeros_like(without))
        weight, bias = scale.folded((directions @ found).T, middle)
        yield Fit(weight, bias, strength, left_out=targets - error)


def _along(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared lengths (r,), directions (D, r) and `rows @ directions` (N, r) of what spans the rows (N, D).

    By one eigendecomposition of the smaller of features x features and rows x rows.
    """
    few = len(rows) < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    kept = squares > max(float(squares[-1]) * 1e-12, 0.0)
    squares, vectors = squares[kept], vectors[:, kept]
    if few:
        return squares, rows.T @ vectors / squares.sqrt(), vectors * squares.sqrt()
    return squares, vectors, rows @ vectors


def _sum(x: Tensor, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return the sum of `of` over chunks of rows in float64."""
    chunks = (slice(start, start + CHUNK) for start in range(0, len(x), CHUNK))
    return torch.stack([of(x[at].double(), at) for at in chunks]).sum(0)
