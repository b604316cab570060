"""A trained model from wherever it lies: a run folder, a model folder, a repository of the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError, UserError
from hf_finetune.fetch import Pinned
from hf_finetune.models.layout import ADAPTER_CONFIG
from hf_finetune.models.load import Backbone, load_backbone
from hf_finetune.models.source import find_trained
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.runfolder import MODEL, RECIPE, STATUS, load_run
from hf_finetune.tasks import TASKS


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


def _label_names(folder: Path) -> tuple[str, ...]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("label_names") or config.get("id2label") or {}
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if not names:
        raise UserError(f"{folder}: config.json holds no label names, so predictions have no words.")
    return tuple(str(name) for name in names)
