"""Images augmented in batches on the device: what workers would make of them, whatever the batch, and runs that end alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

import runs
from hf_finetune.augment import spec as specs
from hf_finetune.augment.device import OPERATIONS, TABLE, Later, finish
from hf_finetune.augment.image import build_eval_transform, build_train_transform, sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.errors import Interrupted, RecipeError
from hf_finetune.explain import explain_recipe
from hf_finetune.inference import evaluate_model
from hf_finetune.models.backbone import ImageInput
from hf_finetune.recipe import load_recipe
from hf_finetune.runfolder import Run
from hf_finetune.setup import ENOUGH_CORES, augmenting_on, prepare
from test_augment import photo

INPUT = ImageInput((32, 48), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 0.875, "center", "bicubic")
VIEWS = 48
LISTS: dict[str, list[AugmentationSpec]] = {
    "random_resized_crop": [specs.RandomResizedCrop()],
    "random_crop": [specs.RandomCrop()],
    "horizontal_flip": [specs.HorizontalFlip()],
    "vertical_flip": [specs.VerticalFlip()],
    "rotation": [specs.Rotation(degrees=180)],
    "color_jitter": [specs.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)],
    "color_jitter, hue": [specs.ColorJitter(hue=0.5)],
    "rand_augment": [specs.RandAugment(magnitude=15)],
    "trivial_augment": [specs.TrivialAugment()],
    "random_erasing": [specs.RandomErasing(p=0.7)],
    "a flip before the crop": [specs.HorizontalFlip(), specs.RandomCrop(), specs.VerticalFlip()],
    "many": [
        specs.RandomResizedCrop(), specs.HorizontalFlip(), specs.Rotation(), specs.ColorJitter(hue=0.1),
        specs.RandomErasing(), specs.RandomErasing(),
    ],
}  # fmt: skip
EXACT = ("random_resized_crop", "random_crop", "horizontal_flip", "vertical_flip", "color_jitter", "random_erasing",
         "a flip before the crop")  # fmt: skip
"""Without interpolation, and in Pillow's whole numbers."""


def views(
    augmentations: list[AugmentationSpec], rows: int = VIEWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the views of some images as workers make them, and what workers send of the same views to a device."""
    whole = build_train_transform(augmentations, INPUT)
    half = build_train_transform(augmentations, INPUT, on_device=True)
    made, sent = [], []
    for row in range(rows):
        image = photo(90, 70, row % 7)
        with sample_rng(0, 1, row):
            made.append(whole(image))
            after = torch.rand(())
        with sample_rng(0, 1, row):
            sent.append(half.inputs(half.fixed(image)))
            assert torch.rand(()) == after, "it has drawn something else"
    pixels, operations = (torch.stack([each[name] for each in sent]) for name in ("pixel_values", OPERATIONS))
    return torch.stack(made), pixels, operations


def test_every_image_augmentation_is_compared() -> None:
    assert {each.name for listed in LISTS.values() for each in listed} == specs.IMAGE_AUGMENTATIONS.keys()


@pytest.mark.parametrize("name", LISTS)
def test_the_device_makes_of_a_batch_what_workers_make_of_each_image(name: str) -> None:
    made, pixels, operations = views(LISTS[name])
    assert pixels.dtype == torch.uint8
    before = pixels.clone()
    finished = finish(pixels, operations)
    assert torch.equal(pixels, before)
    assert finished.dtype == torch.float32
    assert finished.is_contiguous(memory_format=torch.channels_last)
    if name in EXACT:
        torch.testing.assert_close(finished, made, atol=1e-6, rtol=0)
    levels = (finished - made).abs() * torch.tensor(INPUT.std).view(3, 1, 1) * 255
    assert levels.mean() < 0.02
    assert (
        levels.mean((1, 2, 3)).max() < 0.1
    )  # a solarised pixel may turn over, for one that was rounded before
    assert (levels > 1.5).float().mean() < 5e-3
    for row in (0, 11, VIEWS - 1):  # to the bit, alone as among others
        alone = finish(pixels[row : row + 1], operations[row : row + 1])
        assert torch.equal(alone[0], finished[row])


def test_a_device_normalises_what_is_measured() -> None:
    image, half = photo(90, 70), build_eval_transform(INPUT, on_device=True)
    sent = half.inputs(half.fixed(image))
    finished = finish(sent["pixel_values"][None], sent[OPERATIONS][None])
    assert torch.equal(finished[0], build_eval_transform(INPUT)(image))


def test_every_operation_is_drawn_by_some_augmentation() -> None:
    drawn: set[int] = set()
    for listed in LISTS.values():
        later = build_train_transform(listed, INPUT, on_device=True).later
        assert later is not None
        for row in range(100):
            with sample_rng(0, 0, row):
                drawn |= {int(each) for each in later.draw()[:, 0]}
    assert drawn == set(range(1 + len(TABLE)))


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values: whatever the host asked of it would fail."""
    _, pixels, operations = views([*LISTS["many"], specs.RandAugment(num_ops=3)])
    finished = finish(pixels.to("meta"), operations)
    assert finished.shape == (VIEWS, 3, *INPUT.size)
    assert finished.dtype == torch.float32


def test_what_no_operation_stands_for_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"GaussianBlur\(.*\) does what no line of the table"):
        Later((v2.GaussianBlur(3),), (8, 8)).draw()


# ---- runs ----------------------------------------------------------------------------------------------------------

