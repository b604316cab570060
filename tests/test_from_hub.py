"""Backbones, data and trained models by Hub id: what is fetched, what the cache answers, what is said when neither has it."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, close_session, constants
from safetensors.torch import load_file

import runs
import tiny
from hf_finetune import fetch
from hf_finetune.cli import main
from hf_finetune.data.labels import Labels
from hf_finetune.data.sources import open_source
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.stream_splits import load_streams
from hf_finetune.data.streams import Stream
from hf_finetune.errors import FinetuneError, HubError, ModelError, UserError
from hf_finetune.inference import evaluate_model, load_trained
from hf_finetune.models.load import Backbone, load_backbone
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.recipe import load_recipe
from hub_server import Hub

COLOURS = Labels("single", runs.CLASSES)


@pytest.fixture(autouse=True)
def alone(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let `datasets` too know this Hub alone, with an empty cache; wait for nobody."""
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setattr(fetch, "_WAITS", (0.0, 0.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run on tiny images."""
    return runs.run("vit", tmp_path_factory.mktemp("trained") / "run", strategy="full").model_folder


@pytest.fixture
def there(hub: Hub, trained: Path, tmp_path: Path) -> Hub:
    """A Hub that holds a backbone, a data set and a trained model, each with a tag v1."""
    hub.user("me")
    rows = tmp_path / "rows"
    rows.mkdir()
    table = Dataset.from_dict(
        {"text": ["a film", "the soup", "a soup"] * 4, "label": ["pos", "neg", "neg"] * 4}
    )
    table.to_parquet(rows / "train-00000-of-00001.parquet")
    for name, kind, folder in [
        ("me/backbone", "model", Path(runs.backbone("vit"))),
        ("me/data", "dataset", rows),
        ("me/trained", "model", trained),
    ]:
        repo = hub.upload(folder, name, kind)
        repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    return hub


def backbone(name: str, **spec: Any) -> Backbone:
    return load_backbone(BackboneSpec(id=name, **spec), COLOURS, "image", seed=0)


ASK: dict[str, Callable[..., Any]] = {
    "backbone": lambda name, revision=None: backbone(name, revision=revision),
    "data": lambda name, revision=None: open_source(DataSpec(path=name, revision=revision)),
    "trained": lambda name, revision=None: load_trained(f"{name}@{revision}" if revision else name),
}
"""What is asked for by id -> how."""
KIND = {"backbone": "model", "data": "dataset", "trained": "model"}
WORD = {"model": "model", "dataset": "data set"}


def login(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)


def repo_of(hub: Hub, what: str) -> Any:
    return hub.repos[KIND[what], f"me/{what}"]


def large_file(hub: Hub, what: str) -> str:
    """Return the key of the content of the repository's one large file."""
    repo = repo_of(hub, what)
    (blob,) = [blob for blob in repo.commits[repo.refs["refs/heads/main"]].files.values() if blob.lfs]
    return str(blob.sha256)


def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody answer any more."""
    hub.faults.clear()
    hub.fail("cut request", times=10**6)
    close_session()


def damage(hub: Hub, what: str) -> None:
    key = large_file(hub, what)
    hub.objects[key] = hub.objects[key][:-9] + b"\0damaged\0"


def shorten(hub: Hub, what: str) -> None:
    key = large_file(hub, what)
    hub.objects[key] = hub.objects[key][:-9]


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


Prepare = Callable[[Hub, str, pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[str, str | None, Prepare, int, list[str]]] = {
    "unknown id": ("me/nothing", None, lambda h, w, m: None, 2, ["the Hub has no {kind} of that name", "hf auth login"]),
    "no id": ("me/no thing", None, lambda h, w, m: None, 2, ["no valid Hub id"]),
    "near a cached id": ("me/{what}s", None, lambda h, w, m: ASK[w](f"me/{w}"), 2, ["Did you mean 'me/{what}'?"]),
    "wrong revision": (
        "me/{what}", "main2", lambda h, w, m: None, 2, ["no revision 'main2'", "Did you mean 'main'?", "It has main, v1"],
    ),
    "unknown commit": ("me/{what}", "0" * 40, lambda h, w, m: None, 2, [f"no revision '{'0' * 40}'"]),
    "gated": (
        "me/{what}", None, lambda h, w, m: setattr(repo_of(h, w), "gated", True), 2,
        ["this {kind} is gated", "Ask for access on http", "hf auth login"],
    ),
    "gated, not let in": (
        "me/{what}", None,
        lambda h, w, m: (setattr(repo_of(h, w), "gated", True), login(m, h.user("you"))), 2, ["this {kind} is gated", "run again"],
    ),
    "private, no token": (
        "me/{what}", None, lambda h, w, m: setattr(repo_of(h, w), "private", True), 2, ["or a private one to log in for"],
    ),
    "private, another's token": (
        "me/{what}", None,
        lambda h, w, m: (setattr(repo_of(h, w), "private", True), login(m, h.user("you"))), 2,
        ["or a private one that your token may not read"],
    ),
    "expired token": (
        "me/{what}", None, lambda h, w, m: login(m, "hf_" + "expired" * 5), 2,
        ["does not accept your token", "settings/tokens", "unset HF_TOKEN"],
    ),
    "forbidden": ("me/{what}", None, lambda h, w, m: h.fail("403", "GET", times=99), 2, ["your token may not read it"]),
    "another kind": (
        "me/{other}", None, lambda h, w, m: None, 2, ["on the Hub this is a {otherkind}, not a {kind}"],
    ),
    "server error": ("me/{what}", None, lambda h, w, m: h.fail("503", "/api/", times=99), 1, ["it answers 503", "run again"]),
    "too many requests": ("me/{what}", None, lambda h, w, m: h.fail("429", "/api/", times=99), 1, ["it answers 429"]),
    "no network": ("me/{what}", None, lambda h, w, m: unplug(h, m), 1, ["the Hub cannot be reached", "Check the network"]),
    "damaged on its way": ("me/{what}", None, lambda h, w, m: damage(h, w), 1, ["was damaged on its way", "it is removed. Run again"]),
    "shortened on its way": (
        "me/{what}", None, lambda h, w, m: shorten(h, w), 1, ["a download broke off", "Run again; whole files are kept"],
    ),
    "disk full": (
        "me/{what}", None, lambda h, w, m: m.setattr("huggingface_hub.file_download.http_get", full_disk), 1,
        ["no space left on device", "HF_HOME"],
    ),
    "offline": (
        "me/{what}", None, lambda h, w, m: (m.setenv("HF_HUB_OFFLINE", "1"), m.setattr(constants, "HF_HUB_OFFLINE", True)), 2,
        ["HF_HUB_OFFLINE=1 is set", "not in the Hub's cache", "Unset HF_HUB_OFFLINE"],
    ),
}  # fmt: skip
"""What goes wrong -> id, revision, how it comes about, exit code, words of the message."""


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("case", FAULTS)
def test_what_goes_wrong_is_said(case: str, what: str, there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name, revision, prepare, code, words = FAULTS[case]
    kind, other = WORD[KIND[what]], "backbone" if what == "data" else "data"
    fill = {"what": what, "kind": kind, "other": other, "otherkind": WORD[KIND[other]]}
    prepare(there, what, monkeypatch)
    with pytest.raises(FinetuneError) as caught:
        ASK[what](name.format(**fill), revision)
    said = str(caught.value)
    assert caught.value.exit_code == code, said
    assert (code == 1) == isinstance(caught.value, HubError)
    for each in words:
        assert each.format(**fill) in said, said
    assert name.format(**fill) in said
    assert "hf_you" not in said
    assert "hf_expired" not in said
    assert len(said) < 1000, said


def test_the_command_line_shows_no_traceback(
    there: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there.fail("503", "/api/", times=99)
    for words, code in [
        (["evaluate", "me/trained"], 1),
        (["predict", "me/trained", "x.png"], 1),
        (["train", "frozen", "backbone=me/backbone", f"data={runs.images()}"], 1),
        (["train", "frozen", "data=me/data", "--output", str(tmp_path / "run")], 1),
        (["train", "frozen", "backbone=me/no thing", "--output", str(tmp_path / "run")], 2),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        shown = capsys.readouterr().err
        assert end.value.code == code, shown
        assert shown.splitlines()[-1].startswith("error: "), shown
        assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_fetched_anew(there: Hub) -> None:
    key = large_file(there, "backbone")
    good = there.objects[key]
    damage(there, "backbone")
    with pytest.raises(HubError, match="damaged"):
        backbone("me/backbone")
    there.objects[key] = good
    assert backbone("me/backbone").report.share == 1.0


def test_a_hub_that_falters_is_asked_again(there: Hub) -> None:
    there.fail("503", "/api/models", times=2)
    there.fail("cut response", "/resolve/.*config.json", times=1)
    assert backbone("me/backbone").report.note is None


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("revision", [None, "v1", "a commit"])
@pytest.mark.parametrize("way", ["offline", "no network", "503"])
def test_what_is_cached_needs_no_hub(
    what: str, revision: str | None, way: str, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repo_of(there, what).refs["refs/heads/main"]
    revision = commit if revision == "a commit" else revision
    before = ASK[what](f"me/{what}", revision)
    if way == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        there.calls.clear()
    elif way == "503":
        there.fail("503", "/api/|/resolve/", times=10**6)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
    else:
        unplug(there, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
    after = ASK[what](f"me/{what}", revision)
    if what == "backbone":
        assert runs.same(before.model.state_dict(), after.model.state_dict())
        assert after.source["commit"] == commit
        assert revision == commit or commit[:12] in after.report.note
    elif what == "data":
        assert list(before.splits["train"]) == list(after.splits["train"])
        assert after.commit == commit
        assert revision == commit or any(commit[:12] in note for note in after.notes)
    else:
        assert after.repository.commit == commit
    assert way != "offline" or not there.calls


def test_a_moved_branch_is_followed_and_a_pinned_commit_is_not(there: Hub, tmp_path: Path) -> None:
    first = open_source(DataSpec(path="me/data"))
    rows = tmp_path / "more"
    rows.mkdir()
    Dataset.from_dict({"text": ["new"] * 3, "label": ["pos"] * 3}).to_parquet(
        rows / "train-00000-of-00001.parquet"
    )
    there.upload(rows, "me/data", "dataset")
    second = open_source(DataSpec(path="me/data"))
    assert (len(first.splits["train"]), len(second.splits["train"])) == (12, 3)
    assert first.commit != second.commit
    for revision in ("v1", first.commit):
        again = open_source(DataSpec(path="me/data", revision=revision))
        assert (again.commit, len(again.splits["train"])) == (first.commit, 12)


def test_the_cache_answers_with_the_commit_asked_for(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` alone takes the newest it has, whatever was asked for."""
    test_a_moved_branch_is_followed_and_a_pinned_commit_is_not(there, tmp_path)
    unplug(there, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert len(open_source(DataSpec(path="me/data", revision="v1")).splits["train"]) == 12
    assert len(open_source(DataSpec(path="me/data")).splits["train"]) == 3


def test_a_data_set_is_streamed_at_a_commit(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DataSpec(path="me/data", streaming=True, rows=12, shuffle_buffer=4, validation=0.25)
    splits = load_streams(spec, seed=0)
    stream = splits.train
    assert isinstance(stream, Stream)
    batches = stream.batches(3)
    rows = [row for _ in range(3) for row in next(batches)[1]]
    assert len({row["row"] for row in rows}) == len(rows) == 9
    assert splits.report.commit == there.repos["dataset", "me/data"].refs["refs/heads/main"]
    assert not list(tmp_path.glob("datasets-cache/**/*.arrow")), "nothing is kept"
    later = stream.batches(3)
    unplug(there, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match=r"the stream broke off at row 0 .*--resume. goes on"):
        next(later)


def test_configurations_of_a_data_set(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    token = there.user("me")
    table = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    for config in ("small", "large"):
        table.push_to_hub("me/both", config_name=config, token=token)
    assert len(open_source(DataSpec(path="me/both", config="small")).splits["train"]) == 2
    for config, words in [
        (None, "it needs a configuration"),
        ("medium", "there is no configuration 'medium'"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            open_source(DataSpec(path="me/both", config=config))
        assert "['small', 'large']" in str(caught.value) or "['large', 'small']" in str(caught.value)
    unplug(there, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert len(open_source(DataSpec(path="me/both", config="small")).splits["train"]) == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"README.md": b"# nothing"},
            ["holds no file that `datasets` reads", "parquet, csv, json or image files"],
        ),
        ({"train.parquet": b"no parquet"}, ["it could not be loaded: "]),
        ({"train.csv": b'text,label\n"a,b\n'}, ["it could not be loaded: "]),
    ],
    ids=["no data", "broken parquet", "broken csv"],
)
def test_a_data_set_that_cannot_be_read(
    files: dict[str, bytes], words: list[str], hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    hub.upload(tmp_path / "files", "me/odd", "dataset")
    with pytest.raises(UserError) as caught:
        open_source(DataSpec(path="me/odd"))
    for each in words:
        assert each in str(caught.value), str(caught.value)


# What a repository may hold


MISSING = {
    "no config": ({"README.md": b"# nothing"}, ["holds no config.json"]),
    "no weights": ({"config.json": b'{"model_type": "vit"}'}, ["holds no model.safetensors", "backbone.pretrained: false"]),
    "broken config": ({"config.json": b"{"}, ["cannot be read as JSON"]),
    "neither library": ({"config.json": b"{}"}, ["neither a timm `architecture` nor a transformers `model_type`"]),
    "a pickle": (
        {"config.json": b'{"model_type": "vit"}', "pytorch_model.bin": b"x", "training_args.bin": b"x"},
        ["its weights are in pytorch_model.bin", "backbone.allow_pickle: pytorch_model.bin"],
    ),
    "a shard is missing": (
        {"config.json": b'{"model_type": "vit"}', "model.safetensors.index.json": b'{"weight_map": {"a": "model-1-of-2.safetensors"}}'},
        ["holds no model-1-of-2.safetensors, one of 1 files"],
    ),
    "a foreign adapter": ({"adapter_config.json": b"{}"}, ["an adapter without a config.json", "merge_and_unload"]),
    "an adapter of nothing": (
        {"config.json": b'{"model_type": "vit"}', "adapter_config.json": b"{}"}, ["names no base model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_a_repository_lacks_is_said(case: str, hub: Hub, tmp_path: Path) -> None:
    files, words = MISSING[case]
    for name, content in files.items():
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    hub.upload(tmp_path / "files", "me/odd")
    for read in (lambda: backbone("me/odd"), lambda: load_trained("me/odd")):
        with pytest.raises(ModelError) as caught:
            read()
        for each in words:
            assert each in str(caught.value), str(caught.value)


class Opens:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def as_pickle(folder: Path, target: Path, name: str, nested: bool = False) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save({"state_dict": tensors} if nested else tensors, target / name)
    return target


@pytest.mark.parametrize(
    ("family", "name"),
    [("vit", "pytorch_model.bin"), ("vision-vit", "pytorch_model.bin"), ("vit", "best.pth")],
)
def test_a_pickle_is_read_when_it_is_allowed_by_name(
    family: str, name: str, hub: Hub, tmp_path: Path
) -> None:
    folder = as_pickle(Path(runs.backbone(family)), tmp_path / "pickled", name, nested=name == "best.pth")
    hub.upload(folder, "me/pickled")
    for place in ("me/pickled", str(folder)):
        with pytest.raises(ModelError, match=f"its weights are in {name}"):
            backbone(place)
        with pytest.raises(ModelError, match=r"holds no 'other.bin'"):
            backbone(place, allow_pickle="other.bin")
        read = backbone(place, allow_pickle=name)
        assert runs.same(read.model.state_dict(), backbone(runs.backbone(family)).model.state_dict())


@pytest.mark.parametrize("family", ["vit", "vision-vit"])
def test_no_pickle_runs_code(family: str, hub: Hub, tmp_path: Path) -> None:
    folder = as_pickle(Path(runs.backbone(family)), tmp_path / "evil", "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Opens(tmp_path / "opened")}))
    hub.upload(folder, "me/evil")
    with pytest.raises(
        ModelError, match=r"pytorch_model.bin holds more than tensors, or is damaged, and is not read"
    ):
        backbone("me/evil", allow_pickle="pytorch_model.bin")
    assert not (tmp_path / "opened").exists()


def with_code(folder: Path) -> Path:
    """Turn a transformers folder into one that brings its own modelling code."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import ViTConfig, ViTForImageClassification\n\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own'\n\n"
        "class OwnModel(ViTForImageClassification):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_from_the_hub_is_run_when_asked_at_a_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = with_code(Path(shutil.copytree(runs.backbone("vision-vit"), tmp_path / "own")))
    commit = hub.upload(folder, "me/own").refs["refs/heads/main"]
    with pytest.raises(ModelError, match=r"brings code of its own: read it"):
        backbone("me/own")
    for revision in (None, "main"):
        with pytest.raises(ModelError, match=r"set `backbone.revision` to a commit, all 40 digits"):
            backbone("me/own", trust_remote_code=True, revision=revision)
    read = backbone("me/own", trust_remote_code=True, revision=commit)
    assert type(read.model).__name__ == "OwnModel"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "you/code--own.OwnConfig"
    (folder / "config.json").write_text(json.dumps(config))
    commit = hub.upload(folder, "me/own").refs["refs/heads/main"]
    with pytest.raises(
        ModelError, match="code of another repository, you/code, which `revision` does not pin"
    ):
        backbone("me/own", trust_remote_code=True, revision=commit)


# What was trained, as the next run's backbone


def test_the_output_layer_goes_on_for_the_same_labels(there: Hub, tmp_path: Path) -> None:
    first = load_trained("me/trained").backbone.model.state_dict()
    kept = backbone("me/trained")
    assert kept.report.kept_head
    assert not kept.report.new
    assert runs.same(first, kept.model.state_dict())
    fresh = backbone("me/trained", keep_head=False)
    assert not fresh.report.kept_head
    assert fresh.report.new == ("head.weight", "head.bias")
    assert not fresh.model.state_dict()["head.weight"].any()
    others = load_backbone(BackboneSpec(id="me/trained"), Labels("single", ("ant", "bee")), "image", seed=0)
    assert others.report.new == ("head.weight", "head.bias")
    many = load_backbone(BackboneSpec(id="me/trained"), Labels("multi", runs.CLASSES), "image", seed=0)
    assert not many.report.kept_head, "outputs of another kind mean something else"


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_an_adapter_as_backbone_is_merged_into_its_base(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.upload(Path(runs.backbone(name)), "me/base")
    first = runs.run(
        name,
        tmp_path / "first",
        strategy="lora",
        backbone={"id": "me/base"},
        optimizer={"name": "adamw", "lr": 0.1},
    )
    commit = hub.upload(first.model_folder, "me/adapter").refs["refs/heads/main"]
    adapted = load_trained("me/adapter")
    modality = "image" if name == "vit" else "text"
    merged = load_backbone(BackboneSpec(id="me/adapter"), adapted.labels, modality, seed=0)
    assert merged.source["commit"] == commit
    assert merged.source["adapter_of"] == {
        "id": "me/base",
        "revision": hub.repos["model", "me/base"].refs["refs/heads/main"],
    }
    assert merged.report.kept_head
    inputs = tiny.batch(modality)
    with torch.no_grad():
        one, other = (
            (m(**inputs).logits if name == "bert" else m(inputs["pixel_values"]))
            for m in (adapted.backbone.model.eval(), merged.model)
        )
    assert torch.allclose(one, other, atol=1e-5)
    assert one.abs().max() > 1e-3, "the adapter has learnt something"
    hub.repos.pop(("model", "me/base"))
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--me--base")
    with pytest.raises(
        ModelError, match=r"it is an adapter, and its base model cannot be loaded. Backbone 'me/base'"
    ):
        load_backbone(BackboneSpec(id="me/adapter"), adapted.labels, modality, seed=0)


# Evaluate and predict on repositories


def test_data_that_is_not_here_is_asked_for(hub: Hub, trained: Path, tmp_path: Path) -> None:
    away = Path(shutil.copytree(trained, tmp_path / "away"))
    text, (was,) = (away / "recipe.yaml").read_text(), {Path(runs.images()).name}
    assert f"./{was}" in text
    for path in (f"./{was}", "my/photos"):
        (away / "recipe.yaml").write_text(text.replace(f"./{was}", path))
        hub.upload(away, "me/away")
        with pytest.raises(
            UserError, match=r"the data which the recipe of me/away names; give it with data=PATH"
        ):
            evaluate_model("me/away", [])
    assert evaluate_model("me/away", [f"data={runs.images()}"]).metrics


def test_a_foreign_recipe_runs_no_code(
    hub: Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "foreign"))
    recipe = load_recipe(folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("metrics: []", "metrics: ['evaluate/somebody/evil']"))
    assert "somebody/evil" in (folder / "recipe.yaml").read_text()
    hub.upload(folder, "me/foreign")
    assert recipe.monitor.metric in evaluate_model("me/foreign", [f"data={runs.images()}"]).metrics
    assert "a recipe from the Hub may not run code" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(
        text.replace("trust_remote_code: false", "trust_remote_code: true").replace("revision: null", f"revision: '{'a' * 40}'", 1)
        .replace("id: ./vit", "id: me/whatever")
    )  # fmt: skip
    hub.upload(folder, "me/foreign")
    with pytest.raises(UserError, match=r"backbone.trust_remote_code, which a recipe from the Hub may not"):
        load_trained("me/foreign")


def test_evaluate_takes_the_data_that_was_measured(there: Hub, trained: Path, tmp_path: Path) -> None:
    """The card names the commit; the branch has moved since."""
    token = there.user("me")
    images = datasets.load_dataset("imagefolder", data_dir=runs.images())
    images.push_to_hub("me/images", token=token)
    run = runs.run("vit", tmp_path / "run", strategy="full", data={"path": "me/images"})
    api = HfApi(endpoint=there.url, token=token)
    api.create_repo("me/result")
    api.upload_folder(repo_id="me/result", folder_path=run.model_folder)
    images["validation"] = images["validation"].select(range(3))
    images.push_to_hub("me/images", token=token)
    for place in (str(run.path), "me/result"):
        result = evaluate_model(place, [])
        assert result.metrics == run.best["metrics"]
        assert result.loss == run.best["loss"]
        assert len(result.labels) == 7


# A run goes on with what it began


def test_a_backbone_that_moved_stops_a_resume(there: Hub, tmp_path: Path) -> None:
    text = {
        "strategy": "full",
        "backbone": {"id": "me/backbone"},
        "training": {"checkpoint": {"every": "1 step"}},
    }
    runs.run("vit", tmp_path / "run", **text)
    commit = repo_of(there, "backbone").refs["refs/heads/main"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("a new commit")
    there.upload(tmp_path / "more", "me/backbone")
    longer = ["training.steps=6", "--output", str(tmp_path / "run"), "--resume", "-q"]
    recipe = str(tmp_path / "run" / "recipe.yaml")
    with pytest.raises(SystemExit) as end:
        main(["train", recipe, *longer])
    assert end.value.code == 2
    main(["train", recipe, *longer, f"backbone.revision={commit}"])
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (status["status"], status["backbone"]["commit"], status["total_steps"]) == ("done", commit, 6)
