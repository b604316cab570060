"""The model card: what the weights beside it are, from what they were made, and how they were measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_finetune.hub.card_edits import Card, Section, edited_sections, keep_edits, new_card, read_card
from hf_finetune.hub.card_facts import CardFacts
from hf_finetune.hub.card_sections import SECTIONS
from hf_finetune.hub.card_usage import FOLDER
from hf_finetune.hub.eval_results import eval_results

__all__ = ["edited_sections", "keep_edits", "model_card", "with_repo_id"]


def model_card(facts: CardFacts) -> str:
    """Return the card of the weights that `facts` are about; where they were never measured it holds no figure."""
    written = {name: section(facts) for name, section in SECTIONS.items()}
    sections = [Section.new(name, text) for name, text in written.items() if text is not None]
    card = ModelCard(str(new_card(card_data(facts).to_dict(), sections)))  # read as the Hub reads it
    return str(card.content)


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the card's metadata; what is not known is absent."""
    base, recipe, at = facts.base, facts.recipe, facts.measured
    results = eval_results(facts)
    # A merged adapter has one base model, as any fine-tuned one; the Hub calls a merge what has several. An adapter
    # belongs on its very base model: what that was made from is none.
    base_model = base.hub_id if facts.is_adapter and base.pretrained else base.on_hub
    relation = "adapter" if facts.is_adapter else "finetune"
    strategy = str(recipe.strategy.name)
    return ModelCardData(
        language=_languages(facts),
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        library_name="peft" if facts.is_adapter else facts.library,
        pipeline_tag=recipe.task,
        tags=list(dict.fromkeys([recipe.task, facts.library, "hf_finetune", strategy])),
        datasets=[at.hub_id] if at.hub_id else None,
        metrics=list(facts.best["metrics"]) if facts.best else None,
        base_model=base_model,
        model_name=f"{_last(base.name)}-{_last(at.name)}" if results else None,
        eval_results=results or None,
        base_model_relation=relation if base_model else None,
        co2_eq_emissions=_emissions(facts),
    )


def with_repo_id(card: str, repo_id: str) -> str:
    """Return a generated card as it stands in a repository: its code loads the model from there.

    Sections that were edited by hand stay as they are.
    """
    read = read_card(card)
    parts: list[Section | str] = [
        Section.new("usage", _at_hub(part.text, repo_id))
        if isinstance(part, Section) and part.key == "usage" and not part.is_edited
        else part
        for part in read.parts
    ]
    metadata = dict(read.metadata)
    if index := metadata.get("model-index"):
        metadata["model-index"] = [{**index[0], "name": _last(repo_id)}, *index[1:]]
    changed: Card = replace(read, parts=parts, metadata=metadata)
    return str(changed)


def _at_hub(code: str, repo_id: str) -> str:
    return code.replace(f"local-dir:{FOLDER}", f"hf-hub:{repo_id}").replace(FOLDER, repo_id)


def _languages(facts: CardFacts) -> list[str] | None:
    """Return the languages of the texts: the data's, else the base model's if it has one only."""
    if facts.recipe.task != "text-classification":
        return None
    base = facts.base.languages if len(facts.base.languages) == 1 and facts.base.pretrained else ()
    return list(facts.measured.languages or base) or None


def _emissions(facts: CardFacts) -> dict[str, Any] | None:
    """Return what the Hub knows as co2_eq_emissions, in grams."""
    found = facts.run.get("emissions")
    if not found:
        return None
    hardware = facts.run.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    values = {
        "emissions": found["co2_grams"],
        "source": "codecarbon",
        "training_type": "fine-tuning" if facts.base.pretrained else "pre-training",
        "geographical_location": found.get("country"),
        "hardware_used": gpus[0] if gpus else hardware.get("cpu"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
