"""Reading and writing recipes: `extends`, then the file, then overrides; one error holds every problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_finetune.checks import conflicts
from hf_finetune.checks.conflict import Conflict
from hf_finetune.errors import nearest
from hf_finetune.recipe_errors import Place, Problem, recipe_error
from hf_finetune.recipe_layers import changed, merged, overridden, removal, spelled_out
from hf_finetune.recipe_schema import (
    MISSING,
    Keys,
    dotted,
    known_keys,
    node_at,
    shown,
    spec_problems,
    written,
)
from hf_finetune.recipe_spec import (
    DEFAULT,
    EmaSpec,
    Origin,
    Precision,
    Recipe,
    TaskName,
    TrainingSpec,
)
from hf_finetune.yaml_source import Node, from_plain, plain, read_yaml, to_yaml, walk

__all__ = [
    "EmaSpec",
    "Precision",
    "Recipe",
    "ShippedRecipe",
    "TaskName",
    "TrainingSpec",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
]

_HERE = Path(__file__).parent
# In a wheel the recipes lie in the package, in a working copy beside it.
_SHIPPED = next(
    (place for place in (_HERE / "recipes", _HERE.parent / "recipes") if place.is_dir()), _HERE / "recipes"
)
_BASE = "base"

PYTHON = Place("recipe")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    path: Path
    purpose: str
    """The first line of its header."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or a shipped one by its name, and apply `KEY=VALUE` overrides.

    An override's key is dotted and its value YAML; `a.b=` sets null, `~a.b` takes a key out, so that its
    default holds. `data=…` replaces the whole section, `data.path=…` one key. Where a layer sets
    `training.steps`, the `epochs` of the layers below (and the default) give way, and the other way round.

    Raises:
        RecipeError: the file cannot be read, or everything that is wrong with the recipe, one block each.
    """
    file = _find(str(path))
    if file is None:
        raise recipe_error([_no_such_file(str(path))], str(path))
    problems: list[Problem] = []
    node = _read(file, problems, ())
    if node is None:
        raise recipe_error(problems, _display(file))
    return _build(node, overrides, problems, _display(file), file.stem)


def parse_recipe(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as plain data, in the form a YAML file would hold. Raises RecipeError."""
    problems: list[Problem] = []
    node = _extended(spelled_out(from_plain(dict(data), PYTHON)), Path(), problems, ())
    if node is None:
        raise recipe_error(problems, "the recipe")
    return _build(node, overrides, problems, "the recipe", "")


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every key, defaults included; it loads to an equal recipe."""
    return to_yaml(recipe.model_dump(by_alias=True))


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Return the recipes that come with the package, by name; not the base they extend."""
    found = {}
    for path in sorted(_SHIPPED.glob("*.yaml")):
        if path.stem != _BASE:
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            found[path.stem] = ShippedRecipe(path.stem, path, first.removeprefix("#").strip())
    return found


def _find(name: str, folder: Path | None = None) -> Path | None:
    """Return the file a name means: a path (from `folder`), else a shipped recipe, with or without .yaml."""
    path = (folder or Path()) / Path(name).expanduser()
    if path.is_file():
        return path
    shipped = _SHIPPED / f"{name.removesuffix('.yaml')}.yaml"
    return shipped if shipped.parent == _SHIPPED and shipped.is_file() else None


def _no_such_file(
    name: str, folder: Path | None = None, place: Place | None = None, key: str = ""
) -> Problem:
    path = (folder or Path()) / Path(name).expanduser()
    beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    match = nearest(path.name, beside)
    shipped = ", ".join([*shipped_recipes(), *([_BASE] if folder else [])])
    what = "there is no such file"
    if path.is_dir():
        what, inside = "a folder is no recipe", sorted(each.name for each in path.glob("*.y*ml"))
        hint = f"name a recipe in it: {', '.join(inside)}" if inside else "name a file"
    elif match:
        hint = f"did you mean '{Path(name).with_name(match)}'?"
    elif shipped_match := nearest(path.stem, shipped_recipes()):
        hint = f"did you mean the shipped recipe '{shipped_match}'?"
    else:
        hint = f"files beside it: {', '.join(beside)}" if beside else "check the path"
    return Problem(
        place or Place(name),
        key,
        (f"given {name}; {what}" if key else what, hint, f"shipped recipes: {shipped}"),
    )


