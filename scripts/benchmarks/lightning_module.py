"""A LightningModule and its Trainer as Lightning's documentation writes them, with BackboneFinetuning for what freezes.

Images through timm and torchvision's ImageFolder, texts through transformers. For a frozen recipe the callback's epoch
never comes; for one with phases the backbone wakes after the first epoch; adapters are peft's.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from benchmarks.job import Job, Watch, answer, read_job
from benchmarks.prepare_data import held_out
from benchmarks.trainer import text_data

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Our word -> Lightning's."""


def image_parts(job: Job) -> tuple[Any, Any, Any, Any]:
    """Return a timm backbone without its output layer, a new one, and the loaders of train and validation."""
    import timm
    from timm.data import create_transform, resolve_data_config
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    backbone = timm.create_model(f"local-dir:{job.folder_of_backbone}", pretrained=True, num_classes=0)
    view = create_transform(**resolve_data_config({}, model=backbone), is_training=False)
    root = Path(job.data)
    sets = [ImageFolder(str(root / split), transform=view) for split in ("train", held_out(root))]
    common: dict[str, Any] = {
        "batch_size": job.batch_size,
        "num_workers": job.workers,
        "persistent_workers": job.workers > 0,
    }
    head = nn.Linear(backbone.head_hidden_size, len(sets[0].classes))
    return backbone, head, DataLoader(sets[0], shuffle=True, **common), DataLoader(sets[1], **common)


def text_parts(job: Job) -> tuple[Any, Any, Any, Any]:
    """Return transformers' encoder and output layer, and the loaders of train and validation."""
    import transformers as hf
    from torch.utils.data import DataLoader

    tokenizer = hf.AutoTokenizer.from_pretrained(job.folder_of_backbone)
    train, validation, collate = text_data(job, tokenizer)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        job.folder_of_backbone, num_labels=len(set(train["label"]))
    )
    keep = [name for name in train.column_names if name in ("label", *tokenizer.model_input_names)]
    loaders = [
        DataLoader(rows.select_columns(keep), batch_size=job.batch_size, shuffle=shuffle, collate_fn=collate)
        for rows, shuffle in ((train, True), (validation, False))
    ]
    return getattr(model, model.base_model_prefix), model, *loaders


def main() -> None:
    """Train and measure after each epoch."""
    job = read_job()
    if importlib.util.find_spec("lightning") is None:
        answer(skipped="not installed")
        return
    if job.learns == "some" or (job.learns == "adapters" and job.modality == "image"):
        answer(skipped="BackboneFinetuning freezes the backbone as a whole")
        return
    import lightning as pl
    import torch
    from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
    from torchmetrics.classification import MulticlassAccuracy

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(job.seed, verbose=False)
    backbone, head, train, validation = (image_parts if job.modality == "image" else text_parts)(job)
    watch, accuracies = Watch(), []
    classes = head.out_features if job.modality == "image" else head.num_labels

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone  # the name that BackboneFinetuning looks for
            self.head = job.limited(head) if job.learns == "adapters" else head
            self.accuracy = MulticlassAccuracy(classes, average="micro")

        def forward(self, batch: Any) -> Any:
            if job.modality == "image":
                return self.head(self.backbone(batch[0]))
            return self.head(**{name: batch[name] for name in batch if name != "labels"}).logits

        def training_step(self, batch: Any, number: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch), labels_of(batch))

        def validation_step(self, batch: Any, number: int) -> None:
            self.accuracy(self(batch), labels_of(batch))
            self.log("accuracy", self.accuracy, on_epoch=True)

        def configure_optimizers(self) -> Any:
            learning = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(learning, lr=job.lr, weight_decay=job.weight_decay)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs)]

    def labels_of(batch: Any) -> Any:
        return batch[1] if job.modality == "image" else batch["labels"]

    class Times(Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            watch.epoch_begins()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int
        ) -> None:
            watch.stepped()
            if number + 1 == trainer.num_training_batches:  # the epoch's own end comes after its evaluation
                watch.epoch_ends(job.train_samples)

        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                accuracies.append(float(module.accuracy.compute()))

    callbacks: list[Any] = [Times(), ModelCheckpoint(job.folder, monitor="accuracy", mode="max")]
    if job.learns in ("head", "phases"):
        wakes = 1 if job.learns == "phases" else job.epochs + 1
        callbacks.append(BackboneFinetuning(unfreeze_backbone_at_epoch=wakes))
    trainer = pl.Trainer(
        max_epochs=job.epochs,
        devices=1,
        precision=PRECISIONS.get(job.precision, "32-true"),
        callbacks=callbacks,
        default_root_dir=job.folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), train, validation)
    answer(**watch.times(), accuracy=accuracies[-1], best_accuracy=max(accuracies))


if __name__ == "__main__":
    main()
