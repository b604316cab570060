"""The artefact: a folder that the backbone's own library loads, with recipe and card beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hf_finetune.data.labels import Labels
from hf_finetune.hub.card import model_card
from hf_finetune.models.load import Backbone, save_backbone
from hf_finetune.recipe import dump_recipe
from hf_finetune.runfolder import os_error, writing

if TYPE_CHECKING:
    from hf_finetune.setup import Setup


def write_artefact(folder: Path, backbone: Backbone, setup: Setup, best: dict[str, Any] | None) -> None:
    """Write weights, config, processor or tokenizer, the resolved recipe and a model card.

    Args:
        best: the evaluation of these very weights; None when they were never measured.

    Raises:
        FinetuneError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir()
        try:
            _save_model(backbone, folder, setup.splits.labels)
        except SafetensorError as error:
            raise os_error(error, folder) from error
        (folder / "recipe.yaml").write_text(dump_recipe(setup.recipe), encoding="utf-8")
        (folder / "README.md").write_text(model_card(setup, best), encoding="utf-8")


def _save_model(backbone: Backbone, folder: Path, labels: Labels) -> None:
    """Write the model in its own library's format, or as a peft adapter of its base."""
    if backbone.adapter is None:
        if "quantize" in backbone.source:
            from hf_finetune.models.quantize import dequantized

            backbone = dequantized(backbone)
        save_backbone(backbone, folder, labels)
        return
    from hf_finetune.models.adapter_files import merged, save_adapter

    if backbone.adapter.spec.merge:
        save_backbone(merged(backbone), folder, labels)
    else:
        save_adapter(backbone, folder, labels)
