"""What freezing BatchNorm in earnest is worth: `frozen` against the usual `requires_grad = False` alone.

Both arms train the same new head, from zero, on the same batches at the same rates; the plain loop leaves the model in
train mode, as most training scripts do, so the statistics of its "frozen" BatchNorm layers follow the small data.

    python scripts/frozen_batchnorm.py BACKBONE DATA [--seeds 3] [KEY=VALUE …]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from hf_finetune.data.loaders import iterate_batches
from hf_finetune.evaluation import evaluate, to_device
from hf_finetune.models.load import forward
from hf_finetune.precision import accelerator_in
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.setup import build_loaders, prepare, process_state
from hf_finetune.timeline import rate_multiple
from hf_finetune.train import finetune


def plain(recipe: Recipe) -> tuple[float, float]:
    """Train the head with `requires_grad = False` on the rest; return (best, last) accuracy."""
    setup = prepare(recipe, world_size=1, device=process_state().device)
    accelerator = accelerator_in(setup.recipe.training.precision)
    model, timeline = setup.backbone.model, setup.timeline
    learning = {name for group in setup.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in learning
    base_lr = float(setup.recipe.optimizer.lr)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=base_lr, weight_decay=0.0
    )
    loader, validation = build_loaders(setup, accelerator)
    step, accuracies = 0, []
    while step < timeline.total_steps:
        model.train()
        for (batch,) in iterate_batches(loader, step // timeline.steps_per_epoch):
            optimizer.param_groups[0]["lr"] = base_lr * rate_multiple(
                setup.recipe, timeline, step, 0, timeline.total_steps
            )
            with accelerator.autocast():
                logits = forward(model, to_device(batch["inputs"], accelerator.device))
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"].to(accelerator.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        result = evaluate(model, validation, setup.splits.labels, ["accuracy"], accelerator)
        accuracies.append(result.metrics["accuracy"])
    return max(accuracies), accuracies[-1]


def frozen(recipe: Recipe) -> tuple[float, float]:
    """Run the recipe as it is; return (best, last) accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        run = finetune(recipe.model_copy(update={"output": str(Path(folder) / "run")}), quiet=True)
        values = [row["metrics"]["accuracy"] for row in run.rows if row["split"] == "validation"]
    return max(values), values[-1]


def main() -> None:
    """Print best and last accuracy of both arms over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name, arm in (("frozen", frozen), ("requires_grad = False alone", plain)):
        found = []
        for seed in range(options.seeds):
            overrides = [f"backbone={options.backbone}", f"data={options.data}", f"training.seed={seed}"]
            found.append(arm(load_recipe("frozen", overrides + options.overrides)))
        best, last = ([values[i] for values in found] for i in (0, 1))
        print(
            f"{name}: best {statistics.mean(best):.3f} ({', '.join(f'{v:.3f}' for v in best)}), "
            f"last {statistics.mean(last):.3f} ({', '.join(f'{v:.3f}' for v in last)})"
        )


if __name__ == "__main__":
    main()
