"""A trained model at work: metrics on a split, predictions for new inputs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Value
from torch import nn

from hf_finetune.data.checks import read_image
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import EvalSet, eval_loader
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import load_split, load_splits
from hf_finetune.errors import DataError, ModelError, UserError, did_you_mean
from hf_finetune.evaluation import Evaluation, evaluate, to_device
from hf_finetune.hub.fetch import Pinned
from hf_finetune.models.layout import ADAPTER_CONFIG
from hf_finetune.models.load import Backbone, forward, load_backbone
from hf_finetune.models.source import find_trained
from hf_finetune.precision import mixed_precision
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.report.tables import print_table
from hf_finetune.runfolder import MODEL, RECIPE, STATUS, load_run
from hf_finetune.setup import process_state
from hf_finetune.tasks import TASKS
from hf_finetune.tasks.loss import probabilities
from hf_finetune.tasks.metrics import EVALUATE_PREFIX, default_metric

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
TEXT_SUFFIXES = (".txt", ".csv", ".jsonl")
FORMATS = ("table", "csv", "jsonl")
BATCH_SIZE = 32
"""Rows of a batch at least; as many as the run had in one when it measured."""


@dataclass(frozen=True)
class Trained:
    """A trained model with the recipe it came from."""

    recipe: Recipe
    labels: Labels
    backbone: Backbone
    recorded: dict[str, Any] | None
    """What the run said of its best weights."""
    data_commit: str | None = None
    """Of a run: the commit of the Hub data set it was measured on. A published recipe names it itself."""
    repository: Pinned | None = None
    """Where it came from, if that is the Hub."""


def load_trained(place: str) -> Trained:
    """Load the model of a run folder, a model folder or a Hub repository (`user/name[@revision]`), with its recipe.

    Raises:
        UserError: there is no such run, or it holds no model or no recipe.
        ModelError: the model cannot be loaded.
        HubError: the Hub does not answer, and the cache lacks the repository.
    """
    path, recorded, recipe_file, repository, data_commit = Path(place), None, None, None, None
    if path.name == MODEL and (path.parent / STATUS).is_file():
        path = path.parent  # the run's own recipe knows where its data lies, the one to be published does not
    if (path / STATUS).is_file():
        run = load_run(path)
        if not run.model_folder.is_dir():
            raise UserError(f"{place}: this run kept no model (status {run.status.get('status')}).")
        folder, recorded, recipe_file = run.model_folder, run.best, run.recipe_path
        data_commit = (run.status.get("data") or {}).get("commit")
    else:
        folder, repository = find_trained(place)
    recipe_file = recipe_file or folder / RECIPE
    if not recipe_file.is_file():
        raise UserError(
            f"{place}: no recipe.yaml beside the model, so how its data was read is unknown. "
            "Give a run folder, its model/ folder, or a repository pushed from one."
        )
    recipe = load_recipe(recipe_file)
    if repository:
        _refuse_foreign_code(place, recipe, is_adapter=(folder / ADAPTER_CONFIG).is_file())
        if repository.note:
            sys.stderr.write(f"note: {repository.note}\n")
    labels = Labels(recipe.data.labels, _label_names(folder))
    modality = TASKS[recipe.task].modality
    if (folder / ADAPTER_CONFIG).is_file():
        from hf_finetune.models.adapter_files import load_adapter

        adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        pinned = {"revision": adapter["revision"]} if adapter.get("revision") else {}
        try:
            base = load_backbone(
                recipe.backbone.model_copy(update=pinned), labels, modality, seed=recipe.training.seed
            )
        except ModelError as error:
            raise ModelError(
                f"{place}: it is an adapter, and its base model cannot be loaded. {error}"
            ) from None
        return Trained(recipe, labels, load_adapter(base, folder), recorded, data_commit, repository)
    plain = {"id": str(folder), "revision": None, "pretrained": True, "keep_head": True, "quantize": None}
    spec = recipe.backbone.model_copy(update=plain)
    backbone = load_backbone(spec, labels, modality, seed=recipe.training.seed)
    if backbone.report.new:
        raise ModelError(
            f"{place}: {backbone.report.new[0]} is not in the model's weights; the folder is damaged."
        )
    return Trained(recipe, labels, backbone, recorded, data_commit, repository)


def _refuse_foreign_code(place: str, recipe: Recipe, *, is_adapter: bool) -> None:
    """Refuse to run code or read a pickle because a recipe from the Hub says so: somebody else wrote it.

    Raises:
        UserError: the model needs one of them.
    """
    backbone = recipe.backbone
    needs = {
        "trust_remote_code": backbone.trust_remote_code,
        "allow_pickle": is_adapter and backbone.allow_pickle is not None,
    }
    for key in (key for key, needed in needs.items() if needed):
        raise UserError(
            f"{place}: its recipe sets backbone.{key}, which a recipe from the Hub may not. Look at what it brings, "
            f"then fetch it with `hf download {place.partition('@')[0]} --local-dir DIR` and give that folder."
        )


def evaluate_model(place: str, options: Sequence[str]) -> Evaluation:
    """Print the metrics of a trained model on a split.

    Args:
        place: run folder, model folder or Hub repository.
        options: `data=…` (another data set of the same labels) and `split=…`; the run's validation split otherwise.
    """
    asked = _options(options, ("data", "split"))
    trained = load_trained(place)
    recipe, labels = trained.recipe, trained.labels
    spec, split = recipe.data, asked.get("split", "validation")
    if "data" in asked:
        spec = DataSpec(
            path=asked["data"], columns=spec.columns, labels=spec.labels, max_length=spec.max_length
        )
        rows = load_split(spec, split, labels, seed=recipe.training.seed, task=recipe.task)
    else:
        if trained.data_commit:
            spec = spec.model_copy(update={"revision": trained.data_commit})
        try:
            rows = _own_rows(place, spec, split, trained)
        except DataError as error:
            if trained.recorded is not None:
                raise
            raise DataError(
                f"{place}: the data its recipe names cannot be read here. {error} Give it with data=PATH."
            ) from None
    if "label" not in rows.column_names:
        raise UserError(f"{place}: split '{split}' has no labels to measure against; `predict` needs none.")
    accelerator = _accelerator(recipe)
    model = _ready(trained, accelerator)
    loader = _loader(rows, trained, accelerator)
    result = evaluate(model, loader, labels, _metrics(trained), accelerator)
    if accelerator.is_main_process:
        where = f"{spec.path}, split {split}: {len(rows)} rows"
        commit = f" (commit {trained.repository.commit[:12]})" if trained.repository else ""
        print_table(
            f"{place}{commit} on {where}",
            ["metric", "value"],
            [*result.metrics.items(), ("loss", result.loss)],
        )
        if trained.recorded and split == "validation" and "data" not in asked:
            _say(f"recorded by the run: {trained.recorded['metric']} {trained.recorded['value']:.4f}")
    return result


def _own_rows(place: str, spec: DataSpec, split: str, trained: Trained) -> Dataset:
    """Return the rows of a split of the data that a model was trained with."""
    recipe, labels = trained.recipe, trained.labels
    if split not in {"train", "validation"} and not (split == "test" and spec.test is not None):
        return load_split(spec, split, labels, seed=recipe.training.seed, task=recipe.task)
    splits = load_splits(spec, seed=recipe.training.seed, task=recipe.task)
    if splits.labels != labels:
        raise UserError(
            f"{place}: the model knows the labels {', '.join(labels.names)}; its data now has "
            f"{', '.join(splits.labels.names)}. Give the data it was trained with, or data=…"
        )
    rows: Dataset = getattr(splits, split)
    return rows


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
    model = trained.backbone.model.to(accelerator.device).eval()
    if TASKS[trained.recipe.task].modality == "image":
        model = model.to(memory_format=torch.channels_last)
    return model


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
    size = max(BATCH_SIZE, training.micro_batch_size or training.batch_size // accelerator.num_processes)
    return eval_loader(
        dataset, batch_size=size, rank=accelerator.process_index, world=accelerator.num_processes
    )


def _accelerator(recipe: Recipe) -> Accelerator:
    """Return an accelerator in the precision the model was measured in."""
    process_state()
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision(recipe.training.precision))


def _label_names(folder: Path) -> tuple[str, ...]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("label_names") or config.get("id2label") or {}
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if not names:
        raise UserError(f"{folder}: config.json holds no label names, so predictions have no words.")
    return tuple(str(name) for name in names)


def _options(options: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in allowed:
            raise UserError(
                f"'{option}': give {' and '.join(f'{name}=…' for name in allowed)}.{did_you_mean(key, allowed)}"
            )
        found[key] = value
    return found


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
