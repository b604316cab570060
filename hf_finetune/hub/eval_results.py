"""Measurements as the Hub stores them: model-index in the card, and `.eval_results/*.yaml` for benchmarks."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from hf_finetune.hub.base_model import hub_file
from hf_finetune.hub.card_facts import CardFacts, Measured

FOLDER = ".eval_results"
LOCAL = "local"
"""What model-index gets for the id of a data set that the Hub does not have: the name alone would point at another."""


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the metrics of the weights for model-index; what is not a number is left out."""
    at = facts.measured
    values = facts.best["metrics"] if facts.best else {}
    return [
        EvalResult(
            task_type=facts.recipe.task,
            dataset_type=at.hub_id or LOCAL,
            dataset_name=at.name,
            dataset_config=at.config,
            dataset_split=at.split,
            dataset_revision=at.revision,
            dataset_args=at.arguments or None,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def eval_result_files(facts: CardFacts) -> dict[str, str]:
    """Return the files for `.eval_results/` by name: one where the data set is a benchmark of the Hub, else none.

    A benchmark is a data set with an `eval.yaml` that lists its tasks, each a configuration and a split
    (https://huggingface.co/docs/hub/eval-results). Figures of a part of the split are none of the benchmark's.
    """
    at, best = facts.measured, facts.best
    if at.hub_id is None or best is None or not at.is_whole_split or not math.isfinite(best["value"]):
        return {}
    tasks = [task for task in _tasks(at) if _is(task, at)]
    date = datetime.now(timezone.utc).date().isoformat()
    entries = [
        EvalResultEntry(
            dataset_id=at.hub_id,
            task_id=str(task["id"]),
            value=best["value"],
            dataset_revision=at.revision,
            date=date,
            notes=f"{best['metric']}; the split also chose these weights, the best of {facts.evaluations} evaluations",
        )
        for task in tasks
    ]
    name = at.hub_id.replace("/", "--") + ".yaml"
    return {name: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)} if entries else {}


def _tasks(at: Measured) -> list[dict[str, Any]]:
    """Return the tasks that a data set declares; none where it is no benchmark or the Hub is not to be had."""
    file = hub_file(at.hub_id, "eval.yaml", at.revision, "dataset") if at.hub_id else None
    try:
        declared = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, yaml.YAMLError):
        return []
    tasks = declared.get("tasks") if isinstance(declared, dict) else None
    return [task for task in tasks or [] if isinstance(task, dict) and "id" in task]


def _is(task: dict[str, Any], at: Measured) -> bool:
    return task.get("config", "default") == (at.config or "default") and task.get("split", "test") == at.split
