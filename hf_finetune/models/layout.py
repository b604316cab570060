"""What a model folder in Hub layout holds: config, weights that may be read, the base model of an adapter.

This module is light: it opens nothing but JSON.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_finetune.errors import ModelError, did_you_mean
from hf_finetune.fetch import Pinned, offline
from hf_finetune.models.spec import PICKLE_SUFFIXES, BackboneSpec

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RECIPE = "recipe.yaml"
_SHARDED_WEIGHTS = "model.safetensors.index.json"
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
"""Pickles that a Trainer leaves beside the weights."""
_CONVERT = (
    "Convert them to safetensors (`save_pretrained` of transformers does it, or "
    "https://huggingface.co/spaces/safetensors/convert), or take a revision that has them."
)


def file_names(folder: Path, pinned: Pinned | None) -> list[str]:
    """Return the names of a folder's files, those of its repository that were not fetched included."""
    names = {each.name for each in folder.iterdir()}
    if pinned:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):  # fetched by a library that does not list what there is
            names |= {each.path for each in get_cached_repo_tree(pinned.wanted.id, revision=pinned.commit)}
    return sorted(names)


def _holder(folder: Path, pinned: Pinned | None) -> str:
    """Return what lacks a file, in words."""
    if pinned is None:
        return str(folder)
    where = "the copy in the Hub's cache" if pinned.unreachable or offline() else "the repository"
    return f"{where}, commit {pinned.commit[:12]},"


def read_config(where: str, folder: Path, pinned: Pinned | None) -> dict[str, Any]:
    """Return a folder's config.json. Raises ModelError when it has none, or a broken one."""
    file = folder / CONFIG
    if not file.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        hint = f" Its sub-folder '{inner[0]}' has one: name that." if inner else ""
        raise ModelError(
            f"{where}: {_holder(folder, pinned)} holds no {CONFIG}.{hint} A folder in Hub layout holds {CONFIG} and "
            f"{WEIGHTS} (timm's `save_for_hf`, transformers' `save_pretrained`)."
        )
    return _read_json(where, file)


def _read_json(where: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {file} cannot be read as JSON ({error}). Save the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{where}: {file} is not a JSON object. Save the model again.")
    return config


def has_weights(where: str, folder: Path, library: str) -> bool:
    """Return whether there are safetensors.

    Raises:
        ModelError: some of several files are missing.
    """
    if (folder / WEIGHTS).is_file():
        return True
    index = folder / _SHARDED_WEIGHTS
    if library != "transformers" or not index.is_file():
        return False
    shards = set(_read_json(where, index).get("weight_map", {}).values())
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{where}: {folder} holds no {missing[0]}, one of {len(shards)} files that its weights are in. "
            "Fetch or save them all."
        )
    return True


def base_of(where: str, folder: Path, spec: BackboneSpec) -> BackboneSpec:
    """Return the backbone that the adapter in `folder` belongs on."""
    adapter = _read_json(where, folder / ADAPTER_CONFIG)
    name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    recipe: Any = None
    # The run's own recipe knows where the base model lies, the one to be published does not.
    file = (folder.parent if (folder.parent / "run.json").is_file() else folder) / RECIPE
    if file.is_file():  # it says how the base model was built
        import yaml

        with suppress(OSError, yaml.YAMLError):
            recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = recipe.get("backbone") if isinstance(recipe, dict) else None
    base = {"id": name} | (known if isinstance(known, dict) else {})
    if not isinstance(base["id"], str) or not base["id"]:
        raise ModelError(
            f"{where}: it is an adapter, and its {ADAPTER_CONFIG} names no base model. Start from that."
        )
    # What may be run or unpickled is for the recipe of this run to say, not for that of a repository.
    return BackboneSpec(
        id=base["id"],
        revision=revision or base.get("revision"),
        options=base.get("options") or {},
        allow_pickle=spec.allow_pickle,
    )


def allowed_pickle(
    where: str, spec: BackboneSpec, folder: Path, files: list[str], pinned: Pinned | None
) -> str:
    """Return the file of weights that are not safetensors, if the recipe allows it by name."""
    kinds = (*PICKLE_SUFFIXES, ".h5", ".msgpack")
    pickles = [name for name in files if name.endswith(kinds) and name not in _NOT_WEIGHTS]
    asked = spec.allow_pickle
    if asked and (folder / asked).is_file():
        return asked
    if asked:
        raise ModelError(
            f"{where}: {_holder(folder, pinned)} holds no '{asked}', which `backbone.allow_pickle` names."
            f"{did_you_mean(asked, pickles)} It holds {', '.join(pickles) or 'no such weights'}."
        )
    if pickles:
        single = pickles[0].endswith(PICKLE_SUFFIXES) and "-of-" not in pickles[0]
        allow = (
            f" Or allow this one file: `backbone.allow_pickle: {pickles[0]}` reads its tensors and runs nothing."
            if single
            else ""
        )
        raise ModelError(
            f"{where}: its weights are in {pickles[0]}, a format that can run code when it is read; "
            f"only safetensors are loaded. {_CONVERT}{allow}"
        )
    raise ModelError(
        f"{where}: {_holder(folder, pinned)} holds no {WEIGHTS}. Weights in other formats are not loaded. {_CONVERT} "
        "For random weights set `backbone.pretrained: false`."
    )


def foreign_code(folder: Path | None) -> str | None:
    """Return the other repository that a folder's `auto_map`s take code from (`user/repo--file.Class`), if any."""
    for file in sorted(folder.glob("*.json")) if folder else ():
        with suppress(OSError, ValueError, AttributeError):
            classes = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {}).values()
            named = [
                name for each in classes for name in (each if isinstance(each, list) else [each]) if name
            ]
            for name in named:
                if "--" in name:
                    return str(name).partition("--")[0]
    return None
