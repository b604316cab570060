"""A card that people edit: which parts were generated, and what to keep of the others when it is written again.

Generated sections stand between comments that hold a hash of what was generated. A section whose hash no longer fits
was edited by hand and is kept; everything outside of sections is kept. At its end a card records the metadata and the
sections that were generated, so that what was added, changed or removed by hand can be told from what is merely old.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils._fixes import yaml_dump

MEASURED = ("model-index", "co2_eq_emissions")
"""Metadata that belongs to the weights: always the new card's."""

NOTE = (
    "> *The section above was edited by hand and is kept as it was; it may speak of earlier weights.* "
    "<!-- hf_finetune:note -->"
)
_SECTION = re.compile(
    r"<!-- hf_finetune:begin (?P<key>[a-z_]+) (?P<mark>[0-9a-f]+) -->\r?\n"
    r"(?P<text>(?:(?!<!-- hf_finetune:begin ).)*?)"
    r"<!-- hf_finetune:end (?P=key) -->(?:\r?\n)?",
    re.DOTALL,
)
_NOTES = re.compile(rf"{re.escape(NOTE)}(?:\r?\n)*")
_RECORD = re.compile(r"<!-- hf_finetune:record (?P<json>\{.*?\}) -->(?:\r?\n)?", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """A generated section; `mark` is the hash of its text when it was generated."""

    key: str
    text: str
    mark: str

    @classmethod
    def new(cls, key: str, text: str) -> Section:
        """Return a section as it is generated."""
        return cls(key, text, _hash(text))

    @property
    def is_edited(self) -> bool:
        """Whether somebody changed it by hand."""
        return _hash(self.text) != self.mark

    def __str__(self) -> str:
        begin, end = f"hf_finetune:begin {self.key} {self.mark}", f"hf_finetune:end {self.key}"
        return f"<!-- {begin} -->\n{self.text.strip()}\n<!-- {end} -->\n"


@dataclass(frozen=True)
class Card:
    """A card taken apart: its metadata, and its body as sections and the text between them."""

    metadata: dict[str, Any]
    parts: list[Section | str]
    generated: dict[str, Any] = field(default_factory=dict)
    """The metadata that was generated when it was last written."""
    sections: list[str] = field(default_factory=list)
    """The sections that were ever generated for it."""

    def __str__(self) -> str:
        record = {"metadata": self.generated, "sections": self.sections}
        # In JSON `>` may be written so, which keeps `-->` out of the comment.
        plain = json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace(">", "\\u003e")
        body = "\n".join(str(part).strip("\n") + "\n" for part in self.parts if str(part).strip())
        front = yaml_dump(self.metadata, sort_keys=False).strip() if self.metadata else ""
        return f"---\n{front}\n---\n\n{body}\n<!-- hf_finetune:record {plain} -->\n"


def new_card(metadata: Mapping[str, Any], sections: Sequence[Section]) -> Card:
    """Return a card of generated parts alone."""
    own = {key: value for key, value in metadata.items() if key not in MEASURED}
    return Card(dict(metadata), list(sections), own, [section.key for section in sections])


def read_card(text: str) -> Card:
    """Take a card apart, whoever wrote it; metadata that is no YAML stays where it is, as text."""
    text = text.removeprefix("\ufeff")
    metadata: dict[str, Any] = {}
    if block := REGEX_YAML_BLOCK.search(text):
        try:
            found = yaml.safe_load(block.group(2))
        except (yaml.YAMLError, ValueError):
            found = False
        if found is None or isinstance(found, dict):
            metadata, text = found or {}, text[block.end() :]
    record: dict[str, Any] = {}
    for match in _RECORD.finditer(text):
        with suppress(ValueError):  # somebody's hand was here: then nothing is known to be generated
            record = json.loads(match["json"])
    text = _NOTES.sub("", _RECORD.sub("", text))
    parts: list[Section | str] = []
    at, seen = 0, set[str]()
    for match in _SECTION.finditer(text):
        if match["key"] in seen:  # a copy that somebody made is theirs
            continue
        seen.add(match["key"])
        parts += [text[at : match.start()], Section(match["key"], match["text"], match["mark"])]
        at = match.end()
    parts.append(text[at:])
    parts = [part for part in parts if str(part).strip()]
    return Card(metadata, parts, dict(record.get("metadata") or {}), list(record.get("sections") or []))


def keep_edits(new: str, old: str) -> str:
    """Return the card `new` with what people wrote into `old`, the card it replaces.

    Kept are text outside of generated sections, generated sections that were edited (with a remark that says so),
    removed sections as removed, and metadata that was added, changed or removed by hand; of lists, such as `tags`, the
    entries. All else is the new card's, `model-index` in any case. A card that somebody else wrote is kept whole: ours
    goes below it, and its metadata has precedence.
    """
    fresh, kept = read_card(new), read_card(old)
    ours = {part.key: part for part in fresh.parts if isinstance(part, Section)}
    parts: list[Section | str] = []
    for part in kept.parts:
        if isinstance(part, str):
            parts.append(part)
        elif part.is_edited:
            parts += [part, NOTE]
        elif part.key in ours:
            parts.append(ours[part.key])
    present = [part.key for part in parts if isinstance(part, Section)]
    before: str | None = None
    for key, section in ours.items():
        if key not in present and key in kept.sections:
            continue  # removed by hand
        if key not in present:
            parts.insert(_after(parts, before), section)
        before = key
    known = list(dict.fromkeys([*kept.sections, *fresh.sections]))
    metadata = _merged(fresh.metadata, kept.metadata, kept.generated)
    return str(Card(metadata, parts, fresh.generated, known))


def edited_sections(card: str) -> list[str]:
    """Return the names of the generated sections that were edited by hand."""
    return [part.key for part in read_card(card).parts if isinstance(part, Section) and part.is_edited]


def _after(parts: Sequence[Section | str], key: str | None) -> int:
    """Return the place behind section `key` (and its remark); without one before the first section, or at the end."""
    places = {part.key: place for place, part in enumerate(parts) if isinstance(part, Section)}
    if key is not None:
        place = places[key] + 1
        return place + (place < len(parts) and parts[place] == NOTE)
    return min(places.values(), default=len(parts))


def _merged(new: Mapping[str, Any], old: Mapping[str, Any], generated: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata: what people made of `generated` to get `old`, done to `new`."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys([*old, *new]):
        mine, theirs, before = new.get(key), old.get(key), generated.get(key)
        if key in MEASURED:
            value = mine
        elif isinstance(theirs, list) and isinstance(mine, list):
            was = before if isinstance(before, list) else []
            value = [each for each in mine if each in theirs or each not in was]
            value += [each for each in theirs if each not in was and each not in value]
        elif key not in old and key in generated:
            value = None  # removed by hand
        elif key in old and (key not in generated or theirs != before):
            value = theirs  # added or changed by hand
        else:
            value = mine
        if value is not None:
            found[key] = value
    return found


def _hash(text: str) -> str:
    """Return a hash that line ends and blanks at the edges do not change: the Hub's editor may."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n"))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]
