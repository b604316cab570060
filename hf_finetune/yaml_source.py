"""YAML that remembers where every value was written.

Scalars follow YAML 1.2: `1e-3` is a number and `yes` is text (PyYAML follows 1.1: the other way round).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import yaml

from hf_finetune.recipe_errors import Place, Problem


@dataclass(frozen=True)
class Node:
    """A YAML value and its place."""

    value: Any
    """A scalar, a list of nodes, or a dict from text to nodes."""
    place: Place
    """For a value in a mapping, the place of its key."""
    text: str = ""
    """A scalar as it is written."""


_TAG = "tag:yaml.org,2002:"
_PATTERNS = {  # YAML 1.2.2, section 10.3.2
    "null": r"(?:null|Null|NULL|~|)",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)",
    "int": r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)",
    "float": r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
}
_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": lambda text: text,
}


class _Loader(yaml.SafeLoader):
    """PyYAML's reader and composer with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes what `_Loader` would not read as text, without aliases."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^{_pattern}$"), None)


def read_yaml(
    text: str, source: str, *, order: int = 0, lines: bool = True
) -> tuple[Node | None, list[Problem]]:
    """Parse one YAML document: its root, None when it is empty or no YAML, and what is wrong with it.

    `lines` is False for a source that has none, such as the command line.
    """
    problems: list[Problem] = []

    def place(mark: Any) -> Place:
        return Place(source, mark.line + 1 if mark and lines else 0, order)

    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark, line, what, remedy = _syntax_error(error, text)
        given = f"given {_shortened(line)}; not YAML: {what}" if line else f"not YAML: {what}"
        return None, [Problem(place(mark), "", (given, remedy))]
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1 if lines else 0
        what = f"not text: it holds the control character {error.character:#04x}"
        return None, [
            Problem(Place(source, line_number, order), "", (what, "save the file as plain UTF-8 text"))
        ]
    finally:
        if loader is not None:
            loader.dispose()
    return (None if root is None else _construct(root, "", (), place, problems)), problems


def to_yaml(value: Any, *, flow: bool = False) -> str:
    """Write plain data as YAML that `read_yaml` reads back; `flow` writes it on one line."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow or False,
        width=2**31,
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def plain(node: Node) -> Any:
    """Return the value without its places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def from_plain(value: Any, place: Place) -> Node:
    """Return plain data as nodes that all stand at `place`; keys and paths become text."""
    if isinstance(value, PurePath):
        return Node(str(value), place)
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(child, place) for key, child in value.items()}, place)
    if isinstance(value, (list, tuple)):
        return Node([from_plain(child, place) for child in value], place)
    return Node(value, place)


def walk(node: Node, key: str = "") -> Iterator[tuple[str, Node]]:
    """Yield every dotted key below `node` with its node, outer before inner."""
    children: Any = ()
    if isinstance(node.value, dict):
        children = node.value.items()
    elif isinstance(node.value, list):
        children = enumerate(node.value)
    for name, child in children:
        inner = f"{key}.{name}" if key else str(name)
        yield inner, child
        yield from walk(child, inner)


# Part of PyYAML's message, whether its context is the place to look at, what is wrong, what to do.
_SYNTAX = (
    ("'\\t'", False, "a tab in the indent", "indent with spaces"),
    ("mapping values are not allowed", False, "the line does not continue the one above",
     "align it with its neighbours, and check the line above for a missing ':'"),
    ("expected <block end>", False, "the indent does not fit the lines above",
     "align the line with its neighbours"),
    ("could not find expected ':'", True, "a line without ': '", "write KEY: VALUE"),
    ("unexpected end of stream", True, "a quote that is not closed", "close it"),
    ("expected ',' or", True, "a bracket that is not closed, or a missing comma",
     "close it with ] or }, and put text that holds brackets or commas in quotes"),
    ("expected the node content", True, "a bracket that is not closed, or a missing value",
     "close it with ] or }"),
    ("found undefined alias", False, "an alias (*name) without its anchor (&name)",
     "put text that starts with * in quotes"),
    ("but found another document", False, "a second document begins here", "keep one document in a file"),
    ("cannot start any token", False, "a value cannot start with this character", "put the value in quotes"),
)  # fmt: skip


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> tuple[Any, str, str, str]:
    """Return the mark of a syntax error, its line, what is wrong and what to do."""
    problem = error.problem or error.context or "it cannot be read"
    found = (problem, False, problem, "correct the line")
    _, in_context, what, remedy = next((known for known in _SYNTAX if known[0] in problem), found)
    mark = (error.context_mark if in_context else None) or error.problem_mark or error.context_mark
    every = text.splitlines()
    line = every[mark.line].strip() if mark and mark.line < len(every) else ""
    if "mapping values" in problem and len(re.findall(r":(?:\s|$)", line)) > 1:
        what, remedy = "a second ': ' on one line", "put text that contains ': ' in quotes"
    return mark, line, what, remedy


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _construct(
    node: yaml.Node, key: str, outer: tuple[int, ...], at: Callable[[Any], Place], problems: list[Problem]
) -> Node:
    place = at(node.start_mark)
    if id(node) in outer:
        problems.append(
            Problem(place, key, ("an alias refers to the value it stands in", "write the value out"))
        )
        return Node(None, place)
    inner = (*outer, id(node))
    if isinstance(node, yaml.SequenceNode):
        items = [_construct(item, f"{key}.{i}", inner, at, problems) for i, item in enumerate(node.value)]
        return Node(items, place)
    if isinstance(node, yaml.MappingNode):
        return Node(_construct_mapping(node, key, inner, at, problems), place)
    read = _READ.get(node.tag.removeprefix(_TAG))
    try:
        if read is not None:
            return Node(read(node.value), place, node.value)
    except ValueError:
        pass
    problems.append(
        Problem(
            place,
            key,
            (f"given the tag {node.tag.replace(_TAG, '!!')}, which a recipe has no use for", "remove it"),
        )
    )
    return Node(None, place)


def _construct_mapping(
    node: yaml.MappingNode,
    key: str,
    outer: tuple[int, ...],
    at: Callable[[Any], Place],
    problems: list[Problem],
) -> dict[str, Node]:
    mapping: dict[str, Node] = {}
    for name_node, value_node in node.value:
        place = at(name_node.start_mark)
        if not isinstance(name_node, yaml.ScalarNode):
            problems.append(Problem(place, key, ("a key is a word, not a list or a mapping",)))
            continue
        name = name_node.value
        inner = f"{key}.{name}" if key else name
        if name in mapping:
            first = mapping[name].place
            problems.append(Problem(place, inner, (f"repeated key, first at {first}", "keep one of the two")))
            continue
        mapping[name] = replace(_construct(value_node, inner, outer, at, problems), place=place)
    return mapping
