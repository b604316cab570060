"""hf_finetune by recipe, as `hf-finetune train` runs it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.job import answer, read_job, since_start
from benchmarks.plan import recipe_overrides


def main() -> None:
    """Run the recipe."""
    job = read_job()
    from hf_finetune.recipe import load_recipe
    from hf_finetune.train import finetune

    recipe = load_recipe(job.recipe, [*recipe_overrides(job), f"output={Path(job.folder) / 'run'}"])
    called = since_start()
    run = finetune(recipe, quiet=True)
    training = [row for row in run.rows if row["split"] == "train"]
    measured = [row["metrics"]["accuracy"] for row in run.rows if row["split"] == "validation"]
    speeds = sorted(row["samples_per_second"] for row in training[1:] or training)
    answer(
        first_step=called + training[0]["seconds"],
        samples_per_second=speeds[len(speeds) // 2],
        accuracy=measured[-1],
        best_accuracy=max(measured),
    )


if __name__ == "__main__":
    main()
