"""Reading and writing recipes: `extends`, then the file, then overrides; every problem in one error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_finetune.recipe_errors import Place, Problem, recipe_error
from hf_finetune.recipe_spec import EmaSpec, Origin, Precision, Recipe, TaskName, TrainingSpec
from hf_finetune.yaml_source import Node, from_plain, plain, read_yaml, to_yaml, walk

__all__ = [
    "EmaSpec", "Precision", "Recipe", "TaskName", "TrainingSpec", "dump_recipe", "load_recipe", "parse_recipe",
]

_HERE = Path(__file__).parent
SHIPPED = next((folder for folder in (_HERE / "recipes", _HERE.parent / "recipes") if folder.is_dir()), _HERE / "recipes")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file or by a shipped recipe's name and apply `KEY=VALUE` overrides.

    Raises:
        RecipeError: all problems of the recipe, one block each.
    """
    file = Path(path) if Path(path).is_file() else SHIPPED / f"{path}.yaml"
    node = _read(file)
    for override in overrides:
        key, _, text = override.partition("=")
        value, _problems = read_yaml(text, "command line", lines=False)
        _set(node, key.split("."), value or Node(None, Place("command line")))
    return _validate(node, str(path), file.stem)


def parse_recipe(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as plain data. Raises RecipeError."""
    return _validate(from_plain(dict(data), Place("recipe")), "the recipe", "")


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every key, defaults included; it loads to an equal recipe."""
    return to_yaml(recipe.model_dump(by_alias=True))


def _read(file: Path) -> Node:
    node, problems = read_yaml(file.read_text(encoding="utf-8"), str(file))
    if node is None or problems:
        raise recipe_error(problems, str(file))
    if "extends" in node.value:
        base = node.value.pop("extends").value
        return _merge(_read(file.parent / base), node)
    return node


def _merge(base: Node, over: Node) -> Node:
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = _merge(merged[key], child) if key in merged else child
    return Node(merged, over.place)


def _set(node: Node, keys: list[str], value: Node) -> None:
    for key in keys[:-1]:
        node = node.value.setdefault(key, Node({}, value.place))
    node.value[keys[-1]] = value


def _validate(node: Node, source: str, name: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(plain(node), by_alias=True, by_name=False)
    except ValidationError as error:
        raise recipe_error(
            [Problem(node.place, ".".join(map(str, e["loc"])), (e["msg"],)) for e in error.errors()], source
        ) from None
    recipe._origin = Origin(name, {key: child.place for key, child in walk(node)})
    return recipe
