"""Write docs/recipes.md, every key of a recipe, from the specs themselves.

    python scripts/recipe_reference.py            write the page anew
    python scripts/recipe_reference.py --check    exit with 1 when the page is not what the specs say

Types and defaults come from the fields, meanings from the docstrings under them, so the page cannot disagree with what
a recipe accepts. A new option, strategy, schedule or augmentation appears by itself.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare checkout, before any install

from hf_finetune.augment.spec import (
    BATCH_AUGMENTATIONS,
    IMAGE_AUGMENTATIONS,
    TEXT_AUGMENTATIONS,
    AugmentationSpec,
)
from hf_finetune.recipe_schema import allowed_words, shown
from hf_finetune.recipe_spec import Recipe
from hf_finetune.schedule import SCHEDULES, ScheduleSpec
from hf_finetune.spec import Spec
from hf_finetune.strategies import STRATEGIES
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import Phase
from hf_finetune.tasks.metrics import METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"

INTRODUCTION = """\
# Recipes: every key

A recipe is a YAML file; every key but `strategy` may be left out. This page is written from the specs by
`python scripts/recipe_reference.py`; a test holds it up to date.

- **Short forms.** A bare value for `backbone`, `data`, `strategy`, `optimizer` or `schedule` stands for its first key:
  `backbone: timm/resnet18.a1_in1k` is `backbone: {id: timm/resnet18.a1_in1k}`, `strategy: full` is `{name: full}`.
