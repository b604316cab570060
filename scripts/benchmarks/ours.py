"""hf_finetune by recipe, as `hf-finetune train` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.job import answer, read_job, since_start, usual_speed
from benchmarks.plan import recipe_overrides
from hf_finetune.host import leave


def main() -> None:
    """Run the recipe."""
    job = read_job()
    from hf_finetune.cli import run_recipe
    from hf_finetune.runfolder import load_run

    folder = str(Path(job.folder) / "run")
    run_recipe(
        job.recipe, recipe_overrides(job), output=folder, resume=False, allow_changes=False, quiet=True
    )
    run = load_run(folder)
    began = since_start() - run.status["wall_seconds"]
    training = [row for row in run.rows if row["split"] == "train"]
    measured = [row["metrics"]["accuracy"] for row in run.rows if row["split"] == "validation"]
    layout = "channels_last" if job.modality == "image" else "contiguous"
    answer(
        first_step=began + training[0]["seconds"],
        samples_per_second=usual_speed(epoch_speeds(training, job.batch_size, job.train_samples)),
        accuracy=measured[-1],
        best_accuracy=max(measured),
        above_gb=(run.status["memory"]["peak"] - run.status["memory"]["ready"]) / 1e9,
        floor=f"floor:{run.status['precision']}:{layout}",  # see hf_finetune.models.forward.placed
    )


def epoch_speeds(rows: list[dict[str, Any]], batch_size: int, samples: int) -> list[float]:
    """Return the training loop's samples per second in each epoch, out of the speeds logged for parts of it.

    Args:
        rows: the training rows of metrics.jsonl; each holds the speed since the one before.
        batch_size: samples per optimizer step, but for an epoch's last.
        samples: of one epoch.
    """
    steps_per_epoch = -(-samples // batch_size)
    speeds, seconds, seen = [], 0.0, 0
    for row in rows:
        epochs, steps = divmod(row["step"], steps_per_epoch)
        now = epochs * samples + steps * batch_size
        seconds, seen = seconds + (now - seen) / row["samples_per_second"], now
        if steps == 0:
            speeds.append(samples / seconds)
            seconds = 0.0
    return speeds


if __name__ == "__main__":
    main()
    leave(0)
