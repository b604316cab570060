"""A trained model at work: metrics on a split, predictions for new inputs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from torch import nn

from hf_finetune.data.checks import read_image
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import EvalSet, eval_loader, eval_tokens
from hf_finetune.errors import UserError, did_you_mean
from hf_finetune.evaluation import Evaluation, evaluate, to_device
from hf_finetune.models.forward import placed
from hf_finetune.models.load import forward
from hf_finetune.precision import accelerator_in
from hf_finetune.recipe import Recipe
from hf_finetune.report.tables import print_table
from hf_finetune.setup import process_state
from hf_finetune.tasks import TASKS
from hf_finetune.tasks.loss import probabilities
from hf_finetune.tasks.metrics import EVALUATE_PREFIX, default_metric
from hf_finetune.trained import Trained, load_trained, rows_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
TEXT_SUFFIXES = (".txt", ".csv", ".jsonl")
FORMATS = ("table", "csv", "jsonl")
BATCH_SIZE = 32
"""Rows of a batch at least; as many as the run had in one when it measured."""


def evaluate_model(place: str, options: Sequence[str]) -> Evaluation:
    """Print the metrics of a trained model on a split.

    Args:
        place: run folder, model folder or Hub repository.
        options: `data=…` (another data set of the same labels) and `split=…`; the run's validation split otherwise.
    """
    trained = load_trained(place)
    recipe, labels = trained.recipe, trained.labels
    found = rows_of(place, trained, options)
    rows, split = found.rows, found.split
    if "label" not in rows.column_names:
        raise UserError(f"{place}: split '{split}' has no labels to measure against; `predict` needs none.")
    accelerator = _accelerator(recipe)
    model = _ready(trained, accelerator)
    loader = _loader(rows, trained, accelerator)
    result = evaluate(model, loader, labels, _metrics(trained), accelerator)
    if accelerator.is_main_process:
        where = f"{found.path}, split {split}: {len(rows)} rows"
        commit = f" (commit {trained.repository.commit[:12]})" if trained.repository else ""
        print_table(
            f"{place}{commit} on {where}",
            ["metric", "value"],
            [*result.metrics.items(), ("loss", result.loss)],
        )
        if trained.recorded and split == "validation" and found.own:
            _say(f"recorded by the run: {trained.recorded['metric']} {trained.recorded['value']:.4f}")
    return result


def _metrics(trained: Trained) -> list[str]:
    """Return the names of the metrics to compute: those of the run."""
    monitor = trained.recipe.monitor
    names = list(dict.fromkeys([monitor.metric, *monitor.metrics, default_metric(trained.labels.kind)]))
    foreign = [name for name in names if trained.repository and name.startswith(EVALUATE_PREFIX)]
    if foreign:
        # Such a metric is a script that would be fetched and run because a repository says so.
        sys.stderr.write(f"note: {', '.join(foreign)} is left out: a recipe from the Hub may not run code\n")
    return [name for name in names if name not in foreign]


def _ready(trained: Trained, accelerator: Accelerator) -> nn.Module:
    """Return the model where and how the run measured it, so that it gives the same numbers."""
    return placed(trained.backbone.model.eval(), accelerator.device, TASKS[trained.recipe.task].modality)


def predict_inputs(
    place: str, inputs: Sequence[str], *, form: str = "table", top: int = 1
) -> list[dict[str, Any]]:
    """Print the model's predictions for images or texts and return them, one row per input and label.

    Args:
        place: run folder, model folder or Hub repository.
        inputs: image files or folders of them; texts, or `.txt` (a text a line), `.csv`, `.jsonl` files.
        form: `table`, `csv` or `jsonl`.
        top: labels per input, the likeliest first; multi-label models give every label over 0.5, at least one.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose from {', '.join(FORMATS)}.{did_you_mean(form, FORMATS)}")
    trained = load_trained(place)
    names, rows = (_image_rows if TASKS[trained.recipe.task].modality == "image" else _text_rows)(
        inputs, trained
    )
    accelerator = _accelerator(trained.recipe)
    model = _ready(trained, accelerator)
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in _loader(rows, trained, accelerator):
            with accelerator.autocast():
                logits = forward(model, to_device(batch["inputs"], accelerator.device))
            for index, values in zip(
                batch["indices"].tolist(), probabilities(trained.labels.kind, logits).tolist(), strict=True
            ):
                found[index] = values
    answers = [
        answer
        for index, name in enumerate(names)
        for answer in _answers(name, found[index], trained.labels, top)
    ]
    _write(answers, form)
    return answers


