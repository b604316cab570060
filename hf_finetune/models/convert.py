"""What other tools saved, made into what the loaders read: pickled weights, the labels a config names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from timm.models import load_state_dict

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError, first_line
from hf_finetune.models import load_timm
from hf_finetune.models.layout import CONFIG, WEIGHTS
from hf_finetune.models.source import Source
from hf_finetune.models.spec import BackboneSpec


def labels_of(where: str, source: Source) -> Labels:
    """Return the labels that the config of a trained model names."""
    names = load_timm.label_names(source.config) or ()
    if not names and (stored := source.config.get("id2label")):
        names = tuple(str(stored[key]) for key in sorted(stored, key=int))
    if not names:
        raise ModelError(
            f"{where}: it is an adapter whose {CONFIG} names no labels. Merge it into its base model with peft "
            "(`merge_and_unload`, then `save_pretrained`) and give the folder that makes."
        )
    kinds = {problem: kind for kind, problem in load_timm.PROBLEM_TYPES.items()}
    return Labels(kinds.get(source.config.get("problem_type"), "single"), names)  # type: ignore[arg-type]


def unpickled(spec: BackboneSpec, source: Source, folder: Path) -> Source:
    """Write the weights in a pickle to `folder` as safetensors, with what lies beside them; no code in it is run.

    Raises:
        ModelError: it holds more than tensors, or cannot be read.
    """
    assert source.folder is not None
    assert source.pickle is not None
    where = f"backbone '{spec.id}'"
    try:
        tensors = load_state_dict(str(source.folder / source.pickle), weights_only=True)
        plain = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    except Exception as error:
        raise ModelError(
            f"{where}: {source.pickle} holds more than tensors, or is damaged, and is not read: "
            f"{first_line(error)} Convert it to safetensors where you trust it."
        ) from None
    for beside in source.folder.iterdir():
        if beside.is_file() and not beside.name.endswith((".safetensors", source.pickle)):
            shutil.copyfile(beside, folder / beside.name)
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    return replace(source, prepared=folder)
