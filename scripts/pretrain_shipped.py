"""Pretrain `shipped/tiny-resnet`, a timm resnet10t of 0.45 M parameters, on the digits zero to four only.

    python scripts/pretrain_shipped.py            write hf_finetune/shipped/tiny_resnet/ anew
    python scripts/pretrain_shipped.py --check    train again and compare with the packaged weights

About a minute on one CPU thread, no network; the digits are scikit-learn's. A run repeats to the bit on the
same kind of CPU with the same torch. Elsewhere sums are taken in another order and training amplifies the
difference: `--check` then says how far apart the two networks are and exits with 1.

Besides naming the digit, the network learns to name digit and orientation together (five digits, turned by
quarters and mirrored, are forty classes) through a second head that is thrown away: "Self-supervised Label
Augmentation via Input Transformations", Lee, Hwang and Shin, ICML 2020. Five classes alone leave features too
narrow to carry over to new digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare checkout, before any install

from hf_finetune.shipped import backbone_folder
from hf_finetune.shipped.digits import CLASS_NAMES, IMAGE_SIZE, PRETRAINING_CLASSES, TARGET_CLASSES, digits

ARCHITECTURE = "resnet10t"
MODEL_ARGS = {"channels": [24, 48, 96, 128], "stem_width": 16}
MEAN = STD = (0.5, 0.5, 0.5)
ORIENTATIONS = 8  # four quarter turns, as is and mirrored
HELD_OUT = 150  # images never trained on
EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY, SEED = 160, 64, 5e-3, 0.05, 0
TOLERANCE = 1e-4  # largest difference of any weight that still counts as the same network


def main() -> int:
    """Train, then write the folder or compare with it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pixels, labels = digits(PRETRAINING_CLASSES)
    assert not set(PRETRAINING_CLASSES) & set(TARGET_CLASSES), "the target classes must stay unseen"
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN[0]) / STD[0]
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(images)))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    model = pretrain(images[train], torch.from_numpy(labels)[train])
    accuracy = evaluate(model, images[held_out], torch.from_numpy(labels)[held_out])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters · accuracy on {HELD_OUT} held-out digits 0-4: {accuracy:.3f}")
    folder = backbone_folder("tiny-resnet")
    return compare(model, folder) if check else save(model, folder)


def pretrain(images: Tensor, labels: Tensor) -> nn.Module:
    """Train the network on normalised images (n, 3, 32, 32) and labels (n,): it names the upright digit."""
    torch.manual_seed(SEED)
    draw = torch.Generator().manual_seed(SEED)
    model = timm.create_model(ARCHITECTURE, num_classes=len(PRETRAINING_CLASSES), **MODEL_ARGS)
    joint_head = nn.Linear(model.num_features, len(PRETRAINING_CLASSES) * ORIENTATIONS)
    optimizer = torch.optim.AdamW([*model.parameters(), *joint_head.parameters()], weight_decay=WEIGHT_DECAY)
    steps = len(images) // BATCH  # a last short batch would disturb the batch statistics: leave it out
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=draw)[: steps * BATCH].split(BATCH):
            turns = torch.randint(ORIENTATIONS, (BATCH,), generator=draw)
            views = warp(orient(recolour(images[batch], draw), turns), draw)
            features = model.forward_head(model.forward_features(views), pre_logits=True)
            loss = F.cross_entropy(joint_head(features), labels[batch] * ORIENTATIONS + turns)
            upright = turns == 0  # a six upside down is no six: the kept head sees upright digits only
            if upright.any():
                logits = model.get_classifier()(features[upright])
                loss = loss + F.cross_entropy(logits, labels[batch][upright])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def recolour(images: Tensor, draw: torch.Generator) -> Tensor:
    """Scale each channel by 0.5 to 1 and invert it half of the time: colour means nothing."""
    shape = (len(images), 3, 1, 1)
    scale = 0.5 + 0.5 * torch.rand(shape, generator=draw)
    return images * scale * torch.where(torch.rand(shape, generator=draw) < 0.5, -1.0, 1.0)


def orient(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each image by `turns % 4` quarters, mirrored first where `turns` is 4 or more."""
    mirrored = torch.where(turns.view(-1, 1, 1, 1) >= 4, images.flip(-1), images)
    pairs = zip(mirrored, turns.tolist(), strict=True)
    return torch.stack([torch.rot90(image, turn % 4, (1, 2)) for image, turn in pairs])


def warp(images: Tensor, draw: torch.Generator) -> Tensor:
    """Rotate by up to 20 degrees, scale and shear by up to a quarter, shift by up to a tenth of the side."""
    angle, scale, shear, x, y = (torch.rand(5, len(images), generator=draw) - 0.5) * torch.tensor(
        [[0.7], [0.4], [0.5], [0.4], [0.4]]
    )
    scale = 1 + scale
    rows = [angle.cos() * scale, shear - angle.sin() * scale, x, angle.sin() * scale, angle.cos() * scale, y]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images named rightly."""
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def save(model: nn.Module, folder: Path) -> int:
    """Write `config.json` and `model.safetensors` as timm does for the Hub."""
    save_for_hf(
        model,
        str(folder),
        model_config={
            "label_names": [CLASS_NAMES[i] for i in PRETRAINING_CLASSES],
            "pretrained_cfg": {"tag": "digits_0_4", "license": "apache-2.0"},
        },
        model_args=MODEL_ARGS,
        safe_serialization=True,
        data_config={
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "mean": MEAN, "std": STD,
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        },
    )  # fmt: skip
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    print(f"wrote {folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB of weights")
    return 0


def compare(model: nn.Module, folder: Path) -> int:
    """Return 0 when the packaged weights are these to `TOLERANCE`, else 1, and say how far apart they are."""
    config = json.loads((folder / "config.json").read_text())
    packaged, fresh = load_file(folder / "model.safetensors"), model.state_dict()
    same_shape = config["model_args"].items() >= MODEL_ARGS.items() and packaged.keys() == fresh.keys()
    distances = [(packaged[name] - fresh[name]).abs().max().item() for name in fresh] if same_shape else []
    far = max(distances, default=float("inf"))
    print(f"largest difference to {folder / 'model.safetensors'}: {far:.2e} (tolerance {TOLERANCE:.0e})")
    return 0 if far <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
