"""The artefact: a folder that the backbone's own library loads, with recipe, card and pictures beside the weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from hf_finetune.data.labels import Labels
from hf_finetune.durable import replace_text, sync_tree
from hf_finetune.hub.base_model import CARD, find_base
from hf_finetune.hub.card import model_card
from hf_finetune.hub.card_facts import CardFacts, collect
from hf_finetune.hub.card_sections import CONFUSION, CURVES
from hf_finetune.hub.eval_results import FOLDER as EVAL_RESULTS
from hf_finetune.hub.eval_results import eval_result_files
from hf_finetune.hub.published import published_recipe
from hf_finetune.models.load import Backbone, save_backbone
from hf_finetune.recipe import dump_recipe
from hf_finetune.report.confusion import save_confusion
from hf_finetune.runfolder import RECIPE, Run, os_error, writing

if TYPE_CHECKING:
    from hf_finetune.setup import Setup


def write_artefact(folder: Path, backbone: Backbone, setup: Setup, run: Run) -> None:
    """Write weights, config, processor or tokenizer, the published recipe and a card without pictures, to last.

    Args:
        folder: is made.
        backbone: with the weights to keep.
        setup: of the run.
        run: as its folder stands; its `best` is the evaluation of these very weights, None when never measured.

    Raises:
        FinetuneError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir()
        try:
            _save_model(backbone, folder, setup)
        except SafetensorError as error:
            raise os_error(error, folder) from error
        commits = {"commit": backbone.source["commit"], "data_commit": setup.splits.report.commit}
        recipe = published_recipe(setup.recipe, **commits)
        (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
        _write_card(folder, collect(setup, run))
        sync_tree(folder)


def describe(folder: Path, setup: Setup, run: Run) -> None:
    """Write card and pictures anew with all that the run has measured since its weights were kept.

    Raises:
        FinetuneError: the folder cannot be written.
    """
    with writing(folder):
        if (run.path / CURVES).is_file():
            shutil.copyfile(run.path / CURVES, folder / CURVES)
        answers = run.predictions() if run.best and setup.splits.labels.kind == "single" else None
        if answers is not None:
            save_confusion(answers, setup.splits.labels.names, folder / CONFUSION, "Validation rows by label")
        pictures = frozenset(name for name in (CURVES, CONFUSION) if (folder / name).is_file())
        _write_card(folder, collect(setup, run, final=True, pictures=pictures))
        sync_tree(folder)


def _write_card(folder: Path, facts: CardFacts) -> None:
    replace_text(folder / CARD, model_card(facts))
    for name, text in eval_result_files(facts).items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        replace_text(folder / EVAL_RESULTS / name, text)


def _save_model(backbone: Backbone, folder: Path, setup: Setup) -> None:
    """Write the model in its own library's format, or as a peft adapter of its base.

    transformers splits large weights into several files, as the Hub's libraries do. timm does not: it looks for one
    `model.safetensors` and would load the first part of several, so its models are one file.
    """
    labels: Labels = setup.splits.labels
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
        # The adapter's config names its base model: by what others know it, not by where it lies here.
        base = find_base(setup.recipe.backbone, backbone.source)
        save_adapter(replace(backbone, source=backbone.source | {"folder": base.reference}), folder, labels)
