"""Resolve our recipe once, so that every other arm gets its rate, decay, precision and learning layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.job import Job, answer, read_job


def recipe_overrides(job: Job) -> list[str]:
    """Return the changes that make a shipped recipe this job's."""
    rows = [] if job.rows is None else [f"data.train=train[:{job.rows}]"]
    return [
        f"backbone={job.backbone}", f"data={job.data}", *rows, f"training.epochs={job.epochs}",
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
    names = {parameter.name for parameter in setup.backbone.anatomy.parameters}
    source = find_source(setup.recipe.backbone)
    done = replace(
        job,
        backbone=str(Path(job.backbone).resolve()) if Path(job.backbone).is_dir() else job.backbone,
        lr=float(setup.recipe.optimizer.lr),
        weight_decay=float(setup.recipe.optimizer.weight_decay),
        precision=setup.recipe.training.precision,
        modality=setup.splits.modality,
        learning=sorted(name for plan in setup.plans for name in plan.multiples if name in names),
        folder_of_backbone=str(source.folder),
    )
    answer(**vars(done))


if __name__ == "__main__":
    main()
