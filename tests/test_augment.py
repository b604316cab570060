"""Augmentation: what the model receives, and that it is a pure function of (seed, epoch, index)."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image

from hf_finetune.augment import spec as specs
from hf_finetune.augment.batch import mix, mixers
from hf_finetune.augment.grid import save_augment_grid
from hf_finetune.augment.image import (
    BUILDERS,
    build_eval_transform,
    build_train_transform,
    denormalise,
    sample_rng,
)
from hf_finetune.augment.presets import PRESETS, resolve_augment
from hf_finetune.augment.text import drop_words, swap_words
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import TrainSet
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import load_splits
from hf_finetune.errors import RecipeError
from hf_finetune.models.backbone import ImageInput

SMALL = ImageInput((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 0.875, "center", "bicubic")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image with large shapes and noise, so that resizing by another rule shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, int) + noise, 0, 255).astype(np.uint8))


# ---- evaluation --------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic"},
    "whole image": {"input_size": (3, 96, 96), "crop_pct": 1.0, "interpolation": "bilinear"},
    "squash": {
        "input_size": (3, 128, 128),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
    },
    "squash and crop": {
        "input_size": (3, 64, 64),
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "interpolation": "bilinear",
    },
    "border": {
        "input_size": (3, 80, 80),
        "crop_pct": 0.95,
        "crop_mode": "border",
        "interpolation": "bicubic",
    },
    "not square": {"input_size": (3, 96, 160), "crop_pct": 0.875, "interpolation": "bicubic"},
    "own statistics": {"input_size": (3, 32, 32), "crop_pct": 0.95, "mean": (0.5,) * 3, "std": (0.25,) * 3},
    "nearest": {"input_size": (3, 48, 48), "crop_pct": 0.9, "interpolation": "nearest"},
    "lanczos": {"input_size": (3, 48, 48), "crop_pct": 0.9, "interpolation": "lanczos"},
}


@pytest.mark.parametrize("size", [(300, 200), (90, 170), (224, 224), (20, 25)], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_the_evaluation_view_is_timms(case, size):
    import timm.data

    config = timm.data.resolve_data_config(pretrained_cfg=CONFIGS[case])
    ours = ImageInput(
        size=config["input_size"][1:],
        **{key: config[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
    )
    image = photo(*size)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    actual = build_eval_transform(ours)(image)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_denormalising_gives_the_image_back():
    image = photo(32, 32)
    whole = ImageInput((32, 32), SMALL.mean, SMALL.std, 1.0, "center", "bicubic")
    pixels = denormalise(build_eval_transform(whole)(image), whole)
    torch.testing.assert_close(
        pixels * 255, torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), atol=1e-3, rtol=0
    )


# ---- training views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", specs.IMAGE_AUGMENTATIONS)
def test_an_augmentation_is_a_pure_function_of_seed_epoch_and_index(name):
    spec = specs.IMAGE_AUGMENTATIONS[name](**({"p": 1.0} if name == "random_erasing" else {}))
    transform, image = build_train_transform([spec], SMALL), photo(60, 50)

    def view(*key: int) -> torch.Tensor:
        with sample_rng(*key):
            return transform(image)

    assert view(0, 1, 2).shape == (3, 32, 32)
    assert torch.equal(view(0, 1, 2), view(0, 1, 2))
    views = [view(seed, epoch, index) for seed, epoch, index in np.ndindex(3, 3, 3)]
    different = {tuple(each.flatten().tolist()) for each in views}
    assert len(different) > (1 if "flip" in name else 15)


def test_every_image_augmentation_has_a_builder():
    assert BUILDERS.keys() == specs.IMAGE_AUGMENTATIONS.keys()


def test_without_a_crop_in_the_list_the_evaluation_crop_comes_first():
    image = photo(60, 50)
    assert torch.equal(build_train_transform([], SMALL)(image), build_eval_transform(SMALL)(image))
    flip = build_train_transform([specs.HorizontalFlip(p=1.0)], SMALL)(image)
    assert torch.equal(flip.flip(-1), build_eval_transform(SMALL)(image))


@pytest.mark.parametrize("size", [(32, 32), (20, 60), (300, 40)], ids=str)
def test_random_crop_shifts_and_keeps_the_scale(size):
    transform = build_train_transform([specs.RandomCrop(padding=0.25)], SMALL)
    with sample_rng(0, 0, 0):
        assert transform(photo(*size)).shape == (3, 32, 32)


def test_sample_rng_leaves_no_trace():
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    expected = draws(), draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    first = draws()
    inside = []
    with contextlib.suppress(ZeroDivisionError), sample_rng(0, 0, 0):
        inside = draws()
        raise ZeroDivisionError
    assert (first, draws()) == expected
    with sample_rng(0, 0, 0):
        assert draws() == inside
    with sample_rng(0, 0, 1):
        assert not set(draws()) & set(inside)


# ---- mixing ------------------------------------------------------------------------------------------------


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, 16, 16).contiguous()
    return pixels, torch.eye(n)


MIXES = {
    "mixup": [specs.Mixup(alpha=1.0)],
    "cutmix": [specs.Cutmix()],
    "both": [specs.Mixup(alpha=1.0), specs.Cutmix()],
}


@pytest.mark.parametrize("case", MIXES)
def test_targets_are_mixed_by_the_share_of_pixels(case):
    pixels, targets = batch()
    mixed, soft = mix(pixels, targets, range(6), mixing=MIXES[case], seed=0, epoch=0)
    # the value of sample i's pixels is i and its target is row i: the mean pixel is the mean target
    expected = (soft * torch.arange(6.0)).sum(1)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert not torch.equal(mixed, pixels)
    assert torch.equal(pixels, batch()[0])
    assert torch.equal(soft[:2, 2:], torch.zeros(2, 4))  # nothing crosses the border of a pair


def test_mixing_follows_the_pair_not_its_place_in_the_batch():
    pixels, targets = batch()
    whole, _ = mix(pixels, targets, [7, 3, 9, 1, 4, 2], mixing=MIXES["both"], seed=5, epoch=2)
    parts = [
        mix(pixels[i : i + 2], targets[i : i + 2], pair, mixing=MIXES["both"], seed=5, epoch=2)[0]
        for i, pair in ((0, [7, 3]), (2, [9, 1]), (4, [4, 2]))
    ]
    assert torch.equal(whole, torch.cat(parts))
    other, _ = mix(pixels, targets, [7, 3, 9, 1, 4, 2], mixing=MIXES["both"], seed=5, epoch=3)
    assert not torch.equal(whole, other)


def test_an_odd_last_sample_stays_as_it_is():
    pixels, targets = batch(3)
    mixed, soft = mix(pixels, targets, range(3), mixing=MIXES["mixup"], seed=0, epoch=0)
    assert torch.equal(mixed[2], pixels[2])
    assert torch.equal(soft[2], targets[2])


def test_one_of_several_mixings_is_chosen_per_pair_with_equal_odds():
    pixels, targets = batch(2)
    kinds = [
        len(mix(pixels, targets, [i, 0], mixing=MIXES["both"], seed=0, epoch=0)[0][0].unique())
        for i in range(300)
    ]
    # mixup leaves one value in an image of one colour, cutmix two; one value too if its rectangle is all or
    # nothing
    assert 0.4 < np.mean([kind == 2 for kind in kinds]) < 0.55


def test_the_probability_of_mixing():
    pixels, targets = batch(2)
    changed = [
        not torch.equal(mix(pixels, targets, [i, 0], mixing=[specs.Mixup(p=0.3)], seed=0, epoch=0)[0], pixels)
        for i in range(300)
    ]
    assert 0.2 < np.mean(changed) < 0.4


# ---- texts -------------------------------------------------------------------------------------------------


def test_words_are_dropped_and_one_stays():
    words, rng = [str(n) for n in range(2000)], np.random.default_rng(0)
    kept = drop_words(words, 0.3, rng)
    assert 0.65 < len(kept) / 2000 < 0.75
    assert kept == sorted(kept, key=int)
    assert len(drop_words(words, 1.0, rng)) == 1
    assert drop_words([], 0.5, rng) == []


def test_words_are_swapped_with_neighbours():
    words, rng = [str(n) for n in range(2000)], np.random.default_rng(0)
    swapped = swap_words(words, 0.2, rng)
    assert sorted(swapped) == sorted(words)
    assert 0.15 < np.mean([a != b for a, b in zip(words, swapped, strict=True)]) < 0.25
    assert swap_words(["one"], 1.0, rng) == ["one"]


# ---- presets -----------------------------------------------------------------------------------------------

AUTO = {
    "few images": (("auto", "image", 500, 224), ["random_resized_crop", "horizontal_flip"]),
    "some images": (
        ("auto", "image", 2_000, 224),
        ["random_resized_crop", "horizontal_flip", "rand_augment"],
    ),
    "many images": (
        ("auto", "image", 20_000, None),
        ["random_resized_crop", "horizontal_flip", "rand_augment", "mixup", "cutmix"],
    ),
    "small images": (("auto", "image", 50_000, 32), ["random_crop"]),
    "texts": (("auto", "text", 500, None), []),
    "none": (("none", "image", 500, 224), []),
    "standard texts": (("standard", "text", 500, None), ["word_dropout"]),
    "a list": (([specs.Rotation()], "image", 500, 32), ["rotation"]),
}


@pytest.mark.parametrize("case", AUTO)
def test_what_a_preset_means(case):
    given, expected = AUTO[case]
    augmentations, reason = resolve_augment(*given)
    assert [each.name for each in augmentations] == expected
    assert reason


def test_no_preset_flips_small_images():
    assert not any("flip" in each.name for kinds in PRESETS.values() for each in kinds["small image"])
    assert "no flip" in resolve_augment("auto", "image", 100, 32)[1]


@pytest.mark.parametrize(
    ("augmentation", "modality"),
    [(specs.HorizontalFlip(), "text"), (specs.Mixup(), "text"), (specs.WordDropout(), "image")],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_augmentation_of_the_other_modality_is_refused(augmentation, modality):
    with pytest.raises(
        RecipeError, match=f"{augmentation.name} cannot be applied to {modality}s. Allowed for"
    ):
        resolve_augment([augmentation], modality, 100)


def test_mixers_are_the_batch_augmentations():
    assert [each.name for each in mixers(PRESETS["strong"]["image"])] == list(specs.BATCH_AUGMENTATIONS)


# ---- the picture -------------------------------------------------------------------------------------------


def test_the_grid_shows_samples_beside_their_views(tmp_path):
    splits = load_splits(DataSpec(), seed=0)
    whole = ImageInput((32, 32), SMALL.mean, SMALL.std, 1.0, "center", "bicubic")
    train_set = TrainSet(splits.train, splits.labels, whole, PRESETS["strong"]["small image"])
    save_augment_grid(train_set, tmp_path / "augment.png", samples=3, views=2)
    with Image.open(tmp_path / "augment.png") as grid:
        assert grid.width > 300
        assert grid.height > 300


def test_labels_take_part_in_mixing_whatever_their_kind():
    from hf_finetune.data.targets import soft_targets

    single = soft_targets(torch.tensor([2, 0]), Labels("single", ("a", "b", "c")))
    assert single.tolist() == [[0, 0, 1], [1, 0, 0]]
    values = torch.tensor([1.0, 3.0])
    _, mixed = mix(torch.zeros(2, 3, 4, 4), soft_targets(values, Labels("regression", ("y",))), [0, 1],
                   mixing=MIXES["mixup"], seed=0, epoch=0)  # fmt: skip
    assert mixed.sum() == pytest.approx(4.0)