ACCELERATOR = {"augment_on": "accelerator"}
RANDOM = ["random_resized_crop", "horizontal_flip", "rand_augment", "random_erasing"]
FULL = {"strategy": "full", "training": {"steps": 5}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "hf_finetune.record.save_curves", lambda rows, best, path, *, title: path.write_bytes(b"")
    )


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.rows]


def test_a_run_ends_as_with_workers(tmp_path: Path) -> None:
    exact: dict[str, Any] = FULL | {
        "augment": ["random_resized_crop", "horizontal_flip", "random_erasing", "mixup"]
    }
    exact["training"] = {"steps": 5, "ema": {"decay": 0.5}, "micro_batch_size": 4}
    workers = runs.run("vit", tmp_path / "workers", data={"augment_on": "workers"}, **exact)
    device = runs.run("vit", tmp_path / "device", data=ACCELERATOR, **exact)
    assert losses(device) == losses(workers)
    assert runs.same(runs.weights(device), runs.weights(workers))
    assert evaluate_model(str(device.path), []).metrics["accuracy"] == device.status["best"]["value"]
    near = [
        runs.run("vit", tmp_path / f"{on}-near", data={"augment_on": on}, augment=RANDOM, **FULL)
        for on in ("workers", "accelerator")
    ]
    assert losses(near[1]) == pytest.approx(losses(near[0]), abs=1e-2)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(folder: str, workers: int = 0) -> Any:
        data = ACCELERATOR | {"workers": workers}
        return runs.recipe("resnet", tmp_path / folder, data=data, augment=RANDOM, **FULL)

    whole = runs.finetune(recipe("whole"), quiet=True)
    asked = iter([None] * 2 + ["stopped"])
    with monkeypatch.context() as patched:
        patched.setattr("hf_finetune.train.asked_to_stop", lambda *_: next(asked))
        with pytest.raises(Interrupted):
            runs.finetune(recipe("cut", workers=1), quiet=True)
    resumed = runs.finetune(recipe("cut"), quiet=True, resume=True)
    assert losses(resumed) == losses(whole)
    assert runs.same(runs.weights(resumed), runs.weights(whole))


def test_views_that_are_kept_are_those_of_an_uncached_run(tmp_path: Path) -> None:
    changes = {"strategy": "frozen", "augment": RANDOM, "data": ACCELERATOR, "training": {"steps": 8}}
    views = runs.run("vit", tmp_path / "views", **changes, cache={"views": 2})
    free = runs.run("vit", tmp_path / "free", **changes)
    assert "24 train rows" in views.status["features"]["1 head"]
    assert losses(views)[:4] == pytest.approx(losses(free)[:4], abs=1e-5)  # two epochs of two steps


def test_images_that_are_kept_decoded_give_the_same_views(tmp_path: Path) -> None:
    plain = runs.run("vit", tmp_path / "plain", augment=RANDOM, data=ACCELERATOR, **FULL)
    decoded = runs.run(
        "vit", tmp_path / "decoded", augment=RANDOM, data=ACCELERATOR | {"cache": "decoded"}, **FULL
    )
    assert losses(decoded) == losses(plain)


def test_explain_shows_what_the_device_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.recipe("vit", strategy="frozen", augment="light", data=ACCELERATOR, cache={"views": 2})
    explain_recipe(recipe, tmp_path)
    assert (tmp_path / "augment.png").is_file()
    explain_recipe(runs.recipe("vit", strategy="full"), tmp_path)
    assert "data.augment_on" in capsys.readouterr().out


# ---- auto ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "modality", "device", "cores", "chosen"),
    [
        ("auto", "image", "cpu", 2, "workers"),
        ("auto", "image", "mps", 2, "workers"),
        ("auto", "image", "cuda", ENOUGH_CORES - 1, "accelerator"),
        ("auto", "image", "cuda", ENOUGH_CORES, "workers"),
        ("auto", "text", "cuda", 4, "workers"),
        ("workers", "image", "cuda", 8, "workers"),
        ("accelerator", "image", "cpu", 8, "accelerator"),
    ],
)
def test_auto_is_the_accelerator_where_cores_are_few(
    asked: Any, modality: str, device: str, cores: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_finetune.setup.cores_per_process", lambda world_size: cores)
    on, why = augmenting_on(asked, modality, 1, torch.device(device))
    assert on == chosen
    if chosen == "accelerator" and asked == "auto":
        assert why.startswith(f"{cores} cores for each process, under {ENOUGH_CORES}")


def test_a_resumed_run_augments_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(steps: int) -> Any:
        return runs.recipe("vit", tmp_path / "run", strategy="full", training={"steps": steps})

    with monkeypatch.context() as few_cores:
        few_cores.setattr("hf_finetune.setup.augmenting_on", lambda *_: ("accelerator", "few cores"))
        began = runs.finetune(recipe(2), quiet=True)
    assert began.status["auto"]["data.augment_on"] == "accelerator (few cores)"
    run = runs.finetune(recipe(3), quiet=True, resume=True)
    assert load_recipe(run.recipe_path).data.augment_on == "accelerator"
    assert run.status["auto"]["data.augment_on"] == "accelerator (as the run began)"


def test_texts_have_no_business_there(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"data\.augment_on: 'accelerator' changes images, and the data holds texts"
    ):
        prepare(
            runs.recipe("bert", strategy="full", data=ACCELERATOR), world_size=1, device=torch.device("cpu")
        )
