"""What may stand in files that leave the machine: names of folders, never where they lie."""

from __future__ import annotations

from pathlib import Path

from hf_finetune.recipe import Recipe


def is_local(name: str) -> bool:
    """Return whether a recipe's `backbone.id` or `data.path` names a file or folder of this machine."""
    return not name.startswith("shipped/") and Path(name).expanduser().exists()


def published_name(name: str) -> str:
    """Return an id as it is, and a local path as its last part.

    The `./` before it keeps it from being taken for a Hub id, such as the folder `sst2` for the data set of that name.
    """
    return f"./{Path(name).expanduser().resolve().name}" if is_local(name) else name


def published_split(name: str) -> str:
    """Return a split's name or slice as it is, and of a file its last part."""
    return name.replace("\\", "/").rpartition("/")[2]


def published_recipe(recipe: Recipe, *, commit: str | None = None, data_commit: str | None = None) -> Recipe:
    """Return the recipe as it goes out with the model: what was done, not where on which machine.

    Args:
        recipe: the resolved one.
        commit: of the backbone's repository, which the recipe may name by a branch or not at all.
        data_commit: of the data set's repository, likewise.
    """
    data = recipe.data
    path = (
        published_name(data.path)
        if isinstance(data.path, str)
        else [published_name(file) for file in data.path]
    )
    splits = {
        role: published_split(split)
        for role in ("train", "validation", "test")
        if isinstance(split := getattr(data, role), str)
    }
    backbone = {"id": published_name(recipe.backbone.id)}
    if commit:
        backbone["revision"] = commit
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": data.model_copy(
                update={"path": path, "revision": data_commit or data.revision, **splits}
            ),
            "output": None,
            "hub": None,
            "trackers": [],
        }
    )
