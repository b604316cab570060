"""transformers.Trainer, written as its image and text classification examples are, peft as its users use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.job import Job, Watch, answer, read_job


def image_data(job: Job, processor: Any) -> tuple[Any, Any, Any]:
    """Return train, validation and the collator of run_image_classification.py; the resize and crop of evaluation."""
    import torch
    from datasets import load_dataset
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    dataset = load_dataset("imagefolder", data_dir=job.data)
    config = processor.data_config if hasattr(processor, "data_config") else None
    if config:
        size, scale = config["input_size"][-1], config["crop_pct"]
        mean, std, how = config["mean"], config["std"], config["interpolation"]
    else:
        size = processor.size.get("shortest_edge") or processor.size["height"]
        scale, mean, std, how = 1.0, processor.image_mean, processor.image_std, "bicubic"
    resize = Resize(int(size / scale), interpolation=InterpolationMode(how))
    view = Compose([resize, CenterCrop(size), ToTensor(), Normalize(mean=mean, std=std)])

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        batch["pixel_values"] = [view(image.convert("RGB")) for image in batch["image"]]
        return batch

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}

    return (
        dataset["train"].with_transform(transform),
        dataset["validation"].with_transform(transform),
        collate,
    )


def text_data(job: Job, tokenizer: Any) -> tuple[Any, Any, Any]:
    """Return train, validation and the collator of run_classification.py; texts are padded batch by batch."""
    from datasets import load_dataset
    from transformers import DataCollatorWithPadding

    files = {"train": str(Path(job.data) / "train.csv"), "validation": str(Path(job.data) / "dev.csv")}
    dataset = load_dataset("csv", data_files=files)
    text = next(name for name in ("sentence", "text") if name in dataset["train"].column_names)
    number = {label: at for at, label in enumerate(sorted(set(dataset["train"]["label"])))}

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(rows[text], truncation=True) | {"label": [number[each] for each in rows["label"]]}

    dataset = dataset.map(tokenize, batched=True)
    return dataset["train"], dataset["validation"], DataCollatorWithPadding(tokenizer)


def main() -> None:
    """Train and measure after each epoch."""
    job = read_job()
    if job.learns == "phases":
        answer(skipped="Trainer trains the same layers from start to end")
        return
    import numpy as np
    import torch
    import transformers as hf

    if job.modality == "image":
        processor: Any = hf.AutoImageProcessor.from_pretrained(job.folder_of_backbone)
        train, validation, collate = image_data(job, processor)
        outputs = len(train.features["label"].names)
        auto: Any = hf.AutoModelForImageClassification
    else:
        processor = hf.AutoTokenizer.from_pretrained(job.folder_of_backbone)
        train, validation, collate = text_data(job, processor)
        outputs = len(set(train["label"]))
        auto = hf.AutoModelForSequenceClassification
    model = auto.from_pretrained(job.folder_of_backbone, num_labels=outputs, ignore_mismatched_sizes=True)
    model = job.limited(model)
    watch = Watch()

    class Times(hf.TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.epoch_begins()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.stepped()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            watch.epoch_ends(len(train))  # evaluation and saving come after this

    arguments = hf.TrainingArguments(
        output_dir=job.folder,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=max(32, job.batch_size),
        num_train_epochs=job.epochs,
        learning_rate=job.lr,
        weight_decay=job.weight_decay,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=10,
        seed=job.seed,
        bf16=job.precision == "bf16",
        fp16=job.precision == "fp16",
        tf32=(job.precision == "tf32") if torch.cuda.is_available() else None,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=job.workers,
        dataloader_persistent_workers=job.workers > 0,
        remove_unused_columns=job.modality == "text",
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    trainer = hf.Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=processor,
        compute_metrics=lambda p: {
            "accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())
        },
        callbacks=[Times()],
    )
    trainer.train()
    trainer.save_model()
    measured = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    answer(**watch.times(), accuracy=measured[-1], best_accuracy=max(measured))


if __name__ == "__main__":
    main()
