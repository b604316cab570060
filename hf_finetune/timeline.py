"""Durations become optimizer steps here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_finetune.recipe import Recipe
from hf_finetune.schedule import multiple_at
from hf_finetune.spec import Duration
from hf_finetune.strategies.phase import PhasePlan


@dataclass(frozen=True)
class Timeline:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    evaluate_every: int

    def steps(self, duration: Duration) -> int:
        """Return a duration in optimizer steps."""
        return duration.to_steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)

    def epoch(self, step: int) -> float:
        """Return how many epochs `step` optimizer steps are."""
        return step / self.steps_per_epoch


def build_timeline(recipe: Recipe, train_samples: int) -> Timeline:
    """Return the run's timeline for `train_samples` samples; the last short batch of an epoch is a step too."""
    if steps := recipe.strategy.solver_steps:
        return Timeline(steps_per_epoch=1, total_steps=steps, evaluate_every=1)  # each reads every row
    steps_per_epoch = math.ceil(train_samples / recipe.training.batch_size)
    epochs = recipe.training.epochs
    total = recipe.training.steps or max(1, round((epochs or 1) * steps_per_epoch))
    total = recipe.strategy.steps_of(total)
    every = recipe.monitor.evaluate.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total)
    return Timeline(steps_per_epoch, total, every)


def phase_end(plans: Sequence[PhasePlan], index: int, start: int, timeline: Timeline) -> int:
    """Return the step at which phase `index`, entered at step `start`, ends at the latest.

    A solver takes one step. The last phase that takes gradient steps takes what is left. A phase with `until` and no
    `for` may take all that is left. Phases with neither share equally what the fixed ones after them leave over.
    """
    plan, later = plans[index], [p for p in plans[index + 1 :] if not p.solver]
    left = timeline.total_steps - start
    if plan.solver:
        return start + min(left, 1)
    left = max(1, left - sum(p.solver is not None for p in plans[index + 1 :]))
    if not later:
        return start + left
    if plan.duration is not None:
        return start + min(left, timeline.steps(plan.duration))
    if plan.patience is not None:
        return start + left
    fixed = sum(timeline.steps(p.duration) for p in later if p.duration is not None)
    sharing = 1 + sum(p.duration is None for p in later)
    return start + min(left, max(1, (left - fixed) // sharing))


def reachable(plans: Sequence[PhasePlan], timeline: Timeline) -> list[PhasePlan]:
    """Return the phases the run has time for, each ending as late as it can, except that plateaus may come at once."""
    start, reached = 0, []
    for index, plan in enumerate(plans):
        if start >= timeline.total_steps:
            break
        reached.append(plan)
        start = start + 1 if plan.patience else phase_end(plans, index, start, timeline)
    return reached


def rate_multiple(recipe: Recipe, timeline: Timeline, step: int, start: int, end: int) -> float:
    """Return the schedule's multiple at `step`, for a phase that spans steps `start` to `end`."""
    schedule = recipe.schedule
    if schedule.scope == "run":
        start, end = 0, timeline.total_steps
    span = end - start
    warmup = 0
    if isinstance(schedule.warmup, Duration):
        # A share of a warmup is one of what the schedule spans; an absolute one must still leave room for the curve.
        warmup = schedule.warmup.to_steps(steps_per_epoch=timeline.steps_per_epoch, total_steps=span)
        warmup = min(warmup, span // 2)
    return multiple_at(schedule, step - start, span_steps=span, warmup_steps=warmup)
