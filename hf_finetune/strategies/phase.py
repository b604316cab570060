"""A phase says which layers learn, at what multiple of the base rate, for how long.

`Phase` is what a recipe writes; `plan_phases` turns a list of them into `PhasePlan`s: for every parameter by name its
multiple of the base rate, absent when frozen. The loop runs plans and knows no strategy by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from hf_finetune.errors import RecipeError, did_you_mean
from hf_finetune.models.anatomy import HEAD, Anatomy, Parameter
from hf_finetune.monitor import PatienceSpec
from hf_finetune.spec import Duration, DurationField, Pattern, Rate, RateField, Spec

BatchNorm = Literal["auto", "frozen", "adapt", "train"]
Solver = Literal["lbfgs", "ridge"]
"""Fits an output layer to convergence on what the frozen layers below it compute, instead of gradient steps."""
ADAPT_AND_SOLVER = (
    "`solver` fits what is computed once, which `batch_norm` that adapts changes: remove one of the two"
)
SOLVERS: tuple[Solver, ...] = get_args(Solver)
SELECTORS = (
    "head",
    "all",
    "last:N",
    "first:N",
    "stem",
    "block.N",
    "biases",
    "norms",
    "adapters",
    "{match: <regex>}",
)
_WORDS = ("head", "all", "stem", "biases", "norms", "adapters")
_COUNTED = re.compile(r"^(last|first):([1-9]\d*)$")
_BLOCK = re.compile(r"^block\.\d+$")


class MatchSpec(Spec):
    """Parameters whose qualified name the regular expression finds."""

    match: Pattern
    """A regular expression; the parameters' names are those of `model.named_parameters()`."""


def _check_selector(value: str) -> str:
    if value in _WORDS or _COUNTED.match(value) or _BLOCK.match(value):
        return value
    raise ValueError(
        f"'{value}' is no selector; choose from {', '.join(SELECTORS)}.{did_you_mean(value, _WORDS)}"
    )


class PlateauSpec(Spec):
    """The end of a phase when the monitored metric stops improving."""

    plateau: PatienceSpec
    """How long to wait for an improvement."""


class Phase(Spec):
    """One stretch of training with a fixed set of learning layers."""

    train: str | MatchSpec | Annotated[list[str | MatchSpec], Field(min_length=1)]
    """`head`, `last:N` (N layer groups from the top, the head included), `first:N`, `stem`, `block.N`, `all`,
    `biases`, `norms`, `{match: regex}`, or a list of them."""
    for_: DurationField | None = Field(None, alias="for")
    """How long; with `until`, at most how long. Phases without either share what is left of the run."""
    until: Literal["plateau"] | PlateauSpec | None = None
    """End at a plateau of the monitored metric: `plateau` (two evaluations without improvement) or
    `{plateau: {patience: 4}}`."""
    lr: RateField = Rate(1.0, relative=True)
    """Rate of the head, and of all layers unless one of the next two keys says otherwise."""
    backbone_lr: RateField | None = None
    """Rate of everything but the head."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer group runs at this multiple of the one above it."""
    rates: dict[str, RateField] = {}
    """Regular expression on parameter names -> their rate, before the keys above; the first that matches counts."""
    batch_norm: BatchNorm = "auto"
    """Statistics of BatchNorm layers: `frozen`; `adapt` = they follow the data, scale and shift do not learn;
    `train` = both, where the layer learns."""
    solver: Solver | None = None
    """With `train: head`: fit the output layer to convergence instead of taking gradient steps, in one step of the run.
    `lbfgs` minimises the task's own loss with weight decay, `ridge` solves least squares in closed form."""

    @field_validator("train")
    @classmethod
    def _known_selectors(
        cls, value: str | MatchSpec | list[str | MatchSpec]
    ) -> str | MatchSpec | list[str | MatchSpec]:
        for selector in value if isinstance(value, list) else [value]:
            if isinstance(selector, str):
                _check_selector(selector)
        return value

    @field_validator("rates")
    @classmethod
    def _patterns_compile(cls, value: dict[str, Rate]) -> dict[str, Rate]:
        for pattern in value:
            MatchSpec(match=pattern)
        return value

    @model_validator(mode="after")
    def _one_way_to_rate_layers(self) -> Phase:
        if self.backbone_lr is not None and self.layer_decay is not None:
            raise ValueError(
                "`backbone_lr` and `layer_decay` both rate the backbone's layers: keep one, remove the other"
            )
        return self

    @model_validator(mode="after")
    def _a_solver_needs_no_rates(self) -> Phase:
        if self.solver is None:
            return self
        if self.train not in ("head", "last:1", ["head"]):
            raise ValueError("`solver` fits the head alone: write `train: head`, or leave the solver out")
        plain = Phase(train="head").model_dump(by_alias=True)
        names = ("for", "until", "lr", "backbone_lr", "layer_decay", "rates")
        if given := [name for name in names if self.model_dump(by_alias=True)[name] != plain[name]]:
            raise ValueError(
                f"`solver` takes one step and no rates: remove {' and '.join(f'`{name}`' for name in given)}"
            )
        if self.batch_norm == "adapt":
            raise ValueError(ADAPT_AND_SOLVER)
        return self

    @property
    def patience(self) -> PatienceSpec | None:
        """The plateau that ends the phase, if one does."""
        return (
            PatienceSpec(patience=2)
            if self.until == "plateau"
            else self.until.plateau
            if self.until
            else None
        )