- **Extending.** `extends: other.yaml` (beside this file, or a shipped recipe's name) is read first; mappings merge key
  by key, lists are replaced. A section that names another strategy, optimizer or schedule starts afresh.
- **Overrides.** `KEY=VALUE` on the command line, with a dotted key and a YAML value: `training.epochs=3`. `a.b=` sets
  nothing (null), `~a.b` takes a key out so that its default holds. `data=…` replaces the whole section, `data.path=…`
  one key.
- **Durations** are `N epochs`, `N steps` (of the optimizer) or `N%` of the run. **Rates** are a number (`3e-4`) or a
  multiple of the base rate (`0.1x`).
- **`auto`** is resolved from the backbone's family, the strategy and the data's size; `hf-finetune explain` prints each
  choice with its reason, and the `recipe.yaml` in the run folder holds what it became.
"""

# Sections that hold one of several specs: what all share, and the specs under headings.
TABLES: dict[str, tuple[type[Spec], list[tuple[str, Mapping[str, type[Spec]]]]]] = {
    "strategy": (StrategySpec, [("", STRATEGIES)]),
    "schedule": (ScheduleSpec, [("", SCHEDULES)]),
    "augment": (
        AugmentationSpec,
        [
            ("For images", IMAGE_AUGMENTATIONS),
            ("For batches of images", BATCH_AUGMENTATIONS),
            ("For texts", TEXT_AUGMENTATIONS),
        ],
    ),
}
LEADS = {
    "strategy": (
        "Which layers learn when. A bare name takes the defaults; when to use which: [strategies.md](strategies.md)."
    ),
    "schedule": "How the rate runs from the first step to the last, as a multiple of each group's own rate.",
    "augment": (
        "`auto`, `none`, `light`, `standard` or `strong`, or a list of the following: names, or mappings with options "
        "(`[horizontal_flip, {name: rotation, degrees: 10}]`). A preset means what suits the task and the data's size."
    ),
}


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, "## At the top\n", table(Recipe)]
    for key, field in Recipe.model_fields.items():
        if key in TABLES:
            parts += [f"## {key}\n", LEADS[key] + "\n", *table_section(*TABLES[key])]
            if key == "strategy":
                parts += ["### An item of `phases`\n", summary(Phase) + "\n", *section(Phase, "phases", 3)]
        else:
            for spec in specs_in(field.annotation):
                parts += [f"## {key}\n", summary(spec) + "\n", *section(spec, key, 2)]
    metrics = "\n".join(f"| `{name}` | {', '.join(m.kinds)} | {m.mode} |" for name, m in METRICS.items())
    parts += [
        "## Metrics\n",
        "`loss`, one of these, or `evaluate/NAME` for any other metric of the evaluate library.\n",
        f"| metric | for labels | better |\n| --- | --- | --- |\n{metrics}\n",
    ]
    return "\n".join(parts)


def section(spec: type[Spec], path: str, level: int) -> Iterator[str]:
    """Yield the table of a spec, then those of the specs inside it."""
    yield table(spec)
    for name, field in spec.model_fields.items():
        for inner in dict.fromkeys(specs_in(field.annotation)):
            if inner is not Phase:
                inside = f"{path}.{field.alias or name}"
                yield f"{'#' * (level + 1)} {inside}\n"
                yield summary(inner) + "\n"
                yield from section(inner, inside, level + 1)


def table_section(base: type[Spec], groups: list[tuple[str, Mapping[str, type[Spec]]]]) -> Iterator[str]:
    """Yield what all choices of a section share, then each choice with the keys of its own."""
    shared = {name: field for name, field in base.model_fields.items() if name != "name"}
    if shared:
        yield f"Whatever its name:\n\n{table(base, shared)}"
    for title, specs in groups:
        if title:
            yield f"### {title}\n"
        for name, spec in specs.items():
            own = {
                key: field for key, field in spec.model_fields.items() if key != "name" and key not in shared
            }
            yield f"{'####' if title else '###'} `{name}`\n\n{summary(spec)}\n"
            if own:
                yield table(spec, own)


def table(spec: type[Spec], fields: Mapping[str, FieldInfo] | None = None) -> str:
    """Return the keys of a spec as a markdown table."""
    meanings = field_docstrings(spec)
    rows = []
    for name, field in (fields or spec.model_fields).items():
        takes = " · ".join(kind(word) for word in allowed_words(spec, name))
        rows.append([f"`{field.alias or name}`", takes, default(field), meanings.get(name, "")])
    lines = [["key", "takes", "default", "meaning"], ["---"] * 4, *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


def kind(word: str) -> str:
    """Return one of the things a key takes as markdown: code where it is written as it stands."""
    for section in ("a section", "a list of a section"):
        if word.startswith(f"{section} with "):
            return "a list of sections" if "list" in section else section
    if word.startswith("a list of random_"):
        return "a list"
    written = word not in ("text", "a list of text") and (" " not in word or word.startswith(("{", "N ")))
    return f"`{word}`" if written else word


def default(field: FieldInfo) -> str:
    """Return a field's default as YAML; of a section its sign that it has its own table."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        name = getattr(value, "name", None)
        return f"`{name}`" if name in (*SCHEDULES, *STRATEGIES) else "see below"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    if isinstance(value, list) and all(isinstance(each, float) for each in value) and value:
        return f"`[{', '.join(f'{each:.4g}' for each in value)}]`"
    return f"`{shown(value if isinstance(value, (bool, int, str, list, dict, type(None))) else str(value))}`"


def specs_in(annotation: Any) -> list[type[Spec]]:
    """Return the specs that an annotation holds, those of the tables left out."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for part in get_args(annotation) for spec in specs_in(part)]


def summary(spec: type[Spec]) -> str:
    """Return a spec's docstring on one line."""
    return " ".join((inspect.getdoc(spec) or "").split())


def field_docstrings(spec: type[BaseModel]) -> dict[str, str]:
    """Return field -> the docstring that stands under it, those of base classes included."""
    found: dict[str, str] = {}
    for cls in reversed([each for each in spec.__mro__ if issubclass(each, Spec) and each is not Spec]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Write docs/recipes.md from the specs.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is not what the specs say; run `python scripts/recipe_reference.py`.")


if __name__ == "__main__":
    main()
