"""What a recipe may hold, in words: pydantic judges, this module says what it found, a problem for each key.

The words come from the specs' own annotations, so a new option needs no line here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import nearest
from hf_finetune.foreign_names import ALIASES, DERIVED, RENAMED
from hf_finetune.recipe_errors import Problem
from hf_finetune.recipe_spec import OneOf, Recipe
from hf_finetune.spec import Duration, Rate, Size, Spec
from hf_finetune.strategies.phase import SELECTORS, Phase
from hf_finetune.strategies.surgical import Surgical
from hf_finetune.yaml_source import Node, plain, read_yaml, to_yaml

Keys = tuple[str | int, ...]

MISSING = "missing"
"""How a problem about a key that is not there begins."""

_LONGEST_VALUE = 60

# Messages of validators that say no more than what is allowed.
_SAID = ("choose", "a duration is written", "a rate is")

# Fields whose annotation is wider than what their validator takes, or says too little.
_WORDS: dict[tuple[type[Spec], str], tuple[str, ...]] = {
    (DataSpec, "validation"): ("auto", "a split name", "a fraction of train above 0 and below 1"),
    (Phase, "train"): (*SELECTORS, "a list of them"),
    (Surgical, "block"): ("first", "middle", "last", "stem", "block.N"),
}

_TYPES: dict[Any, tuple[str, ...]] = {
    str: ("text",),
    bool: ("true", "false"),
    Duration: ("N epochs", "N steps", "N%"),
    Rate: ("a number of at least 0 (3e-4)", "a multiple of the base rate (0.1x)"),
    Size: ("a size (8GB)",),
}


@dataclass(frozen=True)
class Slot:
    """What may stand at one place: an annotation with its constraints."""

    annotation: Any
    metadata: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    """Said instead of the annotation."""


def spec_problems(error: ValidationError, root: Node) -> dict[Keys, Problem]:
    """Return what pydantic found as problems, one for each place of the recipe.

    The branches of a union become one problem; where a deeper place says what is wrong, it alone is kept.
    """
    found: dict[Keys, list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_locate(item, root), []).append(item)
    problems: dict[Keys, Problem] = {}
    for keys, items in found.items():
        kinds = {item["type"] for item in items}
        if any(keys == other[: len(keys)] != other for other in found):
            continue
        if "missing" in kinds:
            if not _misspelt_beside(keys, found):
                problems[keys] = _missing(keys, root)
        elif "extra_forbidden" in kinds:
            problems[keys] = _unknown_key(keys, root)
        elif kinds & {"union_tag_invalid", "union_tag_not_found"}:
            problems[keys] = _unknown_name(keys, root)
        else:
            messages = [str(item["ctx"]["error"]) for item in items if item["type"] == "value_error"]
            problems[keys] = _wrong_value(keys, root, messages)
    return problems


def node_at(root: Node, keys: Keys) -> Node:
    """Return the node at `keys`, or the last one on the way that is there."""
    for key in keys:
        key = str(key) if isinstance(root.value, dict) else key
        inside = isinstance(root.value, dict) and key in root.value
        if not inside and not (
            isinstance(root.value, list) and isinstance(key, int) and key < len(root.value)
        ):
            break
        root = root.value[key]
    return root


def dotted(keys: Keys) -> str:
    """Return keys as they are written in overrides."""
    return ".".join(map(str, keys))


def written(node: Node) -> str:
    """Return a node's value as it is written, a number in its own digits."""
    number = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    return node.text if number and node.text else shown(plain(node))


