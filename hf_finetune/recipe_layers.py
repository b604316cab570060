"""The layers of a recipe: short forms written out, one layer merged over another, overrides applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_finetune.errors import nearest
from hf_finetune.recipe_errors import Place, Problem
from hf_finetune.recipe_schema import Keys, dotted, known_keys, node_at, written
from hf_finetune.recipe_spec import SHORT_FORMS
from hf_finetune.schedule import Cosine
from hf_finetune.yaml_source import Node, read_yaml

COMMAND_LINE = Place("command line", order=1_000_000)

# A section that names another of these than the layer below starts afresh: options of one strategy mean
# nothing to another. What stands here is the name of a section that gives none.
_RESTARTS = {"strategy": None, "optimizer": "auto", "schedule": Cosine().name}
# Saying the one takes back what a layer below said of the other.
_ALTERNATIVES = {"training": ("epochs", "steps")}


def spelled_out(node: Node) -> Node:
    """Return one layer with its short forms written out, so that layers can be merged key by key."""
    written = dict(node.value)
    for section, key in SHORT_FORMS.items():
        child = written.get(section)
        if child is None or child.value is None or isinstance(child.value, dict):
            continue
        if section == "data" or not isinstance(child.value, list):
            written[section] = Node({key: child}, child.place)
    augment = written.get("augment")
    if augment is not None and isinstance(augment.value, list):
        items = [
            i if isinstance(i.value, (dict, list)) else Node({"name": i}, i.place) for i in augment.value
        ]
        written["augment"] = Node(items, augment.place)
    return Node(written, node.place)


def merged(below: Node, above: Node, section: str = "") -> Node:
    """Return two layers as one: mappings key by key, everything else as the layer above says."""
    if (
        not isinstance(below.value, dict)
        or not isinstance(above.value, dict)
        or _restarts(section, below, above)
    ):
        return above
    given_way = _give_way(section, above)
    result = {key: child for key, child in below.value.items() if key not in given_way}
    for key, child in above.value.items():
        inner = f"{section}.{key}".lstrip(".")
        result[key] = merged(result[key], child, inner) if key in result else child
    return Node(result, above.place)


def _restarts(section: str, below: Node, above: Node) -> bool:
    """Return whether the layer above names another strategy (optimizer, schedule) than the one below."""
    named = _name(section, above, None)
    return section in _RESTARTS and named is not None and named != _name(section, below, _RESTARTS[section])


def _name(section: str, node: Node, default: str | None) -> Any:
    if "name" in node.value:
        return node.value["name"].value
    return "phases" if section == "strategy" and "phases" in node.value else default


def _give_way(section: str, above: Node) -> set[str]:
    """Return the keys of lower layers that what is said above takes back."""
    names = _ALTERNATIVES.get(section, ())
    said = [name for name in names if name in above.value and above.value[name].value is not None]
    return set(names) - set(said) if said else set()


def overridden(node: Node, text: str, problems: list[Problem]) -> Node:
    """Return the recipe with one `KEY=VALUE` or `~KEY` applied; what is wrong goes to `problems`."""
    remove = text.startswith("~")
    key, equals, value_text = text.removeprefix("~").partition("=")
    key = key.strip()

    def problem(*lines: str) -> Node:
        problems.append(Problem(COMMAND_LINE, key or text, lines))
        return node

    if not key or any(not part for part in key.split(".")) or remove == bool(equals):
        return problem(
            f"given {text}; allowed: KEY=VALUE, KEY= for null, or ~KEY to take a key out",
            f"for example {'~' + key if remove and key else (key or 'training.epochs') + '=VALUE'}",
        )
    if key == "extends":
        return problem(
            "a file says what it extends, the command line does not", "load the other recipe instead"
        )
    value, found = read_yaml(value_text, COMMAND_LINE.source, order=COMMAND_LINE.order, lines=False)
    if found:
        return problem(*found[0].lines)
    keys = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    if remove and node_at(node, keys) is node_at(node, keys[:-1]):
        known = known_keys(keys[:-1], node)
        if known is not None and keys[-1] in known:
            return node  # known, and at its default already
        match = nearest(str(keys[-1]), known or [])
        return problem("there is no such key to take out", *([f"did you mean '{match}'?"] if match else []))
    change = removal if remove else _setting(value or Node(None, COMMAND_LINE))
    try:
        return changed(node, keys, (), change)
    except LookupError as error:
        return problem(*error.args)


Change = Callable[[Node, Keys, "str | int"], Node]
"""(section, its keys, the last key) -> the section changed."""


def changed(node: Node, keys: Keys, outer: Keys, change: Change) -> Node:
    """Return `node` with `change` made in the section of the last key; sections on the way are created."""
    key = keys[0]
    if isinstance(node.value, list):
        if not isinstance(key, int) or key >= len(node.value):
            count = len(node.value)
            items = f"{count} item{'s' if count != 1 else ''}, counted from 0"
            raise LookupError(
                f"{dotted(outer)} has {items}", f"to replace the list set {dotted(outer)} itself"
            )
    elif node.value is None:
        node = Node({}, node.place)
    elif not isinstance(node.value, dict):
        raise LookupError(
            f"{dotted(outer)} is {written(node)}, which has no keys inside",
            f"set {dotted(outer)} itself",
        )
    if isinstance(node.value, dict):
        key = str(key)
    if len(keys) == 1:
        return change(node, outer, key)
    inside = isinstance(node.value, list) or key in node.value
    child = node.value[key] if inside else Node({}, COMMAND_LINE)
    return _with(node, key, changed(child, keys[1:], (*outer, key), change))


def _with(node: Node, key: str | int, child: Node) -> Node:
    if isinstance(node.value, list):
        return Node([child if i == key else item for i, item in enumerate(node.value)], node.place)
    return Node({**node.value, key: child}, node.place)


def _setting(value: Node) -> Change:
    """Return the change that puts `value` in place of what a key holds."""

    def change(node: Node, outer: Keys, key: str | int) -> Node:
        if not outer:
            return _with(node, key, spelled_out(Node({str(key): value}, value.place)).value[key])
        if outer == ("augment",):
            items = spelled_out(Node({"augment": Node([value], value.place)}, value.place)).value["augment"]
            return _with(node, key, items.value[0])
        if not isinstance(node.value, dict):
            return _with(node, key, value)
        # As between layers, but what the command line said before stays, so that the order of overrides does not
        # matter; and an optimizer's dotted name changes one key, since its options are those of every optimizer.
        section, above = dotted(outer), Node({str(key): value}, value.place)
        restarts = section != "optimizer" and _restarts(section, node, above)
        given_way = set(node.value) if restarts else _give_way(section, above)
        kept = {k: c for k, c in node.value.items() if k not in given_way or c.place == COMMAND_LINE}
        return _with(Node(kept, node.place), key, value)

    return change


def removal(node: Node, outer: Keys, key: str | int) -> Node:
    """Return a section without a key, a list without an item."""
    if isinstance(node.value, list):
        return Node([item for i, item in enumerate(node.value) if i != key], node.place)
    return Node({k: child for k, child in node.value.items() if k != key}, node.place)
