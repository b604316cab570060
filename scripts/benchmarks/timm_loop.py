"""A plain loop around timm's own parts: dataset, loader, transforms, optimizer, scheduler. Images only."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.job import answer, read_job, since_start


def main() -> None:
    """Train and measure after each epoch."""
    job = read_job()
    if job.modality != "image":
        answer(skipped="timm reads images")
        return
    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(job.seed)
    root = Path(job.data)
    held_out = next(name for name in ("val", "validation") if (root / name).is_dir())
    sets = {split: create_dataset("", root=str(root), split=split) for split in ("train", held_out)}
    if job.rows is not None:
        sets["train"] = torch.utils.data.Subset(sets["train"], range(job.rows))
    classes = len([each for each in (root / "train").iterdir() if each.is_dir()])
    model = timm.create_model(f"local-dir:{job.folder_of_backbone}", pretrained=True, num_classes=classes)
    if job.recipe == "frozen":
        job.freeze(model)
    config = resolve_data_config({}, model=model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    loaders = {
        split: create_loader(
            data, input_size=config["input_size"], batch_size=job.batch_size, is_training=split == "train", no_aug=True,
            interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
            num_workers=2, use_prefetcher=device.type == "cuda", device=device, persistent_workers=True,
        )
        for split, data in sets.items()
    }  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=job.lr, weight_decay=job.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=job.epochs, min_lr=0.0, warmup_epochs=0
    )
    loss_of = torch.nn.CrossEntropyLoss()
    first, seen, seconds, accuracies = 0.0, 0, 0.0, []
    best = -1.0
    for epoch in range(job.epochs):
        model.train()
        began = time.monotonic()
        for images, labels in loaders["train"]:
            loss_of(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            first, seen = first or since_start(), seen + len(labels)
        seconds += time.monotonic() - began
        model.eval()
        right = 0
        with torch.no_grad():
            for images, labels in loaders[held_out]:
                right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
        accuracies.append(right / len(sets[held_out]))
        if accuracies[-1] > best:
            best = accuracies[-1]
            torch.save(model.state_dict(), Path(job.folder) / "best.pth")
        scheduler.step(epoch + 1)
    answer(first_step=first, samples_per_second=seen / seconds, accuracy=accuracies[-1], best_accuracy=best)


if __name__ == "__main__":
    main()