def _display(file: Path) -> str:
    """Return a file's name as people would write it: relative when it lies below the working directory."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _read(file: Path, problems: list[Problem], chain: tuple[Path, ...]) -> Node | None:
    """Return a file merged over everything it extends; None, and a problem, when one of them is no recipe."""
    source, order = _display(file), len(chain)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        problems.append(Problem(Place(source, line, order), "", ("not UTF-8 text", "save the file as UTF-8")))
        return None
    except OSError as error:
        problems.append(Problem(Place(source, 0, order), "", (f"cannot be read: {error.strerror}",)))
        return None
    node, found = read_yaml(text, source, order=order)
    problems += found
    if node is None and not found:
        what = ("the file is empty", "a recipe names at least a strategy, such as `strategy: frozen`")
        problems.append(Problem(Place(source, 1, order), "", what))
    if node is None:
        return None
    if not isinstance(node.value, dict):
        what = (
            f"given {written(node)}; a recipe is a mapping of keys to values",
            "for example `strategy: frozen`",
        )
        problems.append(Problem(node.place, "", what))
        return None
    return _extended(spelled_out(node), file.parent, problems, (*chain, file.resolve()))


def _extended(node: Node, folder: Path, problems: list[Problem], chain: tuple[Path, ...]) -> Node | None:
    """Return a recipe merged over the one it extends."""
    extends = node.value.get("extends")
    node = Node({key: child for key, child in node.value.items() if key != "extends"}, node.place)
    if extends is None or extends.value is None:
        return node
    if not isinstance(extends.value, str):
        given = f"given {written(extends)}; allowed: a file beside this one, or a shipped recipe's name"
        problems.append(Problem(extends.place, "extends", (given,)))
        return None
    base = _find(extends.value, folder)
    if base is None:
        problems.append(_no_such_file(extends.value, folder, extends.place, "extends"))
        return None
    if base.resolve() in chain:
        circle = " -> ".join(path.name for path in (*chain[chain.index(base.resolve()) :], base))
        problems.append(
            Problem(extends.place, "extends", (f"goes in a circle: {circle}", "extend another recipe"))
        )
        return None
    below = _read(base, problems, chain)
    return merged(below, node) if below is not None else None


def _build(node: Node, overrides: Sequence[str], problems: list[Problem], source: str, name: str) -> Recipe:
    """Return the recipe that layers and overrides make, or raise the error with everything that is wrong."""
    for override in overrides:
        node = overridden(node, override, problems)
    recipe, broken, found = _validated(node)
    unclear = {problem.key for problem in problems if problem.key}
    problems += [problem for problem in found if not any(_touches(problem.key, key) for key in unclear)]
    if recipe is not None:
        unclear |= {dotted(keys) for keys in broken}
        problems += [
            _conflict_problem(conflict, recipe, node)
            for conflict in conflicts(recipe)
            if not any(_touches(key, other) for key in conflict.keys for other in unclear)
        ]
    if problems or recipe is None:
        raise recipe_error(problems, source)
    recipe._origin = Origin(name, {key: child.place for key, child in walk(node)})
    return recipe


def _validated(node: Node) -> tuple[Recipe | None, set[Keys], list[Problem]]:
    """Return the recipe, the keys left out to get one, and the problems.

    Wrong keys are left out until the rest is a recipe, so that what is wrong between the others shows too.
    """
    broken: set[Keys] = set()
    problems: list[Problem] = []
    for _ in range(5):
        try:
            return Recipe.model_validate(plain(node), by_alias=True, by_name=False), broken, problems
        except ValidationError as error:
            found = spec_problems(error, node)
            first = not problems
            # What is missing after the first round is what was left out.
            problems += [p for p in found.values() if first or not p.lines[0].startswith(MISSING)]
            for keys in found:
                broken.update(_suspects(keys, node))
                node, left_out = _without(node, keys)
                broken.add(left_out)
    return None, broken, problems


def _suspects(keys: Keys, node: Node) -> set[Keys]:
    """Return what a problem's key leaves unknown: itself, and the key it may be a misspelling of."""
    match = nearest(str(keys[-1]), known_keys(keys[:-1], node) or []) if keys else None
    return {keys, (*keys[:-1], match)} if match else {keys}


def _without(node: Node, keys: Keys) -> tuple[Node, Keys]:
    """Return the recipe without a wrong key, and what was left out: the section, where a key is missing.

    Lists are left out whole: without one item the others would change their numbers.
    """
    if keys == ("strategy",):
        return Node({**node.value, "strategy": from_plain({"name": "full"}, DEFAULT)}, node.place), keys
    parent = node_at(node, keys[:-1])
    if len(keys) > 1 and not (isinstance(parent.value, dict) and keys[-1] in parent.value):
        return _without(node, keys[:-1])
    return changed(node, keys, (), removal), keys


def _touches(key: str, other: str) -> bool:
    return key == other or key.startswith(other + ".") or other.startswith(key + ".")


def _conflict_problem(conflict: Conflict, recipe: Recipe, node: Node) -> Problem:
    """Return a conflict as a problem at the first of its keys that is written somewhere."""
    values, places = recipe.model_dump(by_alias=True), dict(walk(node))
    given_keys = [key for key in conflict.keys if key in places]
    key, *others = given_keys + [key for key in conflict.keys if key not in given_keys]
    section = next((outer for outer in _outwards(key) if outer in places), None)
    at = places[section].place if section else replace(node.place, line=0)
    said = {k: written(places[k]) if k in places else shown(_value(values, k)) for k in conflict.keys}
    given = f"given {said[key]}"
    if not others:
        return Problem(at, key, (f"{given}; {conflict.reason}", conflict.remedy))
    where = {other: places[other].place if other in places else DEFAULT for other in others}
    beside = [f"{other}: {said[other]} ({where[other]})" for other in others]
    return Problem(at, key, (f"{given}, with {', '.join(beside)}", conflict.reason, conflict.remedy))


def _outwards(key: str) -> Iterator[str]:
    """Yield a dotted key and the sections around it, inner before outer."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
