"""Rules about the length of a run, its batches, loss, measurements and rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_finetune.checks.conflict import (
    Conflict,
    length_key,
    length_of_run,
    listed,
    modalities,
    share_of_run,
)
from hf_finetune.errors import nearest
from hf_finetune.recipe_spec import Recipe
from hf_finetune.spec import Duration
from hf_finetune.tasks.metrics import EVALUATE_PREFIX, LOSS, METRICS, metric_names

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
"""accelerate's own."""


def run_has_a_length(recipe: Recipe) -> Iterator[Conflict]:
    """Epochs or steps, one of them."""
    training, keys = recipe.training, ("training.steps", "training.epochs")
    if training.epochs is None and training.steps is None:
        yield Conflict(keys, "the run has no length", "set training.epochs or training.steps")
    elif training.epochs is not None and training.steps is not None:
        yield Conflict(keys, "both say how long the run is", "keep one, remove the other")


def micro_batches_hold_a_text(recipe: Recipe) -> Iterator[Conflict]:
    """A bound on tokens is for texts, and holds the longest of them."""
    tokens, longest = recipe.training.micro_batch_tokens, recipe.data.max_length
    if tokens is None:
        return
    image = next((key for key, modality in modalities(recipe) if modality == "image"), None)
    if image:
        yield Conflict(
            ("training.micro_batch_tokens", image),
            "images have no tokens",
            "set training.micro_batch_size instead",
        )
    elif longest != "auto" and tokens < longest:
        yield Conflict(
            ("training.micro_batch_tokens", "data.max_length"),
            f"{tokens} tokens do not hold one text of {longest}",
            f"set training.micro_batch_tokens: {longest} or more, or data.max_length: {tokens} or less",
        )


def micro_batches_fill_the_batch(recipe: Recipe) -> Iterator[Conflict]:
    """An optimizer step takes a whole number of forward passes."""
    batch, micro = recipe.training.batch_size, recipe.training.micro_batch_size
    if not isinstance(micro, int) or batch % micro == 0:
        return
    rounded = micro * max(1, round(batch / micro))
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0 and size <= max(micro, 1)]
    larger = "is larger than" if micro > batch else "does not divide"
    yield Conflict(
        ("training.micro_batch_size", "training.batch_size"),
        f"it {larger} the batch of an optimizer step, which takes a whole number of forward passes",
        f"set training.micro_batch_size: {divisors[0]}, or training.batch_size: {rounded}",
    )


def smoothing_needs_classes(recipe: Recipe) -> Iterator[Conflict]:
    """Label smoothing spreads one class's target over the others."""
    if recipe.training.label_smoothing and recipe.data.labels != "single":
        yield Conflict(
            ("training.label_smoothing", "data.labels"),
            "smoothing spreads the target of one class over the others, so it needs single labels",
            "set training.label_smoothing: 0",
        )


def weights_need_classes(recipe: Recipe) -> Iterator[Conflict]:
    """Class weights need classes."""
    if recipe.data.class_weights != "none" and recipe.data.labels == "regression":
        yield Conflict(
            ("data.class_weights", "data.labels"),
            "regression has no classes to weigh",
            "set data.class_weights: none",
        )


def metrics_fit_the_labels(recipe: Recipe) -> Iterator[Conflict]:
    """Every metric is known and for the kind of labels the data has."""
    kind = recipe.data.labels
    keys = [("monitor.metric", recipe.monitor.metric)]
    keys += [(f"monitor.metrics.{i}", name) for i, name in enumerate(recipe.monitor.metrics)]
    for key, name in keys:
        allowed = f"for {kind} labels there are {', '.join(metric_names(kind))}"
        if name in (LOSS, *(["auto"] if key == "monitor.metric" else [])) or name in metric_names(kind):
            continue
        if name.startswith(EVALUATE_PREFIX) and name != EVALUATE_PREFIX:
            continue
        if name in METRICS:
            yield Conflict(
                (key, "data.labels"), f"{name} is for {listed(METRICS[name].kinds)} labels", allowed
            )
            continue
        longer = (each for each in metric_names(kind) if each.startswith(name))
        match = nearest(name, metric_names(kind)) or next(longer, None)
        yield Conflict(
            (key,),
            "no metric has this name" + (f"; did you mean '{match}'?" if match else ""),
            f"{allowed}; a metric of Hugging Face evaluate is written {EVALUATE_PREFIX}<name>",
        )