@dataclass(frozen=True)
class PhasePlan:
    """A phase on one backbone."""

    name: str
    multiples: dict[str, float]
    """Parameter name -> multiple of the base rate; a parameter that is absent is frozen."""
    batch_norm: BatchNorm
    duration: Duration | None
    patience: PatienceSpec | None
    solver: Solver | None = None
    """What fits it in one step; None for gradient steps."""

    @property
    def described(self) -> str:
        """What learns, in words."""
        return f"{self.solver} fits the output layer" if self.solver else f"{self.name} learns"


def plan_phases(phases: list[Phase], anatomy: Anatomy, base_lr: float) -> tuple[list[PhasePlan], list[str]]:
    """Return the phases as plans, and notes on what was rewritten.

    Raises:
        RecipeError: a selector matches nothing, or a phase trains nothing.
    """
    notes: list[str] = []
    plans = []
    for number, phase in enumerate(phases, 1):
        selectors = phase.train if isinstance(phase.train, list) else [phase.train]
        selected = frozenset().union(*(select(selector, anatomy) for selector in selectors))
        if phase.batch_norm == "adapt":
            # Adapting means the statistics follow the data while scale and shift stay as pretrained.
            selected -= {p.name for p in anatomy.parameters if p.in_batch_norm}
        if phase.solver:
            selected = _solved(phase.solver, selected, anatomy, number, notes)
        multiples = {}
        for parameter in anatomy.parameters:
            if parameter.name not in selected:
                continue
            multiple = phase.lr.multiple_of(base_lr) * _multiple(phase, anatomy, parameter, base_lr)
            if multiple > 0:
                multiples[parameter.name] = multiple
        if len(multiples) < len(selected):
            notes.append(
                f"phase {number}: {len(selected) - len(multiples)} parameters at a rate of 0 are frozen instead: "
                "a rate of 0 would still move BatchNorm statistics and keep dropout on"
            )
        if not multiples:
            raise RecipeError(
                f"strategy: phase {number} trains nothing: every rate in it is 0. Give `lr` a value above 0."
            )
        batch_norm = "frozen" if phase.batch_norm == "auto" else phase.batch_norm
        plans.append(PhasePlan(_name(phase), multiples, batch_norm, phase.for_, phase.patience, phase.solver))
    # Its bias alone, which `biases` selects, could learn no more than how frequent the classes are.
    return plans, notes


def why_not_linear(anatomy: Anatomy) -> str | None:
    """Return why no solver fits the head: it is not one linear layer on what came with the checkpoint. None if it is.

    What a solver leaves alone must be pretrained. A final norm or a pooler of the checkpoint stays as it is: that is
    what a linear probe means, and it keeps the problem convex.
    """
    weights = [p for p in anatomy.parameters if p.is_output and not p.is_bias]
    names = ", ".join(p.name for p in weights)
    if len(weights) != 1:
        return f"the head has {len(weights)} output layers ({names})"
    if len(weights[0].shape) != 2:
        return f"the output layer ({names}) is not a linear one"
    if not any(p.is_output and p.is_bias for p in anatomy.parameters):
        return f"the output layer ({names}) has no bias"
    random = [
        p.name
        for p in anatomy.parameters
        if p.group == HEAD and p.is_new and not p.is_output and not p.is_adapter and len(p.shape) > 1
    ]
    if random:
        return f"the head has new layers below the output layer ({random[0]}), which must learn too"
    return None


