"""Tables for people: drawn by rich on a terminal, plain aligned columns anywhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.strategies.phase import PhasePlan

if TYPE_CHECKING:
    from hf_finetune.models.adapter import Adapter

MANY_PHASES = 5
_NUMERIC = re.compile(r"^[-+]?\.?\d")


class Table(NamedTuple):
    """What `print_table` takes: `print_table(*table)`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    note: str = "",
    *,
    file: TextIO | None = None,
    color: bool | None = None,
) -> None:
    """Print a table; columns of numbers are aligned right, None is shown as `-`.

    Args:
        title: a line above; empty for none.
        columns: names, one per cell of a row.
        rows: cells: text, or numbers, which are shown to four digits.
        note: a line below; empty for none.
        file: stdout when None.
        color: draw with rich; when None, if `file` is a terminal.
    """
    file = file or sys.stdout
    cells = [[format_cell(cell) for cell in row] for row in rows]
    right = [all(_NUMERIC.match(row[i]) or row[i] in ("-", "") for row in cells) for i in range(len(columns))]
    if file.isatty() if color is None else color:
        _print_rich(title, columns, cells, note, right, file)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [title] if title else []
    for row in [list(columns), *cells]:
        aligned = (
            cell.rjust(w) if to_right else cell.ljust(w)
            for cell, w, to_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(aligned).rstrip())
    file.write("\n".join([*lines, *([note] if note else [])]) + "\n")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, bold: int | None = None) -> str:
    """Return a table as Markdown, columns of numbers aligned right; row `bold` in bold type."""
    cells = [[format_cell(cell) for cell in row] for row in rows]
    right = [
        bool(cells) and all(_NUMERIC.match(row[i]) or row[i] in ("-", "") for row in cells)
        for i in range(len(columns))
    ]
    lines = [list(columns), ["---:" if each else "---" for each in right]]
    lines += [
        [f"**{cell}**" if number == bold and cell else cell for cell in row]
        for number, row in enumerate(cells)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def phase_table(
    plans: Sequence[PhasePlan], anatomy: Anatomy, base_lr: float, steps: Sequence[int | None] | None = None
) -> Table:
    """Return what each phase trains, for how long, at what rates.

    Args:
        plans: the phases on this backbone.
        anatomy: the backbone's.
        base_lr: what the multiples multiply.
        steps: optimizer steps of each phase; its duration as written when None.
    """
    sizes = {p.name: p.size for p in anatomy.parameters}
    groups = {p.name: p.group for p in anatomy.parameters}
    total = sum(sizes.values())
    rows = []
    for number, plan in enumerate(plans):
        learning = sum(sizes[name] for name in plan.multiples)
        head = [base_lr * m for name, m in plan.multiples.items() if groups[name] == HEAD]
        rest = [base_lr * m for name, m in plan.multiples.items() if groups[name] != HEAD]
        count = steps[number] if steps is not None else None
        length = f"{count:,} steps" if count is not None else str(plan.duration or "the rest")
        if plan.solver:
            length = "1 step"
        rows.append([
            number + 1, plan.name, length + (" or plateau" if plan.patience else ""), short_count(learning),
            f"{100 * learning / total:.3g} %", plan.solver or _rates(head), _rates(rest), plan.batch_norm,
        ])  # fmt: skip
    columns = ("phase", "trains", "for", "trainable", "share", "head's rate", "other rates", "batch norm")
    return Table("Phases", columns, rows)


def layer_table(plans: Sequence[PhasePlan], anatomy: Anatomy, base_lr: float) -> Table:
    """Return each layer group with its parameters and its rate in every phase, `-` where it is frozen.

    Where a solver fits it, its name stands for the rate. Of many phases, the ones in which the group learns and the
    span of its rates.
    """
    rows = []
    for group in anatomy.groups:
        members = [p for p in anatomy.parameters if p.group == group]
        rates = [
            [base_lr * plan.multiples[p.name] for p in members if p.name in plan.multiples] for plan in plans
        ]
        if len(plans) <= MANY_PHASES:
            shown = [
                (plan.solver if own and plan.solver else _rates(own))
                + (" (part)" if 0 < len(own) < len(members) else "")
                for own, plan in zip(rates, plans, strict=True)
            ]
        else:
            learns = [number for number, own in enumerate(rates, 1) if own]
            shown = [_ranges(learns), _rates([rate for own in rates for rate in own])]
        rows.append([group, len(members), short_count(sum(p.size for p in members)), *shown])
    if len(plans) == 1:
        columns = ["rate"]
    elif len(plans) <= MANY_PHASES:
        columns = [f"{number}: {plan.name}" for number, plan in enumerate(plans, 1)]
    else:
        columns = ["learns in phases", "rate"]
    return Table("Layer groups", ("group", "tensors", "parameters", *columns), rows)


def target_table(adapter: Adapter) -> Table:
    """Return the layers that get adapters, those of equal name and shape in one row, and what was left out."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for target in adapter.targets:
        alike.setdefault((_numbers_open(target.name), target.kind, target.shape), []).append(target.size)
    rows: list[list[Any]] = [
        [name, kind, " x ".join(map(str, shape)), len(sizes), short_count(sum(sizes))]
        for (name, kind, shape), sizes in alike.items()
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in adapter.left_out.items():
        reasons.setdefault(reason, []).append(_numbers_open(name))
    left_out = [
        f"left out, {reason}: {', '.join(list(dict.fromkeys(names))[:4])} ({len(names)})"
        for reason, names in reasons.items()
    ]
    facts = adapter.facts()
    title = (
        f"Adapters: {facts['method']} in {facts['layers']} layers, {short_count(facts['size'])} parameters"
    )
    return Table(title, ("layer", "kind", "weight", "count", "adapters"), rows, "\n".join(left_out))


def _numbers_open(name: str) -> str:
    """`blocks.3.mlp.fc1` as `blocks.*.mlp.fc1`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def short_count(count: float) -> str:
    """Return a number of parameters in three digits: 812, 5.13 k, 2.22 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:g}"


def format_cell(cell: Any) -> str:
    """Return a cell's text."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _rates(rates: Sequence[float]) -> str:
    if not rates:
        return "-"
    low, high = f"{min(rates):.2g}", f"{max(rates):.2g}"
    return low if low == high else f"{low} … {high}"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 as `1-3, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) or "-"


def _print_rich(
    title: str, columns: Sequence[str], cells: list[list[str]], note: str, right: list[bool], file: TextIO
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, header_style="bold cyan", padding=(0, 1, 0, 0))
    for i, (name, to_right) in enumerate(zip(columns, right, strict=True)):
        # Where room is short the words of the first and last column fold, and headers; figures never do.
        figures = 0 < i < len(columns) - 1
        width = max((len(row[i]) for row in cells), default=0) if figures else None
        justify: Literal["left", "right"] = "right" if to_right else "left"
        table.add_column(Text(name), justify=justify, min_width=width, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style="dim" if cell == "-" else "") for cell in row))
    console = Console(file=file, force_terminal=True)
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)
    if note:
        console.print(Text(note, style="dim"))
