"""Side by side: recipes run with shared overrides, or finished runs, in one table and one picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hf_finetune.errors import FinetuneError, Interrupted, TrainingError, UserError
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.report.compare import comparison_table, monitored_metric
from hf_finetune.report.curves import save_comparison
from hf_finetune.report.tables import print_table
from hf_finetune.runfolder import Run, load_run


def compare_arms(
    arms: Sequence[str], *, output: Path | None = None, seeds: int = 1, quiet: bool = False
) -> dict[str, Run]:
    """Run the recipes among `arms`, take the finished runs, print the table and write `compare.png`.

    Args:
        arms: recipes (files or shipped names), run folders, and `KEY=VALUE` overrides for all recipes.
        output: folder of the runs and the picture; null for `runs/compare-<time>`.
        seeds: runs of each recipe, with seeds 0 to seeds-1 in place of its own when more than one.
        quiet: print the table alone.

    Raises:
        RecipeError: a recipe is wrong; nothing has run then.
        TrainingError: an arm failed; the others have run and are shown.
    """
    overrides = [arm for arm in arms if "=" in arm or arm.startswith("~")]
    places = [arm for arm in arms if arm not in overrides]
    finished = {place: load_run(place) for place in places if (Path(place) / "run.json").is_file()}
    if finished and overrides:
        raise UserError(f"compare: {overrides[0]} cannot change a finished run ({next(iter(finished))}).")
    if not places:
        raise UserError("compare: name recipes or run folders to compare.")
    folder = output or Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    recipes = [load_recipe(place, overrides) for place in places if place not in finished]

    runs = {run.name: run for run in finished.values()}
    failures = []
    for recipe in recipes:
        for seed in range(seeds) if seeds > 1 else [recipe.training.seed]:
            name = f"{recipe.name}-seed{seed}" if seeds > 1 else recipe.name
            while name in runs:
                name += "+"
            try:
                runs[name] = _run(recipe, name, seed, folder, quiet)
            except FinetuneError as error:
                if not runs or isinstance(error, Interrupted):
                    raise
                failures.append(f"{name}: {error}")
                if (folder / name / "run.json").is_file():
                    runs[name] = load_run(folder / name)
    metric = monitored_metric(runs)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "compare.png"
    save_comparison(runs, metric, picture)
    print_table(*comparison_table(runs, metric))
    sys.stdout.write(f"curves: {picture}\n")
    if failures:
        raise TrainingError("\n".join(failures))
    return runs


def _run(recipe: Recipe, name: str, seed: int, folder: Path, quiet: bool) -> Run:
    from hf_finetune.train import finetune

    if not quiet:
        sys.stdout.write(f"== {name}\n")
    training = recipe.training.model_copy(update={"seed": seed})
    return finetune(
        recipe.model_copy(update={"output": str(folder / name), "training": training}), name=name, quiet=quiet
    )