def _solved(
    solver: Solver, selected: frozenset[str], anatomy: Anatomy, number: int, notes: list[str]
) -> frozenset[str]:
    """Return what a solver fits of a phase's parameters, the output layer; add a note on what stays as it came."""
    if why := why_not_linear(anatomy):
        raise RecipeError(
            f"strategy: phase {number}: `solver: {solver}` cannot fit this backbone's head: {why}. "
            "Leave `solver` out: gradient steps train it."
        )
    fitted = frozenset(p.name for p in anatomy.parameters if p.is_output)
    if rest := [p.name for p in anatomy.parameters if p.name in selected - fitted]:
        notes.append(
            f"phase {number}: {solver} fits the output layer; the rest of the head ({', '.join(rest[:3])}"
            f"{', …' if len(rest) > 3 else ''}) stays as pretrained"
        )
    return fitted


def check_head_learns(plans: Sequence[PhasePlan], anatomy: Anatomy) -> None:
    """Raise RecipeError when the output layer is new and none of these phases trains it."""
    untrained = [p.name for p in anatomy.parameters if p.is_new and p.group == HEAD and len(p.shape) > 1]
    if untrained and not any(name in plan.multiples for name in untrained for plan in plans):
        raise RecipeError(
            f"strategy: the output layer ({untrained[0]}) is new and no phase trains it, so the model could not learn. "
            "Add `head` to a phase's `train`, e.g. `train: [biases, head]`."
        )


def select(selector: str | MatchSpec, anatomy: Anatomy) -> frozenset[str]:
    """Return the names of the parameters a selector means.

    Raises:
        RecipeError: it matches nothing, or asks for more layer groups than there are.
    """
    if isinstance(selector, MatchSpec):
        found = frozenset(p.name for p in anatomy.trainable if re.search(selector.match, p.name))
        if not found:
            names = [p.name for p in anatomy.parameters]
            raise RecipeError(
                f"strategy: match '{selector.match}' finds none of {len(names)} parameters "
                f"(they are named like '{names[0]}' and '{names[-1]}')."
            )
        return found
    if counted := _COUNTED.match(selector):
        side, count = counted[1], int(counted[2])
        if count > len(anatomy.groups):
            raise RecipeError(
                f"strategy: '{selector}' asks for {count} layer groups; this backbone has {len(anatomy.groups)} "
                f"({', '.join(anatomy.groups)})."
            )
        return anatomy.names_in(set(anatomy.groups[-count:] if side == "last" else anatomy.groups[:count]))
    if selector in anatomy.groups:
        return anatomy.names_in({selector})
    belongs = {
        "all": lambda p: True,
        "biases": lambda p: p.is_bias,
        "norms": lambda p: p.in_norm,
        "adapters": lambda p: p.is_adapter,
    }.get(selector)
    found = frozenset(p.name for p in anatomy.trainable if belongs and belongs(p))
    if not found and selector == "adapters":
        raise RecipeError(
            "strategy: a phase trains adapters and the recipe puts none into the backbone. "
            "Add `adapter: lora` beside `phases`."
        )
    if not found:
        raise RecipeError(
            f"strategy: this backbone has no {selector}; its layer groups are {', '.join(anatomy.groups)}."
        )
    return found


def _multiple(phase: Phase, anatomy: Anatomy, parameter: Parameter, base_lr: float) -> float:
    for pattern, rate in phase.rates.items():
        if re.search(pattern, parameter.name):
            return rate.multiple_of(base_lr)
    group = parameter.group
    if group == HEAD:
        return 1.0
    if phase.layer_decay is not None:
        return phase.layer_decay ** anatomy.depth_from_top(group)
    return phase.backbone_lr.multiple_of(base_lr) if phase.backbone_lr is not None else 1.0


def _name(phase: Phase) -> str:
    selectors = phase.train if isinstance(phase.train, list) else [phase.train]
    return " + ".join(s if isinstance(s, str) else f"match {s.match}" for s in selectors)
