"""A trained model from wherever it lies: a run folder, a model folder, a repository of the Hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.data.labels import Labels
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import load_split, load_splits
from hf_finetune.data.stream_splits import load_streams
from hf_finetune.errors import DataError, ModelError, UserError, did_you_mean
from hf_finetune.fetch import Pinned
from hf_finetune.models.layout import ADAPTER_CONFIG
from hf_finetune.models.load import Backbone, load_backbone
from hf_finetune.models.source import find_trained
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.runfolder import MODEL, RECIPE, STATUS, load_run
from hf_finetune.tasks import TASKS

if TYPE_CHECKING:
    from datasets import Dataset


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


@dataclass(frozen=True)
class Found:
    """Rows of a split, and where they were found."""

    rows: Dataset
    path: str | list[str]
    split: str
    own: bool
    """They are of the data that the model was trained with."""


def rows_of(place: str, trained: Trained, options: Sequence[str], *, labelled: bool = True) -> Found:
    """Return the validation rows a model was measured on, or those that `data=…` and `split=…` name.

    Args:
        place: where the model lies, for error texts.
        trained: the model.
        options: `data=…` (another data set of the same labels), `split=…`.
        labelled: whether rows of other data need labels.

    Raises:
        UserError: an option is no such, or the model's own data has other labels by now.
        DataError: the data cannot be read.
    """
    asked: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in ("data", "split"):
            raise UserError(f"'{option}': give data=… and split=….{did_you_mean(key, ('data', 'split'))}")
        asked[key] = value
    recipe, labels, split = trained.recipe, trained.labels, asked.get("split", "validation")
    spec, seed, task = recipe.data, recipe.training.seed, recipe.task
    if "data" in asked:
        spec = DataSpec(
            path=asked["data"], columns=spec.columns, labels=spec.labels, max_length=spec.max_length
        )
        rows = load_split(spec, split, labels, seed=seed, task=task, labelled=labelled)
        return Found(rows, spec.path, split, own=False)
    if trained.data_commit:
        spec = spec.model_copy(update={"revision": trained.data_commit})
    try:
        if split not in {"train", "validation"} and not (split == "test" and spec.test is not None):
            rows = load_split(spec, split, labels, seed=seed, task=task, labelled=labelled)
            return Found(rows, spec.path, split, own=True)
        if spec.streaming and split == "test":
            rows = load_split(spec, str(spec.test), labels, seed=seed, task=task, labelled=labelled)
            return Found(rows, spec.path, split, own=True)
        if spec.streaming and split == "train":
            raise UserError(
                "split=train: it is a stream without an end. Measure another split, or give data=PATH."
            )
        if spec.streaming:
            splits = load_streams(spec, seed=seed, task=task, samples=1)
        else:
            splits = load_splits(spec, seed=seed, task=task)
    except DataError as error:
        if trained.recorded is not None:
            raise
        raise DataError(
            f"{error} That is the data which the recipe of {place} names; give it with data=PATH."
        ) from None
    if splits.labels != labels:
        raise UserError(
            f"{place}: the model knows the labels {', '.join(labels.names)}; its data now has "
            f"{', '.join(splits.labels.names)}. Give the data it was trained with, or data=…"
        )
    return Found(getattr(splits, split), spec.path, split, own=True)


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


def _label_names(folder: Path) -> tuple[str, ...]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("label_names") or config.get("id2label") or {}
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if not names:
        raise UserError(f"{folder}: config.json holds no label names, so predictions have no words.")
    return tuple(str(name) for name in names)
