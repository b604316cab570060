"""Resolve our recipe once, so that every other arm gets its rate, decay, precision and learning layers."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.job import Job, Learning, answer, read_job

if TYPE_CHECKING:
    from hf_finetune.setup import Setup


def recipe_overrides(job: Job) -> list[str]:
    """Return the changes that make a shipped recipe this job's."""
    return [
        f"backbone={job.backbone}", f"data={job.data}", f"training.epochs={job.epochs}",
        f"training.batch_size={job.batch_size}", f"training.seed={job.seed}", "augment=none", *job.overrides,
    ]  # fmt: skip


def main() -> None:
    """Print the completed job."""
    from hf_finetune.models.source import find_source
    from hf_finetune.recipe import load_recipe
    from hf_finetune.setup import prepare, process_state

    job = read_job()
    setup = prepare(
        load_recipe(job.recipe, recipe_overrides(job)), world_size=1, device=process_state().device
    )
    source = find_source(setup.recipe.backbone)
    done = replace(
        job,
        backbone=str(Path(job.backbone).resolve()) if Path(job.backbone).is_dir() else job.backbone,
        lr=float(setup.recipe.optimizer.lr),
        weight_decay=float(setup.recipe.optimizer.weight_decay),
        precision=setup.recipe.training.precision,
        modality=setup.splits.modality,
        workers=int(setup.recipe.data.workers),
        train_samples=len(setup.splits.train),
        learns=what_learns(setup),
        learning=sorted({name for plan in setup.plans for name in plan.multiples}),
        adapter=adapter_options(setup),
        folder_of_backbone=str(source.folder),
    )
    answer(**vars(done))


def what_learns(setup: Setup) -> Learning:
    """Return which kind of training a recipe is, in words that every tool knows."""
    from hf_finetune.models.anatomy import HEAD

    if len(setup.plans) > 1:
        return "phases"
    if setup.backbone.adapter:
        return "adapters"
    learning = {p.group for p in setup.backbone.anatomy.parameters if p.name in setup.plans[0].multiples}
    names = {p.name for p in setup.backbone.anatomy.parameters if not p.is_fixed}
    if names <= setup.plans[0].multiples.keys():
        return "all"
    return "head" if learning == {HEAD} else "some"


def adapter_options(setup: Setup) -> dict[str, Any]:
    """Return the arguments of peft's configuration that differ from its defaults, and the layers saved beside."""
    adapter = setup.backbone.adapter
    if adapter is None:
        return {}
    given = {}
    for option in fields(adapter.config):
        plain = option.default if option.default_factory is MISSING else option.default_factory()
        if (value := getattr(adapter.config, option.name)) != plain:
            given[option.name] = sorted(value) if isinstance(value, set) else value
    parameters = {p.name: p for p in setup.backbone.anatomy.parameters}
    beside = {
        name.rpartition(".")[0]
        for plan in setup.plans
        for name in plan.multiples
        if not parameters[name].is_adapter
    }
    ours_alone = ("inference_mode", "peft_version", "auto_mapping", "base_model_name_or_path")
    options = {name: value for name, value in given.items() if name not in ours_alone}
    return options | {"peft_type": adapter.config.peft_type.value, "modules_to_save": sorted(beside)}


if __name__ == "__main__":
    main()
