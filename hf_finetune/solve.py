"""A phase that a solver fits: features in, the output layer fitted to convergence, what was chosen in words.

Every process reads all features and fits the same; the main one's answer counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from hf_finetune.data.columns import column_values
from hf_finetune.data.spec import LabelKind
from hf_finetune.errors import TrainingError
from hf_finetune.evaluation import Evaluation, evaluate, to_device
from hf_finetune.features.feed import Source
from hf_finetune.linear import STRENGTHS, Fit, Losses, lbfgs_path, mean_loss, ridge
from hf_finetune.setup import Setup
from hf_finetune.strategies.phase import Solver
from hf_finetune.tasks.metrics import METRICS, compute
from hf_finetune.together import by_everyone

Candidate = tuple[Fit, float, float]
"""A fit, the value it is judged by, and what decides between equal ones (the lower the better)."""
PATIENCE = 4
"""Weaker weight decays in a row, half powers of ten apart, that measure no better: the path ends."""


@dataclass(frozen=True)
class Solved:
    """An output layer that was fitted and stands in the model."""

    loss: float
    """Mean over the rows, without the weight decay."""
    rows: int
    """That were fitted, every view of a sample counted."""
    facts: dict[str, Any]
    """What was chosen, for run.json and the card."""

    @property
    def note(self) -> str:
        """What was chosen, in one line."""
        return str(self.facts["note"])


def solve(
    setup: Setup,
    solver: Solver,
    source: Source,
    model: nn.Module,
    accelerator: Accelerator,
    losses: Losses,
    on_pass: Callable[[str], None],
) -> Solved:
    """Fit the output layer of `model` to what its frozen layers make of the training rows; every process calls this.

    Args:
        setup: the run.
        solver: `lbfgs` or `ridge`.
        source: all training rows in their order, and this process's share of the validation rows.
        model: set up for the phase, not wrapped.
        accelerator: of the run.
        losses: the task's, (logits, targets) -> a value for each row, as gradient steps would take them.
        on_pass: told what is being done; may raise to interrupt.

    Raises:
        TrainingError: a feature is not finite.
    """
    layer = output_layer(setup, model)
    x, y = _rows(source, model, layer, accelerator, on_pass)
    _check_finite(setup, x)
    if solver == "ridge":
        fit, facts = _by_ridge(setup, x, y, source.views, on_pass)
    else:
        held = list(source.validation)

        def measure(fit: Fit) -> Evaluation:
            _write(layer, fit)
            metrics = [setup.recipe.monitor.metric]
            return evaluate(model, held, setup.splits.labels, metrics, accelerator, forward=source.forward)

        fit, facts = _by_lbfgs(setup, x, y, losses, measure, on_pass)
    _write(layer, fit)
    if accelerator.num_processes > 1:
        for parameter in layer.parameters():
            broadcast(parameter.data)
    weight, bias = (tensor.detach().to(x.device, torch.float64) for tensor in (layer.weight, layer.bias))
    facts = {"solver": solver, "strength": fit.strength} | facts
    return Solved(mean_loss(x, y, weight, bias, losses), len(x), facts | {"note": _note(facts)})


def _note(facts: dict[str, Any]) -> str:
    """Return in words what a solver chose."""
    value = "" if facts["value"] is None else f" {facts['value']:.4g}"
    edge = {STRENGTHS[0]: "the strongest and ", STRENGTHS[-1]: "the weakest and "}.get(facts["strength"], "")
    text = f"{facts['solver']}: weight decay {facts['strength']:.3g}, {edge}the best of {facts['tried']} tried by "
    text += facts["metric"] + value
    if facts["solver"] == "ridge":
        return text
    return text + f", {facts['iterations']} iterations" + ("" if facts["converged"] else ", not converged")


def output_layer(setup: Setup, model: nn.Module) -> nn.Linear:
    """Return the layer that a solver fits."""
    name = next(p.name for p in setup.backbone.anatomy.parameters if p.is_output)
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, nn.Linear), "planned by strategies.phase.why_not_linear"
    return layer


@torch.no_grad()
def _rows(
    source: Source,
    model: nn.Module,
    layer: nn.Linear,
    accelerator: Accelerator,
    on_pass: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """Return what enters the output layer, (N, features), and the targets, view after view, where they are fitted."""
    found: list[Tensor] = []
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    was_training = model.training
    model.eval()  # no dropout between the features and the layer
    targets = []
    try:
        for batch in source.train:
            seen.clear()
            with accelerator.autocast():
                logits = source.forward(model, to_device(batch["inputs"], accelerator.device))
            if len(seen) != 1 or seen[0].shape != (len(logits), layer.in_features):
                raise TrainingError(
                    f"the output layer reads {[tuple(each.shape) for each in seen]} for {len(logits)} rows, not one "
                    "vector for each, so no solver fits it. Leave `solver` out (null): gradient steps train it."
                )
            found.append(seen[0].clone())
            targets.append(batch["labels"])
            on_pass("reading features")
    finally:
        hook.remove()
        model.train(was_training)
    # Metal knows no float64
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    return torch.cat(found).to(device), torch.cat(targets).to(device)


def _check_finite(setup: Setup, x: Tensor) -> None:
    broken = (~torch.isfinite(x).all(1)).nonzero().flatten().tolist()
    if broken:
        numbers = column_values(setup.splits.train, "row")  # as the data's own file counts
        rows = sorted({int(numbers[row % len(numbers)]) for row in broken})
        named = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
        error = TrainingError(
            f"the frozen layers compute numbers that are not finite from rows {named} of train (the first is 0). "
            "Look at these samples, or compute in precision: fp32."
        )
        raise by_everyone(error)


def _by_lbfgs(
    setup: Setup,
    x: Tensor,
    y: Tensor,
    losses: Losses,
    measure: Callable[[Fit], Evaluation],
    on_pass: Callable[[str], None],
) -> tuple[Fit, dict[str, Any]]:
    """Follow the path of weight decays; return the layer that measures best on the validation rows.

    Of equal values of the monitored metric the lower validation loss wins, then the stronger weight decay.
    """
    monitor = setup.recipe.monitor

    def candidates() -> Iterator[Candidate]:
        for fit in lbfgs_path(
            x,
            y,
            setup.splits.labels.outputs,
            losses,
            on_pass=lambda strength, loss: on_pass(f"lbfgs, weight decay {strength:.1e}, loss {loss:.4f}"),
        ):
            result = measure(fit)
            yield fit, result.value(monitor.metric), result.loss

    fit, facts = _best(candidates(), monitor.mode, PATIENCE)
    facts |= {
        "metric": f"validation {monitor.metric}",
        "iterations": fit.iterations,
        "converged": fit.converged,
    }
    return fit, facts


def _by_ridge(
    setup: Setup, x: Tensor, y: Tensor, views: int, on_pass: Callable[[str], None]
) -> tuple[Fit, dict[str, Any]]:
    """Return the layer whose fits without a row tell that row best.

    Of equal values of the monitored metric the lower squared error wins, then the stronger weight decay. Where the
    metric is the loss or another library's, which scores around 1 and -1 are no basis for, the squared error decides.
    """
    monitor, labels = setup.recipe.monitor, setup.splits.labels
    metric = monitor.metric if monitor.metric in METRICS else "squared error"
    targets = scores_wanted(labels.kind, y, labels.outputs, setup.recipe.training.label_smoothing)
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device)
    if setup.class_weights:
        weights = torch.tensor(setup.class_weights, dtype=torch.float64, device=x.device)[y]

    def candidates() -> Iterator[Candidate]:
        on_pass("ridge, decomposing")
        for fit in ridge(x, targets, weights=weights, views=views):
            on_pass(f"ridge, weight decay {fit.strength:.1e}")
            assert fit.left_out is not None
            error = float((fit.left_out - targets).square().sum(1) @ weights / len(x))
            value = error
            if metric in METRICS:
                scores = fit.left_out.float().cpu().numpy()
                value = compute([metric], labels.kind, y.cpu().numpy(), scores)[metric]
            yield fit, value, error

    fit, facts = _best(candidates(), monitor.mode if metric in METRICS else "min")
    return fit, facts | {"metric": f"leave-one-out {metric}"}


def _best(
    candidates: Iterator[Candidate], mode: str, patience: int | None = None
) -> tuple[Fit, dict[str, Any]]:
    """Return the fit of the best value, the first of equal ones with equal ties, and what to say of the choice."""
    best: tuple[tuple[float, float], Fit, float] | None = None
    tried = waited = 0
    for fit, value, tie in candidates:
        key = (math.inf if math.isnan(value) else -value if mode == "max" else value, tie)
        tried, waited = tried + 1, waited + 1
        if best is None or key < best[0]:
            best, waited = (key, fit, value), 0
        if waited == patience:
            break
    assert best is not None
    _, fit, value = best
    return fit, {"tried": tried, "value": float(value) if math.isfinite(value) else None}


def scores_wanted(kind: LabelKind, y: Tensor, outputs: int, label_smoothing: float = 0.0) -> Tensor:
    """Return what ridge regresses on, (N, outputs): 1 for a row's classes and -1 for the others, or its value."""
    if kind == "regression":
        return y.double()[:, None]
    hot = F.one_hot(y, outputs).double() if kind == "single" else y.double()
    return 2 * (hot * (1 - label_smoothing) + label_smoothing / outputs) - 1


@torch.no_grad()
def _write(layer: nn.Linear, fit: Fit) -> None:
    layer.weight.copy_(fit.weight)
    layer.bias.copy_(fit.bias)
