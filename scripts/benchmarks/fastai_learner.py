"""fastai's vision_learner on the same weights: `fit_one_cycle` frozen or whole, `fine_tune` for recipes with phases.

The head is fastai's own (two layers, both poolings), as its users get it. Images are squished to the input size, the
one resize of fastai that draws nothing at random.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.job import Watch, answer, read_job
from benchmarks.prepare_data import held_out


def main() -> None:
    """Train and measure after each epoch."""
    job = read_job()
    if importlib.util.find_spec("fastai") is None:
        answer(skipped="not installed")
        return
    if job.modality != "image":
        answer(skipped="vision_learner reads images")
        return
    if job.learns in ("adapters", "some"):
        answer(skipped="fastai trains the head, or all layers")
        return
    import timm
    from fastai.vision import all as fastai

    root, watch = Path(job.data), Watch()

    class Times(fastai.Callback):
        def before_train(self) -> None:
            watch.epoch_begins()

        def after_batch(self) -> None:
            if self.training:
                watch.stepped()

        def after_train(self) -> None:
            watch.epoch_ends(len(self.dls.train) * job.batch_size)  # fastai drops the last, incomplete batch

    fastai.set_seed(job.seed)
    arch = f"local-dir:{job.folder_of_backbone}"
    size = timm.data.resolve_data_config({}, model=timm.create_model(arch, pretrained=False))["input_size"][
        -1
    ]
    loaders = fastai.ImageDataLoaders.from_folder(
        root, train="train", valid=held_out(root), bs=job.batch_size, num_workers=job.workers,
        item_tfms=fastai.Resize(size, fastai.ResizeMethod.Squish),
    )  # fmt: skip
    to_save: Any = fastai.SaveModelCallback(monitor="accuracy")
    learner = fastai.vision_learner(
        loaders, arch, metrics=fastai.accuracy, path=job.folder, wd=job.weight_decay, cbs=[Times()]
    )
    if job.precision in ("bf16", "fp16"):
        learner.to_bf16() if job.precision == "bf16" else learner.to_fp16()
    accuracies: list[float] = []

    class Accuracies(fastai.Callback):
        order = 61  # after the Recorder

        def after_epoch(self) -> None:
            accuracies.append(float(self.learn.recorder.values[-1][-1]))

    learner.add_cb(Accuracies())
    with learner.no_bar(), learner.no_logging():
        if job.learns == "phases":
            learner.fine_tune(max(1, job.epochs - 1), job.lr, freeze_epochs=1, cbs=to_save)
        else:
            learner.freeze() if job.learns == "head" else learner.unfreeze()
            learner.fit_one_cycle(job.epochs, job.lr, cbs=to_save)
    answer(**watch.times(), accuracy=accuracies[-1], best_accuracy=max(accuracies))


if __name__ == "__main__":
    main()
