"""Rules about where a backbone's weights come from and which of them may learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_finetune.checks.conflict import (
    Conflict,
    on_hub,
)
from hf_finetune.fetch import COMMIT
from hf_finetune.models.spec import PICKLE_SUFFIXES
from hf_finetune.recipe_spec import Recipe
from hf_finetune.strategies.methods import METHODS

# Strategies whose frozen layers only make sense with pretrained weights.
_NEEDS_PRETRAINED = ("frozen", "lp_ft", "gradual", "bitfit", "norms", "surgical", "peft", *METHODS)


_NO_WEIGHTS_LEARN = ("frozen", "bitfit", "norms")


_BESIDE_WEIGHTS = ("head", "last:1", "adapters", "biases", "norms")


def frozen_layers_are_pretrained(recipe: Recipe) -> Iterator[Conflict]:
    """Layers that do not learn need weights from somewhere."""
    if recipe.backbone.pretrained:
        return
    phases = getattr(recipe.strategy, "phases", [])
    if recipe.strategy.name in _NEEDS_PRETRAINED or (phases and phases[0].train == "head"):
        yield Conflict(
            ("backbone.pretrained", "strategy.phases.0.train" if phases else "strategy.name"),
            "layers that do not learn would keep their random weights",
            "set backbone.pretrained: true, or strategy: scratch",
        )


def quantised_weights_stay(recipe: Recipe) -> Iterator[Conflict]:
    """What is kept in 8 or 4 bits does not learn, and what is saved answers as what was measured."""
    kind, strategy, adapter = recipe.backbone.quantize, recipe.strategy, recipe.strategy.to_adapter()
    if kind is None:
        return
    phases: list[Any] = getattr(strategy, "phases", [])
    allowed: tuple[str, ...] = _BESIDE_WEIGHTS if phases else (*_NO_WEIGHTS_LEARN, *METHODS, "peft")
    asked = {f"strategy.phases.{i}.train": phase.train for i, phase in enumerate(phases)}
    able = [name for name, method in METHODS.items() if kind in method.on]
    for key, value in (asked or {"strategy.name": strategy.name}).items():
        words = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        if other := next((word for word in words if word not in allowed), None):
            choice = allowed if phases else (*(_NO_WEIGHTS_LEARN if kind == "4bit" else ()), *able)
            yield Conflict(
                ("backbone.quantize", key),
                f"quantised weights cannot learn, and {other} trains them",
                f"choose from {', '.join(choice)}, or remove backbone.quantize",
            )
            return
    if adapter and kind not in adapter.table_row.on:
        yield Conflict(
            ("backbone.quantize", "strategy.name"),
            f"peft computes no {adapter.method} on layers in {kind}",
            f"methods that can: {', '.join(able)}",
        )
    elif kind == "8bit" and (adapter is None or adapter.merge):
        yield Conflict(
            ("backbone.quantize", "strategy.name"),
            "layers in 8bit round what they are given, so a plain model would not answer as the one measured",
            "set backbone.quantize: 4bit, or train adapters with merge: false",
        )


def remote_code_is_pinned(recipe: Recipe) -> Iterator[Conflict]:
    """Code from the Hub is run as it was when somebody looked at it."""
    backbone = recipe.backbone
    if not backbone.trust_remote_code or not on_hub(backbone.id):
        return
    if backbone.revision is None:
        yield Conflict(
            ("backbone.trust_remote_code", "backbone.id"),
            "code from the Hub may change between two runs",
            "read it, then set backbone.revision to that commit",
        )
    elif not COMMIT.fullmatch(backbone.revision):
        yield Conflict(
            ("backbone.revision", "backbone.trust_remote_code"),
            "a branch or tag may mean other code tomorrow",
            "read the code, then set backbone.revision to that commit, all 40 digits of it",
        )


def pickles_are_files(recipe: Recipe) -> Iterator[Conflict]:
    """What is allowed to be read although it is a pickle is one file, by its exact name."""
    name = recipe.backbone.allow_pickle
    if name is None:
        return
    endings = f"{', '.join(PICKLE_SUFFIXES[:-1])} or {PICKLE_SUFFIXES[-1]}"
    if not name.endswith(PICKLE_SUFFIXES) or any(sign in name for sign in "/\\*?["):
        yield Conflict(
            ("backbone.allow_pickle",),
            f"it is the exact name of one file, which ends in {endings}",
            "name the file, such as pytorch_model.bin",
        )


def revisions_are_of_the_hub(recipe: Recipe) -> Iterator[Conflict]:
    """What is on this machine has no revisions or configurations of the Hub."""
    data = recipe.data.path
    for key, value, where, name in [
        ("backbone.revision", recipe.backbone.revision, "backbone.id", recipe.backbone.id),
        ("data.revision", recipe.data.revision, "data.path", data if isinstance(data, str) else data[0]),
        ("data.config", recipe.data.config, "data.path", data if isinstance(data, str) else data[0]),
    ]:
        if value is not None and not on_hub(name):
            what = "configuration" if key == "data.config" else "revision"
            yield Conflict((key, where), f"only a Hub id has a {what}", f"remove {key}")
