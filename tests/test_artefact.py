"""What a run leaves in model/: a repository of its own library, that names nothing of the machine it was made on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
import tiny
from hf_finetune.data.labels import Labels
from hf_finetune.errors import FinetuneError
from hf_finetune.hub.published import published_recipe
from hf_finetune.hub.short_recipe import short_recipe
from hf_finetune.inference import evaluate_model, load_trained
from hf_finetune.models.load import load_backbone
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.recipe import load_recipe, parse_recipe, shipped_recipes
from hf_finetune.runfolder import Run

KEPT = {
    "timm": ("resnet", {}, {"config.json", "model.safetensors", "confusion.png"}),
    "transformers image": (
        "vision-vit",
        {},
        {"config.json", "model.safetensors", "preprocessor_config.json", "confusion.png"},
    ),
    "transformers text": (
        "bert",
        {},
        {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "confusion.png"},
    ),
    "adapter on timm": (
        "vit",
        {"strategy": "lora"},
        {"adapter_config.json", "adapter_model.safetensors", "config.json", "confusion.png"},
    ),
    "adapter on transformers": (
        "bert",
        {"strategy": "lora"},
        {
            *("adapter_config.json", "adapter_model.safetensors", "config.json", "confusion.png"),
            *("tokenizer.json", "tokenizer_config.json"),
        },
    ),
    "merged adapter": (
        "vit",
        {"strategy": {"name": "lora", "merge": True}},
        {"config.json", "model.safetensors", "confusion.png"},
    ),
}
"""What is run -> backbone, changes of the recipe, files beside the ones every model has."""
ALWAYS = {"README.md", "recipe.yaml", "curves.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the run of a row of `KEPT`, made once."""
    folder, done = tmp_path_factory.mktemp("artefact-machine"), dict[str, Run]()

    def get(name: str) -> Run:
        if name not in done:
            backbone, changes, _ = KEPT[name]
            done[name] = runs.run(
                backbone, folder / name, **{"strategy": "full"} | changes, training={"steps": 2}
            )
        return done[name]

    return get


@pytest.mark.parametrize("name", KEPT)
def test_files(name: str, trained: Any) -> None:
    folder = trained(name).model_folder
    assert {path.name for path in folder.iterdir()} == KEPT[name][2] | ALWAYS


@pytest.mark.parametrize("name", KEPT)
def test_no_file_names_the_machine(name: str, trained: Any) -> None:
    done = trained(name)
    places = [str(done.path.parent), str(Path(runs.backbone("vit")).parent), str(Path.home()), "/tmp/"]
    for path in done.model_folder.rglob("*"):
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path.name
    exact = load_recipe(done.recipe_path)
    assert exact.backbone.id == runs.backbone(KEPT[name][0]), "the run's own recipe is exact"
    assert Path(str(exact.data.path)).exists()


@pytest.mark.parametrize("name", KEPT)
def test_labels_stand_there_both_ways(name: str, trained: Any) -> None:
    done = trained(name)
    names = done.status["labels"]
    config = json.loads((done.model_folder / "config.json").read_text(encoding="utf-8"))
    if "timm" in name or name == "merged adapter":
        assert config["label_names"] == names
        from transformers import AutoConfig

        read = AutoConfig.from_pretrained(done.model_folder)
        assert read.id2label == dict(enumerate(names))
        assert read.label2id == {label: number for number, label in enumerate(names)}
    else:
        assert config["id2label"] == {str(number): label for number, label in enumerate(names)}
        assert config["label2id"] == {label: number for number, label in enumerate(names)}


def test_a_run_folder_and_its_model_folder_know_their_data(trained: Any) -> None:
    done = trained("timm")
    for place in (done.path, done.model_folder):
        assert evaluate_model(str(place), []).metrics["accuracy"] == done.best["metrics"]["accuracy"]


