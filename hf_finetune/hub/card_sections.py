"""The sections of a model card: each turns the facts into Markdown, or into nothing where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable

from hf_finetune.hub.card_facts import CardFacts
from hf_finetune.hub.card_usage import snippets
from hf_finetune.hub.card_words import (
    adapters,
    base_model,
    data_link,
    duration,
    license_terms,
    model_link,
    plain,
    rows_measured,
    scored,
    table,
    version,
)
from hf_finetune.hub.published import published_split
from hf_finetune.hub.short_recipe import short_recipe
from hf_finetune.report.compare import wilson_interval
from hf_finetune.report.results import (
    SHARES,
    confused_pairs,
    evaluation_table,
    label_scores,
    metric_table,
)
from hf_finetune.report.tables import markdown_table

CURVES, CONFUSION = "curves.png", "confusion.png"
OPEN_ROWS = 30
"""Rows of a table that are shown unfolded."""
_ENDED = {
    "running": "The run was still going on when this was written.",
    "interrupted": "The run was interrupted; this is what it had kept until then.",
    "failed": "The run failed before its end; this is what it had kept until then.",
}


def summary(facts: CardFacts) -> str:
    """Return the title and one sentence."""
    base, at, best, task = facts.base, facts.measured, facts.best, facts.recipe.task
    name = base.name.rpartition("/")[2]
    named = model_link(base.hub_id) if base.hub_id else f"`{name}`"
    method = facts.adapter["method"] if facts.adapter else ""
    if not base.pretrained:
        what = f"`{base.architecture}` of {facts.library} trained from random weights for {task}"
    elif facts.is_adapter:
        what = f"A {method} adapter of {named} for {task}"
    else:
        what = f"{named} {f'adapted with {method}' if method else 'fine-tuned'} for {task}"
    title = f"# {plain(name)} on {plain(at.name)}\n\n{what} on {data_link(facts)}"
    if best is None:
        return f"{title}. Its weights were never measured."
    metric = best["metric"].replace("_", " ")
    interval = ""
    if best["metric"] in SHARES:
        interval = " (95 % interval {:.3f} to {:.3f})".format(*wilson_interval(best["value"], at.rows))
    return f"{title}: **{metric} {best['value']:.4f}**{interval} on {at.rows:,} validation rows."


def results(facts: CardFacts) -> str:
    """Return the metrics of these weights, where they were measured, and how the weights were chosen."""
    if facts.best is None:
        return "## Results\n\nThese weights were never measured: no evaluation of the run gave a number."
    best, at = facts.best, facts.measured
    table = metric_table(best["metrics"], best["loss"], at.rows)
    count = facts.evaluations
    average = ", of the average of the weights" if facts.recipe.training.ema else ""
    lines = [
        "## Results",
        f"Measured on {rows_measured(facts)}, at step {best['step']:,} (epoch {best['epoch']:g}){average}:",
        markdown_table(table.columns, table.rows),
    ]
    if facts.is_adapter and facts.quantized:
        lines.append(
            f"These are figures of the base model in {facts.quantized['kind']} (bitsandbytes: "
            f"{facts.quantized['layers']} linear layers of its blocks). On the base model in full precision the "
            "adapter works too, and answers differ a little."
        )
    if count == 1 and any(each["solver"] == "lbfgs" for each in facts.solved):
        lines.append(
            "The same rows chose the weight decay and measured the weights, so the figures are on the optimistic side; "
            "rows the run never saw would tell more."
        )
    if count > 1:
        lines.append(
            f"These are the best of {count} evaluations by validation {best['metric']}. The same rows chose and "
            "measured the weights, so the figures are on the optimistic side; rows the run never saw would tell more."
        )
    return "\n\n".join(lines)


def confusion(facts: CardFacts) -> str | None:
    """Return the picture of what is taken for what, and the most frequent mistakes."""
    if facts.answers is None or facts.labels.kind != "single":
        return None
    lines = ["## What is confused"]
    if CONFUSION in facts.pictures:
        lines.append(f"![Confusion matrix]({CONFUSION})")
    pairs = confused_pairs(facts.answers, limit=5)
    names = [plain(name) for name in facts.labels.names]
    if len(names) > 2 and pairs:
        rows = [[names[true], names[guess], count, of] for true, guess, count, of in pairs]
        lines.append(markdown_table(("true label", "taken for", "rows", "of"), rows))
    if not pairs:
        lines.append(f"No mistake on {facts.measured.rows:,} rows.")
    return "\n\n".join(lines) if len(lines) > 1 else None


def usage(facts: CardFacts) -> str:
    """Return code to copy."""
    blocks = [f"```python\n{code}\n```" for code in snippets(facts)]
    if len(blocks) > 1:
        blocks.insert(1, "or")
    return "\n\n".join(["## Use", *blocks])


def labels(facts: CardFacts) -> str:
    """Return the labels with their rows in every split, and how well each is told where that is known."""
    known, report = facts.labels, facts.report
    if known.kind == "regression":
        counts = ", ".join(f"{count:,} {role}" for role, count in report.rows.items())
        return f"## Output\n\nOne number, the column `{known.names[0]}`; rows: {counts}."
    roles = [role for role in report.rows if role in report.class_counts]  # a stream is not counted by class
    scores = label_scores(facts.answers, known.outputs) if facts.answers else None
    rows = []
    for number, name in enumerate(known.names):
        counted = [report.class_counts.get(role, {}).get(name, 0) for role in roles]
        rows.append([number, plain(name), *counted, *(scored(scores[number]) if scores else [])])
    columns = ["id", "label", *(f"{role} rows" for role in roles)]
    columns += ["precision", "recall", "F1"] if scores else []
    table = markdown_table(columns, rows)
    if len(rows) > OPEN_ROWS:
        table = f"<details><summary>{len(rows)} labels</summary>\n\n{table}\n\n</details>"
    said = "Any number of labels for each input." if known.kind == "multi" else ""
    said += " Precision, recall and F1 are of the validation rows." if scores else ""
    return "\n\n".join(["## Labels", *([said.strip()] if said else []), table])


def origin(facts: CardFacts) -> str:
    """Return what the model was made from: base model, its licence, the data."""
    at, report = facts.measured, facts.report
    lines = ["## Made from", f"**Base model.** {base_model(facts)}", f"**Licence.** {license_terms(facts)}"]
    splits = ", ".join(
        f"{count:,} rows for {role} from `{published_split(report.splits.get(role, role))}`"
        for role, count in report.rows.items()
    )
    drawn = (
        f" The validation rows are {at.held_out:g} of the training split, drawn with seed {at.seed}."
        if at.held_out
        else ""
    )
    if facts.recipe.data.streaming:
        drawn += f" Training rows were read as a stream of `{published_split(report.splits['train'])}`."
    skipped = sum(report.skipped.values())
    left = f" {skipped:,} unusable rows were left out." if skipped else ""
    sample = (
        f" Of every split at most {facts.recipe.data.max_samples:,} rows were used."
        if facts.recipe.data.max_samples
        else ""
    )
    lines.append(
        f"**Data.** {data_link(facts)}{version(at)}: {splits}.{drawn}{sample}{left} "
        f"Fingerprint of the rows: `{report.fingerprint}`."
    )
    return "\n\n".join(lines)


def training(facts: CardFacts) -> str:
    """Return which layers learned at what rate."""
    share = 100 * facts.trainable_size / facts.total_size
    lines = [
        "## Training",
        f"Strategy `{facts.recipe.strategy.name}`: {facts.trainable_size:,} of {facts.total_size:,} parameters "
        f"({share:.3g} %) learned.{adapters(facts)}",
    ]
    lines += [
        f"The output layer was fitted to convergence by {plain(each['note'])}." for each in facts.solved
    ]
    if facts.phases:
        lines += ["Phases:", table(facts.phases)]
    lines += [
        "Layer groups, from input to output, with the learning rate of each (`-` is frozen):",
        table(facts.layers),
    ]
    return "\n\n".join(lines)


def evaluations(facts: CardFacts) -> str | None:
    """Return the evaluations over the run, the best one in bold type, and the curves."""
    table = evaluation_table(facts.rows, facts.best)
    if not table.rows:
        return None
    bold = next((number for number, row in enumerate(table.rows) if row[0]), None)
    lines = ["## Evaluations", markdown_table(table.columns, table.rows, bold=bold)]
    if table.note:
        lines.append(table.note)
    if CURVES in facts.pictures:
        lines.append(f"![Loss, metric and learning rates over the steps]({CURVES})")
    return "\n\n".join(lines)


def recipe(facts: CardFacts) -> str:
    """Return the recipe, without what is default."""
    return (
        "## Recipe\n\nWhat differs from the defaults; `recipe.yaml` beside this card has every key.\n\n"
        f"```yaml\n{short_recipe(facts.recipe).strip()}\n```"
    )


def environment(facts: CardFacts) -> str | None:
    """Return hardware, time, emissions and versions."""
    run = facts.run
    lines = []
    if hardware := run.get("hardware"):
        gpus = hardware.get("gpus") or []
        on_gpu = str(hardware.get("device", "cpu")) != "cpu" and gpus
        device = gpus[0] if on_gpu else f"{hardware['cpu']}, {hardware['cores']} cores"
        processes = run.get("processes", 1)
        lines.append(
            f"- Hardware: {plain(device)}"
            + (f", {processes} processes" if processes > 1 else "")
            + f"; precision {facts.recipe.training.precision}"
        )
    if seconds := run.get("wall_seconds"):
        lines.append(f"- Wall time: {duration(seconds)}, loading and measuring included")
    if emissions := run.get("emissions"):
        place = emissions.get("country")
        at = (
            f"the electricity of {place}"
            if place
            else "the world's average electricity, the place being unknown"
        )
        lines.append(
            f"- Energy: {emissions['energy_kwh']:.3g} kWh, about {emissions['co2_grams']:.3g} g of CO2-eq with {at} "
            "(codecarbon, of the main process's machine)"
        )
    if versions := run.get("versions"):
        lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if not lines:
        return None
    if ended := _ENDED.get(str(run.get("status"))):
        lines.append(f"- {ended}")
    return "\n\n".join(["## Environment", "\n".join(lines)])


SECTIONS: dict[str, Callable[[CardFacts], str | None]] = {
    "summary": summary,
    "results": results,
    "confusion": confusion,
    "usage": usage,
    "labels": labels,
    "origin": origin,
    "training": training,
    "evaluations": evaluations,
    "recipe": recipe,
    "environment": environment,
}
"""Name of a section, as its comments in the card say it -> its text; in the card's order."""
