"""Rules about phases and solvers."""

from __future__ import annotations

from collections.abc import Iterator

from hf_finetune.checks.conflict import (
    Conflict,
    length_key,
    length_of_run,
    mixing_keys,
    share_of_run,
)
from hf_finetune.recipe_spec import Recipe
from hf_finetune.spec import Duration
from hf_finetune.strategies.phase import SOLVERS


def phases_fill_the_run(recipe: Recipe) -> Iterator[Conflict]:
    """Phases of fixed length fit into the run, and the last one lasts until its end."""
    numbered = [each for each in enumerate(getattr(recipe.strategy, "phases", [])) if not each[1].solver]
    phases = [phase for _, phase in numbered]
    shares = {i: share_of_run(phase.for_, recipe) for i, phase in numbered if phase.for_ is not None}
    fixed = [(i, share) for i, share in shares.items() if share is not None]
    total, keys = sum(share for _, share in fixed), tuple(f"strategy.phases.{i}.for" for i, _ in fixed)
    ends = phases and phases[-1].for_ is not None
    if total > 1 + 1e-9:
        yield Conflict(
            (keys[-1], *keys[:-1], length_key(recipe)),
            f"the phases take {total:.0%} of the run",
            "shorten them, or train longer; the last phase needs no `for`: it takes what is left",
        )
    elif ends and len(fixed) == len(phases) and total < 1 - 1e-9:
        yield Conflict(
            (keys[-1], *keys[:-1], length_key(recipe)),
            f"the phases take only {total:.0%} of the run",
            "remove `for` from the last phase: it takes what is left",
        )


def both_stages_happen(recipe: Recipe) -> Iterator[Conflict]:
    """The probe of lp_ft leaves time for what follows it."""
    probe = getattr(recipe.strategy, "probe", None)
    share = share_of_run(probe, recipe) if isinstance(probe, Duration) else None
    if share is not None and share >= 1:
        yield Conflict(
            ("strategy.probe", length_key(recipe)),
            "the run would end before all layers train",
            f"probe for less than {length_of_run(recipe)}, such as 40%",
        )


def solvers_have_features(recipe: Recipe) -> Iterator[Conflict]:
    """A solver fits what frozen layers compute once, of rows as they are measured or in the views that are kept."""
    solved = _solved(recipe)
    if not solved:
        return
    key, solver = next(iter(solved.items()))
    if recipe.cache == "off":
        yield Conflict(
            (key, "cache"),
            f"{solver} fits features that are computed once, and `off` keeps none",
            "set cache: auto, or remove the solver",
        )
    if recipe.training.gradient_checkpointing:
        yield Conflict(
            (key, "training.gradient_checkpointing"),
            f"{solver} fits features that are computed once, and checkpointing runs layers again",
            "remove training.gradient_checkpointing, or the solver",
        )
    if mixing := mixing_keys(recipe):
        yield Conflict(
            (key, mixing[0]),
            f"{solver} fits rows one by one, and mixing blends the targets of two",
            "remove the solver, or what mixes",
        )
    views = getattr(recipe.cache, "views", None)
    if recipe.strategy.solver_steps and recipe.augment not in ("auto", "none", []) and not views:
        yield Conflict(
            ("augment", key),
            f"{solver} fits the rows as they are measured, so nothing would be augmented",
            "remove augment, or keep random views of each row: cache: {views: 4}",
        )


def a_solver_takes_one_step(recipe: Recipe) -> Iterator[Conflict]:
    """The probe of lp_ft has a length only where it takes gradient steps."""
    probe, solver = getattr(recipe.strategy, "probe", None), getattr(recipe.strategy, "solver", None)
    if solver in SOLVERS and isinstance(probe, Duration) and probe != Duration(1, "steps"):
        yield Conflict(
            ("strategy.probe", "strategy.solver"),
            f"{solver} fits the head to convergence in one step",
            "remove strategy.probe, or set strategy.solver: null for gradient steps",
        )


def solved_heads_are_measured(recipe: Recipe) -> Iterator[Conflict]:
    """A head is fitted to features of the weights that are measured: not of weights whose average is measured."""
    phases = getattr(recipe.strategy, "phases", [])
    late = [i for i, phase in enumerate(phases) if phase.solver and not all(p.solver for p in phases[:i])]
    if late and recipe.training.ema is not None:
        yield Conflict(
            ("training.ema", f"strategy.phases.{late[0]}.solver"),
            "the head would be fitted to the weights as they are and measured on their average",
            "remove training.ema, or put the solver's phase first",
        )


def _solved(recipe: Recipe) -> dict[str, str]:
    """Return the keys that ask for a solver by name, each with its name."""
    given = {"strategy.solver": getattr(recipe.strategy, "solver", None)}
    phases = getattr(recipe.strategy, "phases", [])
    given |= {f"strategy.phases.{i}.solver": phase.solver for i, phase in enumerate(phases)}
    return {key: solver for key, solver in given.items() if solver in SOLVERS}