def shown(value: Any) -> str:
    """Return a value as YAML on one line, shortened when it is long."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    try:
        text = to_yaml(value, flow=True)
    except yaml.YAMLError:  # a value from Python that YAML has no form for
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def listed(words: Sequence[str], last: str = "or") -> str:
    """Return `a, b or c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def known_keys(keys: Keys, root: Node) -> list[str] | None:
    """Return the keys that the section at `keys` may hold; None when any, or when it is no section."""
    specs = [spec for slot in [_slot_at(keys, root)] if slot for spec in _specs(slot, node_at(root, keys))]
    return [name for spec in specs for name in _fields(spec)] if specs else None


def allowed_words(spec: type[Spec], name: str) -> list[str]:
    """Return what a spec's field takes, in the words errors use."""
    return _allowed(_slot_of(spec, name))


def _slot_of(spec: type[Spec], name: str) -> Slot:
    field = spec.model_fields[name]
    return Slot(field.annotation, tuple(field.metadata), _WORDS.get((spec, name), ()))


def _locate(item: Any, root: Node) -> Keys:
    """Return the place pydantic means: its `loc` without the labels of union branches, which are no keys."""
    keys: list[str | int] = []
    for part in item["loc"]:
        if node_at(root, (*keys, part)) is not node_at(root, tuple(keys)):
            keys.append(part)
    return (*keys, item["loc"][-1]) if item["type"] == "missing" else tuple(keys)


def _options(slot: Slot) -> Iterator[Slot]:
    """Yield the branches of a slot's union, or the slot itself."""
    annotation, metadata = slot.annotation, slot.metadata
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        constraints = [
            c for each in inner for c in (each.metadata if isinstance(each, FieldInfo) else [each])
        ]
        yield from _options(Slot(annotation, (*metadata, *constraints)))
    elif get_origin(annotation) in (Union, types.UnionType):
        for branch in get_args(annotation):
            yield from _options(Slot(branch, metadata))
    else:
        yield Slot(annotation, metadata)


def _table(slot: Slot) -> OneOf | None:
    return next((each for each in slot.metadata if isinstance(each, OneOf)), None)


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _specs(slot: Slot, node: Node) -> Iterator[type[Spec]]:
    """Yield the specs that a section at this slot may be; of a table the one it names."""
    for option in _options(slot):
        if table := _table(option):
            name = table.name_of(plain(node))
            if isinstance(name, str) and name in table.specs:
                yield table.specs[name]
        elif _is_spec(option.annotation):
            yield option.annotation


def _fields(spec: type[Spec]) -> dict[str, tuple[str, FieldInfo]]:
    """Return YAML key -> (attribute, field)."""
    return {field.alias or name: (name, field) for name, field in spec.model_fields.items()}


def _slot_at(keys: Keys, root: Node) -> Slot | None:
    slot: Slot | None = Slot(Recipe)
    for position, key in enumerate(keys):
        if slot is None:
            return None
        slot = next(_inside(slot, node_at(root, keys[:position]), key), None)
    return slot


def _inside(slot: Slot, node: Node, key: str | int) -> Iterator[Slot]:
    for spec in _specs(slot, node):
        if isinstance(key, str) and key in _fields(spec):
            yield _slot_of(spec, _fields(spec)[key][0])
    for option in _options(slot):
        if get_origin(option.annotation) is list and isinstance(key, int):
            yield Slot(
                get_args(option.annotation)[0], words=tuple(w for w in slot.words if "list of" not in w)
            )
        elif get_origin(option.annotation) is dict:
            yield Slot(get_args(option.annotation)[1])


def _allowed(slot: Slot) -> list[str]:
    """Return what a slot takes: literal words first, then null, then kinds of values."""
    if slot.words:
        return list(slot.words)
    options = list(_options(slot))
    literals = [
        shown(word) for o in options if get_origin(o.annotation) is Literal for word in get_args(o.annotation)
    ]
    nulls = ["null" for o in options if o.annotation is type(None)]
    others = [
        o for o in options if get_origin(o.annotation) is not Literal and o.annotation is not type(None)
    ]
    return list(dict.fromkeys([*literals, *nulls, *(word for o in others for word in _kinds(o))]))


def _kinds(slot: Slot) -> list[str]:
    """Return the kinds of values that one branch of a slot takes."""
    annotation, origin = slot.annotation, get_origin(slot.annotation)
    if table := _table(slot):
        return list(table.specs)
    if origin is list:
        return [f"a list of {_many(Slot(get_args(annotation)[0]), slot.metadata)}"]
    if origin is dict:
        inner = get_args(annotation)[1]
        return ["a mapping" if inner is Any else f"a mapping from names to {listed(_allowed(Slot(inner)))}"]
    if _is_spec(annotation):
        return [f"a section with {', '.join(_fields(annotation))}"]
    if annotation in _TYPES:
        return list(_TYPES[annotation])
    return [("a whole number" if annotation is int else "a number") + _bounds(slot.metadata)]


def _bounds(metadata: Iterable[Any]) -> str:
    found = _constraints(metadata, ("gt", "ge", "lt", "le"))
    if found.keys() == {"ge", "le"}:
        return f" from {found['ge']:g} to {found['le']:g}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return " and".join(f" {words[name]} {bound:g}" for name, bound in found.items())


def _many(slot: Slot, metadata: Iterable[Any]) -> str:
    """Return how many items of what kind a list takes: `2 numbers`, `1 to 2 texts`."""
    found = _constraints(metadata, ("min_length", "max_length"))
    least, most = found.get("min_length", 0), found.get("max_length")
    count = "" if most is None else f"{most} " if least == most else f"{least} to {most} "
    kind = (
        listed(_allowed(slot))
        .replace("text", "texts")
        .replace("a number", "numbers")
        .replace("a section", "sections")
    )
    return f"{count}{kind}{', not empty' if least and most is None else ''}"


def _constraints(metadata: Iterable[Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(each, name) for each in metadata for name in names if hasattr(each, name)}


def _wrong_value(keys: Keys, root: Node, messages: list[str]) -> Problem:
    node, slot = node_at(root, keys), _slot_at(keys, root)
    assert slot is not None, keys
    value = plain(node)
    if messages and isinstance(value, dict) and any(True for _ in _specs(slot, node)):
        return _keys_conflict(keys, node, messages[0])
    allowed = _allowed(slot)
    hints = [
        _hint(node, slot, allowed),
        *(m.partition("; choose")[0] for m in messages if not m.startswith(_SAID)),
    ]
    return Problem(
        node.place,
        dotted(keys),
        (f"given {written(node)}; allowed: {listed(allowed)}", *(h for h in hints if h)),
    )


def _hint(node: Node, slot: Slot, allowed: list[str]) -> str | None:
    """Return what to do about a value of the wrong kind, where that can be told."""
    value = plain(node)
    takes = {option.annotation for option in _options(slot)}
    if isinstance(value, str):
        if bool in takes and value.lower() in ("yes", "on", "no", "off", "true", "false"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
        other, _ = read_yaml(value, "")
        if takes & {int, float, Rate} and other is not None and isinstance(other.value, (int, float)):
            return f"without the quotes it is a number: {value}"
        items = [Slot(get_args(each)[0]) for each in takes if get_origin(each) is list]
        if any((table := _table(o)) and value in table.specs for item in items for o in _options(item)):
            return f"write a list: [{value}]"
        match = nearest(value, [word for word in allowed if " " not in word])
        return f"did you mean '{match}'?" if match else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and Duration in takes:
        return f"for example {value:g} epochs"
    if isinstance(value, (int, float)) and str in takes and not takes & {int, float}:
        return f"in quotes it is text: '{written(node)}'"
    if value is None:
        section = any(_is_spec(each) for each in takes)
        return "remove the line, or write keys below it" if section else "leave the key out for its default"
    return None


def _keys_conflict(keys: Keys, node: Node, message: str) -> Problem:
    """Return the complaint of a spec about several of its keys, at the last of them that is written."""
    given_keys = [key for key in re.findall(r"`(\w+)`", message) if key in node.value]
    given_keys.sort(key=lambda key: (node.value[key].place.order, node.value[key].place.line))
    if not given_keys:
        return Problem(node.place, dotted(keys), (message,))
    reason, _, remedy = message.partition(": ")
    last = given_keys.pop()
    given = f"given {written(node.value[last])}"
    others = [f"{dotted((*keys, k))}: {written(node.value[k])} ({node.value[k].place})" for k in given_keys]
    lines = (", with ".join([given, *others]), reason, remedy)
    return Problem(node.value[last].place, dotted((*keys, last)), tuple(line for line in lines if line))


def _missing(keys: Keys, root: Node) -> Problem:
    slot = _slot_at(keys, root)
    allowed = f"{MISSING}; allowed: {listed(_allowed(slot))}" if slot else MISSING
    return Problem(node_at(root, keys[:-1]).place, dotted(keys), (allowed,))


def _misspelt_beside(keys: Keys, found: Iterable[Keys]) -> bool:
    """Return whether the missing key stands misspelt in its section."""
    beside = [str(other[-1]) for other in found if other[:-1] == keys[:-1] and other != keys]
    return nearest(str(keys[-1]), beside) is not None


def _unknown_name(keys: Keys, root: Node) -> Problem:
    """A section of a table whose name is missing or not in the table."""
    node, slot = node_at(root, keys), _slot_at(keys, root)
    table = next(t for option in _options(slot) if (t := _table(option)))  # type: ignore[arg-type]
    value = node.value.get("name") if isinstance(node.value, dict) else node
    names = listed(list(table.specs))
    if value is None:
        return Problem(node.place, dotted((*keys, "name")), (f"{MISSING}; allowed: {names}",))
    name = plain(value)
    key = dotted((*keys, "name")) if value is not node else dotted(keys)
    lines = [f"given {written(value)}; allowed: {names}"]
    aliases = ALIASES.get(str(keys[0]), {})
    match = nearest(str(name).replace("-", "_"), [*table.specs, *aliases])
    if match in aliases:
        lines.append(f"here it is called {aliases[match]}")
    elif match:
        lines.append(f"did you mean '{match}'?")
    return Problem(value.place, key, tuple(lines))


def _unknown_key(keys: Keys, root: Node) -> Problem:
    node, key, section = node_at(root, keys), str(keys[-1]), keys[:-1]
    known = known_keys(section, root) or []
    elsewhere, match = _elsewhere(key, section, root), nearest(key, known)
    # A section by almost its name tells itself by what it holds: `train: {epochs: 5}` is not data.train.
    if elsewhere and not (match and _holds_keys_of((*section, match), node.value, root)):
        lines = [elsewhere]
    else:
        deeper = {f"{home}.{name}".lstrip("."): name for home, name in _sections(Slot(Recipe))}
        far = None if match else next(iter(get_close_matches(key, deeper.values(), n=1, cutoff=0.8)), None)
        lines = [f"did you mean '{match}'?"] if match else []
        lines += (
            [f"did you mean {listed([path for path, name in deeper.items() if name == far])}?"] if far else []
        )
        lines.append(f"allowed: {', '.join(known if section else ['extends', *known])}")
    return Problem(node.place, dotted(keys), (f"unknown key, given {written(node)}", *lines))


def _holds_keys_of(section: Keys, value: Any, root: Node) -> bool:
    known = known_keys(section, root) or []
    return isinstance(value, dict) and bool(value) and set(value) <= set(known)


def _elsewhere(key: str, section: Keys, root: Node) -> str | None:
    """Say where an unknown key belongs: to another spec of its table, to another section, by another name."""
    slot = _slot_at(section, root)
    for table in [t for option in _options(slot) if (t := _table(option))] if slot else []:
        owners = [name for name, spec in table.specs.items() if key in _fields(spec)]
        if owners:
            name = table.name_of(plain(node_at(root, section)))
            return f"{key} is an option of {listed(owners)}, not of {name}"
    homes = list(dict.fromkeys(home for home, name in _sections(Slot(Recipe)) if name == key and home))
    if homes:
        return f"it belongs under {listed([f'{home}:' for home in homes])}"
    bare = key.lower().replace("-", "_")
    if bare in RENAMED and RENAMED[bare] != dotted(section):
        return f"here it is called {RENAMED[bare]}"
    return DERIVED.get(bare)


def _sections(slot: Slot, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (section, key) for every key of every section; items of lists have no place of their own."""
    for option in _options(slot):
        table = _table(option)
        for spec in (
            table.specs.values() if table else [option.annotation] if _is_spec(option.annotation) else []
        ):
            for name, (_, field) in _fields(spec).items():
                if name != "name":
                    yield path, name
                if get_origin(field.annotation) is not list:
                    yield from _sections(
                        Slot(field.annotation, tuple(field.metadata)), f"{path}.{name}" if path else name
                    )