def better_is_known(recipe: Recipe) -> Iterator[Conflict]:
    """More or less of the monitored metric is better, and the recipe does not say the opposite."""
    metric, mode = recipe.monitor.metric, recipe.monitor.mode
    if metric.startswith(EVALUATE_PREFIX) and mode == "auto":
        yield Conflict(
            ("monitor.metric", "monitor.mode"),
            "the metrics of Hugging Face evaluate do not say which way is better",
            "set monitor.mode: max, or min",
        )
    right = "min" if metric == LOSS else METRICS[metric].mode if metric in METRICS else mode
    if mode not in ("auto", right):
        yield Conflict(
            ("monitor.mode", "monitor.metric"),
            f"the run would keep its worst weights: {metric} is better at its "
            f"{'highest' if right == 'max' else 'lowest'}",
            "set monitor.mode: auto",
        )


def evaluations_happen(recipe: Recipe) -> Iterator[Conflict]:
    """The run is at least as long as the time between two evaluations."""
    share = share_of_run(recipe.monitor.evaluate, recipe)
    if share is not None and share > 1:
        yield Conflict(
            ("monitor.evaluate", length_key(recipe)),
            "the run ends before its first evaluation",
            f"evaluate at most every {length_of_run(recipe)}, or train longer",
        )


def patience_can_run_out(recipe: Recipe) -> Iterator[Conflict]:
    """What waits for a plateau gets enough evaluations: one to compare with, then `patience` more."""
    share = share_of_run(recipe.monitor.evaluate, recipe)
    if share is None or share > 1:
        return
    evaluations = int(1 / share + 1e-9)
    for keys, patience, what in _waits(recipe):
        if patience >= evaluations:
            remedy = "evaluate more often (monitor.evaluate: 20%) or train longer"
            if evaluations > 1 and patience > 1:
                remedy = f"set a patience of at most {evaluations - 1}, or {remedy}"
            yield Conflict(
                (*keys, "monitor.evaluate", length_key(recipe)),
                f"{what} takes {patience + 1} evaluations, the run has {evaluations}",
                remedy,
            )


def warmup_suits_the_schedule(recipe: Recipe) -> Iterator[Conflict]:
    """A curve that rises by itself takes no warmup, and a warmup ends before the run does."""
    schedule = recipe.schedule
    if not isinstance(schedule.warmup, Duration):
        return
    if not schedule.warms_up:
        yield Conflict(
            ("schedule.warmup", "schedule.name"),
            "this curve rises by itself, so a warmup would come on top",
            "remove schedule.warmup; schedule.rise sets how long the curve rises",
        )
        return
    share = share_of_run(schedule.warmup, recipe)
    if share is not None and share >= 1:
        yield Conflict(
            ("schedule.warmup", length_key(recipe)),
            "the rate would rise until the run ends",
            f"warm up for less than {length_of_run(recipe)}, such as 10%",
        )


def trackers_are_known(recipe: Recipe) -> Iterator[Conflict]:
    """Trackers are accelerate's own."""
    for i, name in enumerate(recipe.trackers):
        if name not in TRACKERS:
            match = nearest(name, TRACKERS)
            yield Conflict(
                (f"trackers.{i}",),
                "no tracker has this name" + (f"; did you mean '{match}'?" if match else ""),
                f"choose from {', '.join(TRACKERS)}",
            )


def _waits(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Yield (keys, patience, what it is) for everything that waits for a plateau."""
    strategy: Any = recipe.strategy
    if recipe.monitor.early_stopping is not None:
        yield ("monitor.early_stopping.patience",), recipe.monitor.early_stopping.patience, "early stopping"
    if recipe.schedule.name == "reduce_on_plateau":
        yield ("schedule.patience", "schedule.name"), recipe.schedule.patience, "a plateau"  # type: ignore[attr-defined]
    if getattr(strategy, "every", None) == "plateau":
        yield ("strategy.every", "strategy.patience"), strategy.patience, "a plateau"
    for i, phase in enumerate(getattr(strategy, "phases", [])):
        if phase.patience is not None:
            yield (f"strategy.phases.{i}.until",), phase.patience.patience, "a plateau"