def _answers(name: str, values: list[float], labels: Labels, top: int) -> Iterable[dict[str, Any]]:
    if labels.kind == "regression":
        yield {"input": name, "value": values[0]}
        return
    ranked = sorted(zip(labels.names, values, strict=True), key=lambda pair: -pair[1])
    count = max(top, sum(value > 0.5 for value in values)) if labels.kind == "multi" else top
    for label, value in ranked[:count]:
        yield {"input": name, "label": label, "probability": value}


def _write(answers: list[dict[str, Any]], form: str) -> None:
    columns = list(answers[0])
    if form == "table":
        print_table("", columns, [list(answer.values()) for answer in answers])
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, columns)
        writer.writeheader()
        writer.writerows(answers)
    else:
        for answer in answers:
            _say(json.dumps(answer, ensure_ascii=False))


def _image_rows(inputs: Sequence[str], trained: Trained) -> tuple[list[str], Dataset]:
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"predict: there is no file or folder '{given}'; this model reads images.")
    if not files:
        raise UserError(f"predict: no image in {', '.join(inputs)} ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    cells = [{"bytes": None, "path": str(path.resolve())} for path in files]
    rows = Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
    return [str(path) for path in files], rows.with_transform(_decode)


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"image": [read_image(cell, f"'{cell['path']}'") for cell in batch["image"]]}


def _text_rows(inputs: Sequence[str], trained: Trained) -> tuple[list[str], Dataset]:
    """Read texts; in csv and jsonl files from the column(s) the model was trained on."""
    columns = trained.recipe.data.columns.text
    wanted = [columns] if isinstance(columns, str) else list(columns)
    texts: list[list[str]] = []
    for given in inputs:
        path = Path(given)
        if path.suffix in {".csv", ".jsonl"} and path.is_file():
            records = _records(path)
            missing = [name for name in wanted if records and name not in records[0]]
            if missing:
                raise UserError(
                    f"predict: {path} has no column '{missing[0]}'.{did_you_mean(missing[0], records[0])} "
                    f"It has {', '.join(records[0])}."
                )
            texts += [[str(record[name]) for name in wanted] for record in records]
        elif path.suffix == ".txt" and path.is_file():
            texts += [[line] for line in _read_text(path).splitlines() if line.strip()]
        elif os.path.isfile(given) or (path.suffix in TEXT_SUFFIXES and not re.search(r"\s", given)):
            # A file's name is no text to classify: it was meant to be read.
            what = "is not a file predict reads" if os.path.isfile(given) else "there is no such file"
            raise UserError(
                f"predict: {given}: {what}. Give texts, or files that end in {', '.join(TEXT_SUFFIXES)}."
            )
        else:
            texts.append([given])
    if len(wanted) == 2 and any(len(text) == 1 for text in texts):
        raise UserError(
            "predict: this model reads pairs of texts; give a .csv or .jsonl file with both columns."
        )
    if not texts:
        raise UserError(f"predict: no text in {', '.join(inputs)}.")
    data = {name: [text[i] for text in texts] for i, name in enumerate(("text", "text_pair")[: len(wanted)])}
    rows = Dataset.from_dict(data, features=Features({name: Value("string") for name in data}))
    return [" | ".join(text) for text in texts], rows


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a csv or jsonl file."""
    text = _read_text(path)
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f'predict: {path}:{number} is not a JSON object. Write one a line, such as {{"text": "…"}}.'
            )
        records.append(record)
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"predict: {path} cannot be read as UTF-8 text: {error}.") from None


def _loader(rows: Dataset, trained: Trained, accelerator: Accelerator) -> Any:
    dataset = EvalSet(rows, trained.labels, trained.backbone.input, max_length=trained.recipe.data.max_length)
    training = trained.recipe.training
    micro = training.micro_batch_size
    size = max(
        BATCH_SIZE, micro if isinstance(micro, int) else training.batch_size // accelerator.num_processes
    )
    tokens = eval_tokens(dataset.lengths, size, accelerator.device, training.micro_batch_tokens)
    return eval_loader(
        dataset,
        batch_size=size,
        tokens=tokens,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def _accelerator(recipe: Recipe) -> Accelerator:
    """Return an accelerator in the precision the model was measured in."""
    process_state()
    return accelerator_in(recipe.training.precision)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