def test_a_published_model_asks_for_its_data(trained: Any, tmp_path: Path) -> None:
    done, away = trained("timm"), tmp_path / "downloaded"
    away.symlink_to(done.model_folder)
    with pytest.raises(FinetuneError, match=r"there is no such file or folder") as refused:
        evaluate_model(str(away), [])
    place = str(Path(runs.images()).parent)
    assert place not in str(refused.value), "it names the folder, not where it lay"
    measured = evaluate_model(str(away), [f"data={runs.images()}", "split=validation"])
    assert measured.metrics["accuracy"] == done.best["metrics"]["accuracy"]


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shipped": ({}, {"data.path": "shipped/digits", "backbone.id": "shipped/tiny-resnet"}),
    "ids": (
        {"data": "user/set", "backbone": "timm/resnet18.a1_in1k"},
        {"data.path": "user/set", "backbone.id": "timm/resnet18.a1_in1k"},
    ),
    "a local folder": ({"data": "$HERE/photos", "backbone": "$HERE/net"}, {"data.path": "./photos", "backbone.id": "./net"}),
    "a file of a name like an id": ({"data": "$HERE/photos/sst2"}, {"data.path": "./sst2"}),
    "files": (
        {"data": {"path": ["$HERE/a.csv", "$HERE/b.csv"], "validation": "$HERE/dev.csv"}},
        {"data.path": ["./a.csv", "./b.csv"], "data.validation": "dev.csv"},
    ),
    "a slice": ({"data": {"train": "train[:90%]", "validation": "train[90%:]"}}, {"data.train": "train[:90%]"}),
    "where it ran": (
        {"output": "$HERE/out", "hub": {"repo_id": "me/it"}, "trackers": ["tensorboard"]},
        {"output": None, "hub": None, "trackers": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe(name: str, tmp_path: Path) -> None:
    given, expected = PUBLISHED[name]
    for folder in ("photos/sst2", "net"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.csv", "b.csv", "dev.csv"):
        (tmp_path / file).touch()
    told = json.loads(json.dumps({"strategy": "full", **given}).replace("$HERE", str(tmp_path)))
    recipe = published_recipe(parse_recipe(told))
    values = recipe.model_dump(by_alias=True)
    for key, value in expected.items():
        found: Any = values
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    assert str(tmp_path) not in json.dumps(values, default=str)
    assert parse_recipe(json.loads(json.dumps(values, default=str))) == recipe


def test_the_commit_of_the_backbone_is_pinned() -> None:
    recipe = parse_recipe({"strategy": "full", "backbone": "user/net"})
    assert published_recipe(recipe, commit="abc").backbone.revision == "abc"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_short_recipe_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    text = short_recipe(recipe)
    import yaml

    assert parse_recipe(yaml.safe_load(text)) == recipe
    assert "backbone:" in text
    assert "data:" in text
    assert len(text.splitlines()) < 60


def test_transformers_splits_large_weights_and_timm_keeps_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm reads one model.safetensors; a split one of transformers loads again with equal outputs."""
    from transformers import AutoModelForSequenceClassification

    from hf_finetune.models import load_transformers

    labels = Labels("single", ("bad", "good"))
    read = load_backbone(BackboneSpec(id=runs.backbone("bert")), labels, "text", seed=0)
    real = type(read.model).save_pretrained
    monkeypatch.setattr(
        type(read.model), "save_pretrained", lambda self, folder: real(self, folder, max_shard_size="20KB")
    )
    load_transformers.save(read.model, read.input.tokenizer, tmp_path / "split", labels)
    monkeypatch.undo()
    assert len(list((tmp_path / "split").glob("model-*-of-*.safetensors"))) > 1
    inputs = tiny.batch("text")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "split").eval()
    again = load_backbone(BackboneSpec(id=str(tmp_path / "split")), labels, "text", seed=0)
    with torch.no_grad():
        expected = read.model(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(again.model(**inputs).logits, expected)


def test_every_file_is_on_the_disk_before_the_model_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash right after the renaming must not leave a model of names without contents."""
    synced, real_sync, real_rename = set[str](), os.fsync, Path.rename
    moved: list[set[str]] = []

    def sync(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".model.new":
            inside = {str(path.resolve()) for path in [self, *self.rglob("*")]}
            moved.append(inside - synced)
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    done = runs.run("resnet", tmp_path / "run", strategy="full", training={"steps": 1})
    assert moved == [set()]
    assert str(done.path.resolve()) in synced, "the renaming itself"
    assert {str(path.resolve()) for path in done.model_folder.iterdir()} <= synced


def test_multi_label_answers_are_kept(tmp_path: Path) -> None:
    rows = [(f"the {word} film", labels) for word in ("good", "bad", "very") for labels in ("a", "b", "a b")]
    rows = [(text, json.dumps(labels.split())) for text, labels in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": t, "label": json.loads(la)}) for t, la in rows), encoding="utf-8"
    )
    done = runs.run(
        "bert",
        tmp_path / "run",
        strategy="full",
        data={"path": str(file), "labels": "multi", "validation": 0.4},
    )
    true, predicted = done.predictions() or ([], [])
    assert len(true) == len(predicted) == done.status["validation_rows"]
    trained = load_trained(str(done.path))
    result = evaluate_model(str(done.path), [])
    assert predicted == [np.flatnonzero(row > 0).tolist() for row in result.logits]
    assert {number for row in true for number in row} <= set(range(trained.labels.outputs))
