"""Images decoded once: what is kept is what decoding gives, to the bit, and a run does not depend on it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import nursery
import runs
from hf_finetune.augment import spec as specs
from hf_finetune.augment.image import Shrink
from hf_finetune.cli import main
from hf_finetune.data.labels import Labels
from hf_finetune.data.loaders import EvalSet, TrainSet
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import load_splits
from hf_finetune.errors import DataError, Interrupted, RecipeError
from hf_finetune.features import decoded, disk, store
from hf_finetune.features.decoded import Decoding, Kept, decode, survey
from hf_finetune.features.keys import rows_digest
from hf_finetune.models.backbone import ImageInput
from hf_finetune.recipe import Recipe, dump_recipe
from hf_finetune.runfolder import load_run
from hf_finetune.setup import prepare
from test_features import full, spoil_bytes, spoil_features
from test_processes import SEVERAL, SGD

SMALL = ImageInput((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 0.875, "center", "bicubic")
LABELS = Labels("single", ("a", "b"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))


def save_all_kinds(folder: Path) -> None:
    """Write images of every mode and orientation, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for number, (width, height) in enumerate([(40, 52), (200, 90), (33, 33), (20, 25)]):
        colours = rng.integers(0, 255, (height, width, 4), dtype=np.uint8)
        picture = Image.fromarray(colours[..., :3])
        kinds = {
            "rgb.png": picture,
            "grey.png": picture.convert("L"),
            "alpha.png": Image.fromarray(colours),
            "palette.png": picture.convert("P"),
            "cmyk.jpg": picture.convert("CMYK"),
            "deep.png": Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16)),
        }
        for turned in (3, 6):
            exif = Image.Exif()
            exif[274] = turned
            picture.save(folder / "a" / f"{number}-turned-{turned}.jpg", exif=exif)
            picture.save(folder / "b" / f"{number}-turned-{turned}.png", exif=exif)
        for name, each in kinds.items():
            each.save(folder / "ab"[number % 2] / f"{number}-{name}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("kinds")
    save_all_kinds(folder)
    return load_splits(DataSpec(path=str(folder), validation="train"), seed=0).train


def kept(data: EvalSet, split: str = "train") -> Kept:
    wanted = Decoding(data, split, *survey(data), rows_digest(data, 1)[0])
    return decode(wanted, Accelerator(cpu=True), threads=2, say=lambda _: None, on_batch=lambda: None)


LISTS: dict[str, list[specs.AugmentationSpec]] = {
    "none": [],
    "flip": [specs.HorizontalFlip(), specs.RandomErasing(p=1.0)],
    "shift": [specs.RandomCrop(), specs.Rotation()],
    "flip, then shift": [specs.HorizontalFlip(), specs.RandomCrop()],
    "crop": [specs.RandomResizedCrop(scale=[0.8, 1.0]), specs.RandAugment()],
    "small crops": [specs.RandomResizedCrop(scale=[0.05, 1.0])],
}
INPUTS = {
    "centre": SMALL,
    "squash": ImageInput((24, 32), SMALL.mean, SMALL.std, 1.0, "squash", "bilinear"),
    "border": ImageInput((32, 32), SMALL.mean, SMALL.std, 0.95, "border", "bicubic"),
    "not square": ImageInput((24, 40), SMALL.mean, SMALL.std, 0.875, "center", "bicubic"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("shape", INPUTS)
def test_views_of_kept_images_are_those_of_the_images(name: str, shape: str, rows: Any) -> None:
    train = TrainSet(rows, LABELS, INPUTS[shape], LISTS[name], seed=3, shrink=True)
    before = [train.view(1, index)["pixel_values"] for index in range(len(train))]
    assert {view.shape[1:] for view in before} == {INPUTS[shape].size}
    train.decoded = kept(train)
    for index, view in enumerate(before):
        assert torch.equal(train.view(1, index)["pixel_values"], view), rows[index]
    if name != "crop":  # only there a smaller image stands in for the image
        plain = TrainSet(rows, LABELS, INPUTS[shape], LISTS[name], seed=3)
        for index, view in enumerate(before):
            assert torch.equal(plain.view(1, index)["pixel_values"], view)


@pytest.mark.parametrize("shape", INPUTS)
def test_what_is_measured_is_the_same_to_the_bit(shape: str, rows: Any) -> None:
    data = EvalSet(rows, LABELS, INPUTS[shape])
    before = [data[index]["inputs"]["pixel_values"] for index in range(len(data))]
    data.decoded = kept(data)
    assert sum(data.decoded.stored.ends[-1:]) == len(rows) * 3 * np.prod(INPUTS[shape].size)
    for index, view in enumerate(before):
        assert torch.equal(data[index]["inputs"]["pixel_values"], view)


def test_an_image_is_kept_as_large_as_its_smallest_crop_needs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in rng.integers(1, 3000, 2))
        wanted = tuple(int(side) for side in rng.integers(16, 400, 2))
        crop = specs.RandomResizedCrop(scale=[float(rng.uniform(0.05, 1)), 1.0])
        shrink = Shrink(
            ImageInput((wanted[0], wanted[1]), SMALL.mean, SMALL.std, 1.0, "center", "bicubic"), crop
        )
        size = shrink.size(height, width)
        assert size == (height, width) or size[0] * size[1] < 0.55 * height * width
        if size == (height, width):
            continue
        for ratio in crop.ratio:  # width over height
            area = crop.scale[0] * size[0] * size[1]
            assert (area / ratio) ** 0.5 >= wanted[0] * 0.999
            assert (area * ratio) ** 0.5 >= wanted[1] * 0.999
        assert size[0] >= wanted[0]
        assert size[1] >= wanted[1]


def test_crops_of_a_smaller_copy_are_nearly_those_of_the_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shapes = Image.fromarray(rng.integers(0, 255, (7, 5, 3), dtype=np.uint8)).resize((300, 400))
        shapes.save(tmp_path / name / "0.png")
    rows = load_splits(DataSpec(path=str(tmp_path), validation="train"), seed=0).train
    crop = [specs.RandomResizedCrop(scale=[0.8, 1.0])]
    plain, small = (TrainSet(rows, LABELS, SMALL, crop, seed=0, shrink=shrink) for shrink in (False, True))
    assert survey(small)[1] == 2
    assert survey(small)[0][-1] < 0.05 * survey(plain)[0][-1]
    apart = [
        (plain.view(epoch, 0)["pixel_values"] - small.view(epoch, 0)["pixel_values"]).abs().mean()
        for epoch in range(20)
    ]
    spread = plain.view(0, 0)["pixel_values"].std()
    assert 0 < max(apart) < 0.05 * spread


def test_a_worker_that_is_not_forked_maps_the_images_itself(rows: Any) -> None:
    data = EvalSet(rows, LABELS, SMALL)
    data.decoded = kept(data)
    sent = pickle.dumps(data.decoded)
    assert len(sent) < 5_000
    again = pickle.loads(sent)
    assert again(3).tobytes() == data.decoded(3).tobytes()


def test_everything_that_changes_the_pixels_changes_the_key(rows: Any) -> None:
    def key(data: EvalSet, digest: str = "rows") -> str:
        return Decoding(data, "any", *survey(data), digest).key

    def train(*augmentations: specs.AugmentationSpec, **changes: Any) -> TrainSet:
        given = {"shrink": True, "seed": 0} | changes
        return TrainSet(rows, LABELS, given.pop("input", SMALL), augmentations, **given)

    crop = specs.RandomResizedCrop(scale=[0.8, 1.0])
    keys = [
        key(EvalSet(rows, LABELS, SMALL)),
        key(EvalSet(rows, LABELS, SMALL), "other rows"),
        key(EvalSet(rows, LABELS, INPUTS["border"])),
        key(train(specs.RandomCrop())),
        key(train(crop)),
        key(train(crop, input=INPUTS["not square"])),
        key(train(specs.RandomResizedCrop(scale=[0.5, 1.0]))),
        key(train(crop, shrink=False)),
    ]
    assert len(set(keys)) == len(keys)
    # what comes later in a view is not part of it
    assert key(train(crop)) == key(train(crop, specs.RandAugment(), seed=5))
    assert key(train()) == key(train(specs.HorizontalFlip())) == keys[0]


# ---- runs --------------------------------------------------------------------------------------------------

CROP: dict[str, Any] = {"augment": [{"name": "random_resized_crop", "scale": [0.8, 1.0]}], "strategy": "full"}


def finished(output: Path, **changes: Any) -> Any:
    return runs.run("resnet", output, **CROP | {"data": {"cache": "decoded"}} | changes)


def outcome(run: Any) -> list[Any]:
    return [(row["loss"], row.get("metrics")) for row in run.rows]


def test_a_run_ends_the_same_and_the_next_one_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = finished(tmp_path / "off", data={})
    assert not disk.kept()
    on = finished(tmp_path / "on")
    assert runs.same(runs.weights(on), runs.weights(off))
    assert outcome(on) == outcome(off)
    assert "12 train images decoded once (46.85KB), every view as without" in on.status["features"]["1 all"]
    assert 0 < on.status["data_wait_share"] < 1
    assert on.status["seconds"].keys() == {"training", "training_waited", "evaluating", "evaluating_waited"}
    monkeypatch.setattr(decoded, "_rows", lambda *_: pytest.fail("decoded again"))
    by_workers = finished(tmp_path / "again", data={"cache": "decoded", "workers": 2})
    assert runs.same(runs.weights(by_workers), runs.weights(off))
    main(["cache", "list"])
    assert "12 rows  decoded images" in capsys.readouterr().out
    main(["cache", "prune"])
    assert not disk.kept()


def test_what_is_frozen_and_kept_is_not_decoded_for(tmp_path: Path) -> None:
    frozen: dict[str, Any] = {"strategy": "frozen", "monitor": {"evaluate": "2 steps"}}
    run = finished(tmp_path / "run", **frozen | {"augment": "none", "training": {"steps": 8}})
    assert "computed once" in run.status["features"]["1 head"]
    assert "decoded" not in run.status["features"]["1 head"]
    mixed = finished(tmp_path / "mixed", **frozen | {"training": {"steps": 8}})
    assert "12 train images decoded once" in mixed.status["features"]["1 head"]
    assert "validation images" not in mixed.status["features"]["1 head"]


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_features])
def test_spoiled_images_are_decoded_anew(
    spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finished(tmp_path / "one")
    for each in disk.kept():
        spoil(each.folder)
    second = runs.finetune(runs.recipe("resnet", tmp_path / "two", **CROP, data={"cache": "decoded"}))
    assert capsys.readouterr().out.count("decoded images: those on disk are computed anew") == 2
    assert outcome(first) == outcome(second)


WITHOUT_ROOM: dict[str, tuple[str, dict[str, Any]]] = {
    "pwrite": ("No space left", {}),
    "posix_fallocate": ("No space left", {}),
    "": ("exceed `data.cache_budget` (1KB)", {"cache_budget": "1KB"}),
}


@pytest.mark.parametrize("call", WITHOUT_ROOM)
def test_without_room_a_run_says_so_and_ends_the_same(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = ImageInput((8, 8), SMALL.mean, SMALL.std, 1.0, "center", "bicubic")
    monkeypatch.setattr("hf_finetune.models.load.timm_input", lambda *_, **__: big)
    kept_all = finished(tmp_path / "kept")
    assert "12 of them no larger than the smallest random crop needs" in kept_all.status["features"]["1 all"]
    disk.prune(0)
    reason, changes = WITHOUT_ROOM[call]
    if call:
        monkeypatch.setattr(store.os, call, full)
    run = finished(tmp_path / "run", data={"cache": "decoded"} | changes)
    assert "train not kept decoded" in run.status["features"]["1 all"]
    assert reason in run.status["features"]["1 all"]
    assert not list(disk.features_folder().iterdir())
    assert runs.same(runs.weights(run), runs.weights(kept_all))


def test_a_run_stopped_at_every_step_ends_the_same(tmp_path: Path) -> None:
    def recipe(folder: str, **training: Any) -> Recipe:
        return runs.recipe("resnet", tmp_path / folder, **CROP, data={"cache": "decoded"}, training=training)

    whole = runs.finetune(recipe("whole"), quiet=True)
    for stop in range(4):
        if stop == 2:
            disk.prune(0)
        with pytest.raises(Interrupted):
            runs.finetune(recipe("torn", max_hours=1e-9), resume=True, quiet=True)
    torn = runs.finetune(recipe("torn"), resume=True, quiet=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))
    assert outcome(whole) == outcome(torn)


def test_a_signal_while_images_are_decoded_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoded._rows

    def stopping(*given: Any) -> Any:
        for row in real(*given):
            os.kill(os.getpid(), 15)
            yield row

    monkeypatch.setattr(decoded, "_rows", stopping)
    with pytest.raises(Interrupted, match="SIGTERM"):
        finished(tmp_path / "torn")
    assert not list(disk.features_folder().iterdir())


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save_all_kinds(folder)
    broken = folder / "a" / "0-rgb.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"0-rgb\.png' cannot be decoded"):
        finished(tmp_path / "run", data={"path": str(folder), "validation": 0.25, "cache": "decoded"})
    assert not list(disk.features_folder().iterdir())


def test_texts_are_not_decoded(tmp_path: Path) -> None:
    recipe = runs.recipe("bert", tmp_path / "run", data={"cache": "decoded"}, strategy="full")
    with pytest.raises(RecipeError, match="keeps images, and the data holds texts"):
        prepare(recipe, world_size=1, device=torch.device("cpu"))


def test_two_processes_decode_and_read_the_same(tmp_path: Path) -> None:
    recipe = runs.recipe("vit", tmp_path / "two", **CROP | SGD, data={"cache": "decoded"})
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    codes, printed = nursery.run(SEVERAL, str(tmp_path), log=tmp_path / "log", processes=2)
    assert codes == [0, 0], printed[-3000:]
    assert not list(tmp_path.glob("*.error")), printed
    by_two = {each.folder.name: (each.folder / "1.bin").read_bytes() for each in disk.kept()}
    assert len(by_two) == 2
    disk.prune(0)
    single = runs.run("vit", tmp_path / "one", **CROP | SGD, data={"cache": "decoded"})
    assert {each.folder.name: (each.folder / "1.bin").read_bytes() for each in disk.kept()} == by_two
    assert runs.same(runs.weights(single), runs.weights(load_run(tmp_path / "two")), tolerance=1e-5)
