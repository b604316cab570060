"""What features depend on, as hashes: the content of the rows, how they are shown, the layers they run through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_finetune.augment.image import Shrink
from hf_finetune.data.columns import image_cells
from hf_finetune.data.loaders import EvalSet, TrainSet

_LABELS = ("id2label", "label2id", "problem_type", "_name_or_path", "transformers_version")
"""Keys of a transformers config that its layers do not depend on."""


def digest(parts: Iterable[bytes]) -> str:
    """Return one hash of the parts in their order, sensitive to where one ends."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def rows_digest(data: EvalSet, views: int) -> tuple[str, np.ndarray]:
    """Return a hash of the content of a split's rows, and the running sums of the lengths of texts, view by view."""
    if data.tokens is None:
        with ThreadPoolExecutor(8) as pool:
            return digest(pool.map(_image_digest, image_cells(data.rows))), np.zeros(0, np.int64)
    texts = (
        [data.read(view, index) for view in range(views) for index in range(len(data))]
        if isinstance(data, TrainSet) and data.augmentations
        else [data.tokens[index] for index in range(len(data))]
    )
    names = sorted(texts[0])
    ends = np.cumsum([len(text["input_ids"]) for text in texts], dtype=np.int64)
    content = [
        np.concatenate([np.asarray(text[name], np.int32) for text in texts]).tobytes() for name in names
    ]
    return digest([repr(names).encode(), ends.tobytes(), *content]), ends


def view_of(data: EvalSet, views: int, seed: int) -> dict[str, Any]:
    """Return everything that decides how a row is shown to the model; what a tokenizer does is in the tokens' hash."""
    if data.tokens is not None:
        tokenizer = data.tokens.tokenizer
        return {"pad": tokenizer.pad_token_id, "side": tokenizer.padding_side}
    augmentations = data.augmentations if isinstance(data, TrainSet) else []
    shown: dict[str, Any] = {"input": asdict(data.input)}
    if data.transform and isinstance(data.transform.scale, Shrink):
        shown |= data.transform.scale.describe()
    if augmentations:
        shown |= {
            "augment": [each.model_dump(mode="json") for each in augmentations],
            "views": views,
            "seed": seed,
        }
        if data.on_device:
            shown["augment_on"] = "accelerator"  # it may round a pixel the other way
    return shown


def architecture_digest(model: nn.Module, modules: Iterable[str], source: dict[str, Any]) -> str:
    """Return a hash of how the layers are built, beyond their weights."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    plain = {key: value for key, value in settings.items() if key not in _LABELS}
    parts = [str(source.get("architecture")), json.dumps(plain, sort_keys=True, default=str)]
    return digest(
        part.encode() for part in [*parts, *(f"{name} {model.get_submodule(name)}" for name in modules)]
    )


def _image_digest(cell: dict[str, Any]) -> bytes:
    content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()
