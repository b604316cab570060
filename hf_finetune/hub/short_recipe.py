"""A recipe without what is default anyway: short enough to be read, and still the same recipe."""

from __future__ import annotations

from typing import Any

from hf_finetune.recipe import Recipe, parse_recipe
from hf_finetune.yaml_source import to_yaml

_NAMED = ("strategy", "optimizer", "schedule")
"""Sections whose name decides what the defaults of their other keys are."""


def short_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with the keys that differ from their defaults; it loads to an equal recipe."""
    values = recipe.model_dump(by_alias=True)
    named = {key: {"name": values[key]["name"]} for key in _NAMED}
    if "phases" in values["strategy"]:
        named["strategy"] = values["strategy"]
    defaults = parse_recipe(named).model_dump(by_alias=True)
    short = _difference(values, defaults)
    for key, first in (("backbone", "id"), ("data", "path")):  # always said
        short[key] = {first: values[key][first]} | short.get(key, {})
    for key in _NAMED:
        short[key] = named[key] | short.get(key, {})
    return to_yaml({key: short[key] for key in values if key in short})


def _difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _difference(value, default):
                found[key] = inner
        elif key not in defaults or value != default:
            found[key] = value
    return found
