"""A plain loop around timm's own parts: dataset, loader, transforms, optimizer, scheduler. Images only."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from benchmarks.job import Watch, answer, read_job
from benchmarks.prepare_data import held_out


def main() -> None:
    """Train and measure after each epoch."""
    job = read_job()
    if job.modality != "image":
        answer(skipped="timm reads images")
        return
    if job.learns == "phases":
        answer(skipped="timm's loop trains the same layers from start to end")
        return
    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(job.seed)
    root = Path(job.data)
    validation = held_out(root)
    sets = {split: create_dataset("", root=str(root), split=split) for split in ("train", validation)}
    classes = len([each for each in (root / "train").iterdir() if each.is_dir()])
    model = timm.create_model(f"local-dir:{job.folder_of_backbone}", pretrained=True, num_classes=classes)
    config = resolve_data_config({}, model=model)
    model = job.limited(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    loaders = {
        split: create_loader(
            data, input_size=config["input_size"], batch_size=job.batch_size, is_training=split == "train", no_aug=True,
            interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
            num_workers=job.workers, use_prefetcher=device.type == "cuda", device=device,
            persistent_workers=job.workers > 0,
        )
        for split, data in sets.items()
    }  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=job.lr, weight_decay=job.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=job.epochs, min_lr=0.0, warmup_epochs=0
    )
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "fp16")
    torch.backends.cuda.matmul.allow_tf32 = job.precision != "fp32"
    loss_of = torch.nn.CrossEntropyLoss()
    watch, accuracies, best = Watch(), [], -1.0
    for epoch in range(job.epochs):
        model.train()
        watch.epoch_begins()
        seen = 0
        for images, labels in loaders["train"]:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, dtype=lower) if lower else nullcontext():
                loss = loss_of(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch.stepped()
            seen += len(labels)
        watch.epoch_ends(seen)
        model.eval()
        right = 0
        with torch.no_grad(), torch.autocast(device.type, dtype=lower) if lower else nullcontext():
            for images, labels in loaders[validation]:
                right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
        accuracies.append(right / len(sets[validation]))
        if accuracies[-1] > best:
            best = accuracies[-1]
            torch.save(model.state_dict(), Path(job.folder) / "best.pth")
        scheduler.step(epoch + 1)
    answer(**watch.times(), accuracy=accuracies[-1], best_accuracy=best)


if __name__ == "__main__":
    main()
