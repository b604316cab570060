"""The model card: what it says, where it has it from, and what is kept of it when it is written again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from PIL import Image

import runs
from hf_finetune import emissions
from hf_finetune.hub import base_model
from hf_finetune.hub.base_model import BaseModel, find_base
from hf_finetune.hub.card import card_data, edited_sections, keep_edits, model_card, with_repo_id
from hf_finetune.hub.card_edits import NOTE, Section, new_card, read_card
from hf_finetune.hub.card_facts import CardFacts, Measured, collect
from hf_finetune.hub.card_sections import SECTIONS
from hf_finetune.hub.card_usage import FOLDER
from hf_finetune.hub.eval_results import eval_result_files
from hf_finetune.inference import predict_inputs
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.recipe import load_recipe
from hf_finetune.report.confusion import save_confusion
from hf_finetune.report.results import confused_pairs, evaluation_table, label_scores
from hf_finetune.runfolder import Run, load_run
from hf_finetune.setup import prepare

SHA = "0123456789abcdef0123456789abcdef01234567"


# ---- runs ----------------------------------------------------------------------------------------------------------

REGRESSION = [(f"the {'good' if n % 2 else 'bad'} film", float(n % 3)) for n in range(12)]
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("resnet", {"strategy": "full"}),
    "timm adapter": ("vit", {"strategy": "lora"}),
    "timm merged": ("vit", {"strategy": {"name": "lora", "merge": True}}),
    "transformers image": ("vision-vit", {"strategy": "full"}),
    "transformers image adapter": ("vision-vit", {"strategy": "lora"}),
    "transformers text": ("bert", {"strategy": "full"}),
    "transformers text adapter": ("bert", {"strategy": "lora"}),
    "pairs of texts": ("bert", {"strategy": "full", "data": {"path": "$PAIRS", "columns": {"text": ["text", "other"]}}}),
    "values": ("bert", {"strategy": "full", "data": {"path": "$VALUES", "labels": "regression"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return the run of a row of `TRAINED`, made once."""
    folder, done = tmp_path_factory.mktemp("cards"), dict[str, Run]()
    pairs = [(text, "a very fine film", label) for text, label in (("good", "pos"), ("bad", "neg")) * 6]
    files = {
        "$PAIRS": runs.table(folder, pairs, "pairs.csv", ("text", "other", "label")),
        "$VALUES": runs.table(folder, REGRESSION, "values.csv"),
    }

    def get(name: str) -> Run:
        if name not in done:
            backbone, changes = TRAINED[name]
            changes = json.loads(json.dumps(changes))
            if "data" in changes:
                changes["data"]["path"] = files[changes["data"]["path"]]
            done[name] = runs.run(backbone, folder / name, **changes, training={"steps": 4})
        return done[name]

    return get


@pytest.fixture(scope="module")
def facts(trained: Callable[[str], Run]) -> CardFacts:
    """Return the facts of the timm run."""
    done = trained("timm")
    setup = prepare(load_recipe(done.recipe_path), world_size=1, device=torch.device("cpu"))
    return collect(setup, done, final=True, pictures=frozenset({"curves.png", "confusion.png"}))


def section(card: str, key: str) -> str:
    """Return the text of a section of a card."""
    return next(part.text for part in read_card(card).parts if isinstance(part, Section) and part.key == key)


# ---- what stands in it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_the_hubs_own_parser_reads_it(name: str, trained: Callable[[str], Run]) -> None:
    done = trained(name)
    file = done.model_folder / "README.md"
    card = ModelCard.load(file)
    assert metadata_load(file) == card.data.to_dict()
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == pytest.approx(done.best["metrics"], nan_ok=True)
    assert {each.dataset_type for each in card.data.eval_results} == {"local"}
    assert card.data.pipeline_tag == done.status["task"]
    library = "peft" if "adapter" in name else name.split()[0]
    assert card.data.library_name == (library if library in ("peft", "timm") else "transformers")
    config = json.loads((Path(runs.backbone(TRAINED[name][0])) / "config.json").read_text(encoding="utf-8"))
    stated = config.get("pretrained_cfg", {}).get("license")  # timm writes one
    assert card.data.to_dict().get("license") == stated, "where none is known, none is invented"
    assert "base_model" not in card.data.to_dict()
    assert edited_sections(file.read_text(encoding="utf-8")) == []


def test_the_figures_are_those_of_the_weights(trained: Callable[[str], Run]) -> None:
    done = trained("timm")
    card = (done.model_folder / "README.md").read_text(encoding="utf-8")
    figures = section(card, "results")
    for value in (*done.best["metrics"].values(), done.best["loss"]):
        assert f"{value:.4f}" in figures
    assert f"all of split `validation`) of `{Path(runs.images()).name}`" in figures
    assert f"at step {done.best['step']:,}" in figures


def test_pictures_stand_there_when_they_are_there(trained: Callable[[str], Run], facts: CardFacts) -> None:
    for name in ("timm", "values"):
        done = trained(name)
        text = (done.model_folder / "README.md").read_text(encoding="utf-8")
        for picture in ("curves.png", "confusion.png"):
            assert (
                (f"]({picture})" in text)
                == (done.model_folder / picture).is_file()
                == (name == "timm" or picture == "curves.png")
            )
    assert ".png" not in model_card(dataclasses.replace(facts, pictures=frozenset()))


def test_a_model_that_was_never_measured_has_no_figure(facts: CardFacts) -> None:
    card = model_card(dataclasses.replace(facts, best=None, answers=None))
    data = ModelCard(card).data.to_dict()
    assert "model-index" not in data
    assert "metrics" not in data
    assert "model_name" not in data
    assert "never measured" in section(card, "summary")
    assert "| accuracy |" not in section(card, "results")


def test_what_is_no_number_is_no_result(facts: CardFacts) -> None:
    best = dict(facts.best or {}) | {"metrics": {"accuracy": 0.5, "roc_auc": float("nan")}}
    card = model_card(dataclasses.replace(facts, best=best))
    assert [each.metric_type for each in ModelCard(card).data.eval_results] == ["accuracy"]
    assert "| roc_auc | undefined |" in section(card, "results")


def test_strange_labels_and_names_stay_in_their_place(facts: CardFacts) -> None:
    names = ("a|b", "<!-- hf_finetune:end labels -->", "x\ny `$z$ **w**")
    labels = dataclasses.replace(facts.labels, names=names)
    counts = {role: dict.fromkeys(names, 3) for role in facts.report.rows}
    strange = dataclasses.replace(
        facts, labels=labels, report=dataclasses.replace(facts.report, class_counts=counts)
    )
    card = model_card(strange)
    assert [part.key for part in read_card(card).parts if isinstance(part, Section)] == list(SECTIONS)
    rows = [line for line in section(card, "labels").split("\n") if line.startswith("| ")][2:]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [rows[0].replace(r"\|", "").count("|")] * 3


def test_emissions_and_languages_are_said_when_known(facts: CardFacts) -> None:
    run = {**facts.run, "emissions": {"energy_kwh": 0.5, "co2_grams": 27.0, "country": "France"}}
    card = ModelCard(model_card(dataclasses.replace(facts, run=run)))
    assert card.data.to_dict()["co2_eq_emissions"] == {
        "emissions": 27.0,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "geographical_location": "France",
        "hardware_used": facts.run["hardware"]["cpu"],
    }
    assert "0.5 kWh, about 27 g of CO2-eq with the electricity of France" in card.text


LANGUAGES = {
    "none": ((), (), None),
    "of the data": (("de",), ("en",), ["de"]),
    "of the base": ((), ("en",), ["en"]),
    "not of a base of many": ((), ("en", "de", "fr"), None),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages(name: str, facts: CardFacts) -> None:
    data, base, expected = LANGUAGES[name]
    told = dataclasses.replace(
        facts,
        recipe=facts.recipe.model_copy(update={"task": "text-classification"}),
        measured=dataclasses.replace(facts.measured, languages=data),
        base=dataclasses.replace(facts.base, languages=base),
    )
    assert card_data(told).to_dict().get("language") == expected
    assert "language" not in card_data(dataclasses.replace(told, recipe=facts.recipe)).to_dict(), "of images"


MEASURED = {
    "a split": (Measured("set", "val", 10), "all of split `val`", {}),
    "a sample": (Measured("set", "val", 10, drawn_from=90, seed=3), "drawn with seed 3 from 90 in split `val`", {"max_samples": 10, "seed": 3}),
    "held out": (Measured("set", "train", 10, held_out=0.2, seed=3), "0.2 of split `train`, drawn with seed 3", {"held_out": 0.2, "seed": 3}),
    "a slice": (Measured("set", "train[90%:]", 10), "all of split `train[90%:]`", {}),
    "of the Hub": (
        Measured("me/set", "test", 10, hub_id="me/set", config="de", revision=SHA),
        f"[me/set](https://huggingface.co/datasets/me/set), configuration `de`, revision `{SHA}`",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_which_rows_were_measured(name: str, facts: CardFacts) -> None:
    at, said, arguments = MEASURED[name]
    card = model_card(dataclasses.replace(facts, measured=at))
    assert said in section(card, "results")
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_args or {}) == arguments
    assert (result.dataset_split, result.dataset_revision, result.dataset_config) == (
        at.split,
        at.revision,
        at.config,
    )
    assert result.dataset_type == (at.hub_id or "local")
    assert ModelCard(card).data.datasets == ([at.hub_id] if at.hub_id else None)


def test_a_split_that_was_drawn_says_so(tmp_path: Path) -> None:
    done = runs.run(
        "bert", tmp_path / "run", strategy="frozen", training={"steps": 1}, data={"max_samples": 3}
    )
    result = ModelCard.load(done.model_folder / "README.md").data.eval_results[0]
    assert (result.dataset_split, result.dataset_args) == (
        "train",
        {"held_out": 0.25, "max_samples": 3, "seed": 0},
    )


# ---- base model ----------------------------------------------------------------------------------------------------

BASES: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "no card": (None, {}, {"license": None}),
    "a README without metadata": ("# Hello\n", {}, {"license": None}),
    "broken metadata": ("---\n: [\n---\n", {}, {"license": None}),
    "metadata that is a list": ("---\n- a\n---\n", {}, {"license": None}),
    "a licence": ("---\nlicense: mit\nlanguage: en\n---\n", {}, {"license": "mit", "languages": ("en",), "license_from": "README.md"}),
    "a list of one": ("---\nlicense: [mit]\n---\n", {}, {"license": "mit"}),
    "of several none is chosen": ("---\nlicense: [mit, gpl-3.0]\n---\n", {}, {"license": None}),
    "unknown": ("---\nlicense: unknown\n---\n", {}, {"license": None}),
    "another": (
        "---\nlicense: other\nlicense_name: my-own\nlicense_link: https://x.org/l\n---\n", {},
        {"license": "other", "license_name": "my-own", "license_link": "https://x.org/l"},
    ),
    "another, as a file of the folder": (
        "---\nlicense: other\nlicense_name: my-own\nlicense_link: LICENSE\n---\n", {},
        {"license": "other", "license_name": "my-own", "license_link": None},
    ),
    "of timm's config": (None, {"pretrained_cfg": {"license": "apache-2.0"}}, {"license": "apache-2.0", "license_from": "config.json"}),
    "the card before the config": ("---\nlicense: mit\n---\n", {"pretrained_cfg": {"license": "apache-2.0"}}, {"license": "mit"}),
    "a fine-tuned one": ("---\nbase_model: org/first\n---\n", {}, {"hub_id": None, "ancestor": "org/first", "on_hub": "org/first"}),
    "a merge of two": ("---\nbase_model: [org/a, org/b]\n---\n", {}, {"ancestor": None, "on_hub": None}),
    "Norwegian": ("---\nlanguage: [no, en]\n---\n", {}, {"languages": ("no", "en")}),
}  # fmt: skip
"""What lies in a local folder -> README, config.json, what is known."""


def source(folder: Path | None, **changes: Any) -> dict[str, Any]:
    given = {
        "id": "x",
        "architecture": "resnet10t",
        "folder": str(folder) if folder else None,
        "commit": None,
    }
    return given | changes


@pytest.mark.parametrize("name", BASES)
def test_what_a_local_folder_tells(name: str, tmp_path: Path) -> None:
    readme, config, expected = BASES[name]
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    base = find_base(BackboneSpec(id=str(tmp_path)), source(tmp_path))
    assert {key: getattr(base, key) for key in expected} == expected
    assert base.name == f"./{tmp_path.name}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a repository into an empty cache of the Hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base_model.hub_file.cache_clear()

    def put(repo_id: str, files: dict[str, str], kind: str = "models") -> Path:
        repo = tmp_path / "hub" / f"{kind}--{repo_id.replace('/', '--')}"
        for place in (repo / "refs", repo / "snapshots" / SHA):
            place.mkdir(parents=True, exist_ok=True)
        (repo / "refs/main").write_text(SHA)
        for name, text in files.items():
            (repo / "snapshots" / SHA / name).write_text(text, encoding="utf-8")
        return repo / "snapshots" / SHA

    yield put
    base_model.hub_file.cache_clear()


def test_a_base_of_the_hub(cache: Callable[..., Path]) -> None:
    card = "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\nbase_model: org/first\n---\n"
    cache("org/second", {"README.md": card})
    base = find_base(BackboneSpec(id="org/second"), source(None, id="org/second", commit=SHA))
    assert (base.hub_id, base.commit, base.on_hub) == ("org/second", SHA, "org/second"), (
        "the chain goes by it"
    )
    assert base.license_link == f"https://huggingface.co/org/second/blob/{SHA}/LICENSE"
    unknown = find_base(BackboneSpec(id="org/other"), source(None, id="org/other", commit=SHA))
    assert (unknown.hub_id, unknown.license) == ("org/other", None)


def test_what_is_shipped_is_known_by_its_name_on_the_hub() -> None:
    base = find_base(BackboneSpec(id="shipped/minilm"), source(None))
    assert base.hub_id == base.reference == "sentence-transformers/all-MiniLM-L6-v2"
    tiny = find_base(BackboneSpec(id="shipped/tiny-resnet"), source(None))
    assert (tiny.name, tiny.on_hub, tiny.reference) == ("shipped/tiny-resnet", None, "shipped/tiny-resnet")


RELATIONS: dict[str, tuple[BaseModel, bool, bool, tuple[str | None, str | None]]] = {
    "fine-tuned": (BaseModel("o/b", "a", True, "o/b"), False, False, ("o/b", "finetune")),
    "an adapter": (BaseModel("o/b", "a", True, "o/b"), True, False, ("o/b", "adapter")),
    "a merged adapter": (BaseModel("o/b", "a", True, "o/b"), True, True, ("o/b", "finetune")),
    "of a local folder": (BaseModel("./b", "a", True), False, False, (None, None)),
    "of a fine-tuned local folder": (BaseModel("./b", "a", True, ancestor="o/a"), False, False, ("o/a", "finetune")),
    "an adapter of a fine-tuned local folder": (BaseModel("./b", "a", True, ancestor="o/a"), True, False, (None, None)),
    "from random weights": (BaseModel("o/b", "a", False, "o/b"), False, False, (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIONS)
def test_base_model_and_relation(name: str, facts: CardFacts) -> None:
    base, adapted, merged, expected = RELATIONS[name]
    adapter = {"method": "lora", "layers": 2, "size": 10} if adapted else None
    told = dataclasses.replace(facts, base=base, adapter=adapter, merged=merged)
    data = ModelCard(model_card(told)).data.to_dict()
    assert (data.get("base_model"), data.get("base_model_relation")) == expected


def test_the_chain_of_a_model_fine_tuned_twice(tmp_path: Path, trained: Callable[[str], Run]) -> None:
    first = trained("timm").model_folder
    again = runs.run(
        "resnet", tmp_path / "run", backbone=str(first), strategy="frozen", training={"steps": 1}
    )
    card = again.model_folder / "README.md"
    assert "base_model" not in ModelCard.load(card).data.to_dict()
    assert "`model`, `resnet10t` of timm, from a local folder." in section(
        card.read_text(encoding="utf-8"), "origin"
    )


# ---- .eval_results -------------------------------------------------------------------------------------------------

BENCHMARK = "name: B\ntasks:\n  - {id: sentiment, config: default, split: test}\n  - {id: other, config: de, split: test}\n"
AT = Measured("me/set", "test", 10, hub_id="me/set", revision=None)
ENTRIES: dict[str, tuple[Measured, str | None, list[str]]] = {
    "a task of a benchmark": (AT, BENCHMARK, ["sentiment"]),
    "by configuration": (dataclasses.replace(AT, config="de"), BENCHMARK, ["other"]),
    "no benchmark": (AT, None, []),
    "another split": (dataclasses.replace(AT, split="validation"), BENCHMARK, []),
    "a part of the split": (dataclasses.replace(AT, drawn_from=90), BENCHMARK, []),
    "a slice of it": (dataclasses.replace(AT, split="test[:10]"), BENCHMARK, []),
    "held out": (dataclasses.replace(AT, held_out=0.2), BENCHMARK, []),
    "local data": (dataclasses.replace(AT, hub_id=None), BENCHMARK, []),
    "an eval.yaml that is none": (AT, "tasks: [3]\n", []),
    "broken": (AT, ": [", []),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_eval_results(name: str, facts: CardFacts, cache: Callable[..., Path]) -> None:
    at, declared, tasks = ENTRIES[name]
    cache("me/set", {"eval.yaml": declared} if declared else {}, "datasets")
    files = eval_result_files(dataclasses.replace(facts, measured=at))
    assert list(files) == (["me--set.yaml"] if tasks else [])
    for text in files.values():
        entries = parse_eval_result_entries(yaml.safe_load(text))
        assert [entry.task_id for entry in entries] == tasks
        assert entries[0].dataset_id == "me/set"
        assert entries[0].value == (facts.best or {})["value"]


# ---- tables and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 7])
def test_label_scores_are_those_of_scikit_learn(classes: int) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, classes, 80), rng.integers(0, classes, 80)
    expected = np.array(precision_recall_fscore_support(true, predicted, zero_division=0)[:3]).T
    assert label_scores((true.tolist(), predicted.tolist()), classes) == [
        pytest.approx(tuple(row)) for row in expected
    ]


def test_label_scores_of_several_labels() -> None:
    scores = label_scores(([[0, 1], [1], []], [[0], [1, 2], [2]]), 4)
    assert scores == [(1, 1, 1), (1, 0.5, pytest.approx(2 / 3)), (0, None, 0), (None, None, None)]


def test_confused_pairs() -> None:
    pairs = confused_pairs(([0, 0, 0, 1, 2, 2], [1, 1, 0, 1, 0, 2]))
    assert pairs == [(0, 1, 2, 3), (2, 0, 1, 2)]


@pytest.mark.parametrize("count", [1, 5, 20, 21, 400])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_many_evaluations_become_few_with_the_best_and_the_last(count: int, at: int) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(count):
        place = {"step": 10 * number + 10, "epoch": number + 1.0, "phase": "all", "phase_index": 0}
        rows += [place | {"split": "train", "loss": 1.0, "lr": {}}]
        rows += [place | {"split": "validation", "loss": 1.0, "metrics": {"accuracy": 0.5}}]
    best = rows[2 * (at % count) + 1]
    table = evaluation_table(rows, best)
    steps = [row[1] for row in table.rows]
    assert len(steps) == len(set(steps)) <= 20
    assert {10, best["step"], 10 * count} <= set(steps)
    assert [row[1] for row in table.rows if row[0]] == [best["step"]]
    assert bool(table.note) == (count > 20)


@pytest.mark.parametrize("classes", [2, 23, 120])
def test_the_confusion_picture(classes: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(0)
    names = [
        "Katze 猫 $x$",
        "a\nvery long name that does not fit beside a picture",
        *map(str, range(classes)),
    ]
    answers = (rng.integers(0, classes, 300).tolist(), rng.integers(0, classes, 300).tolist())
    save_confusion(answers, names[:classes], tmp_path / "c.png", "title")
    with Image.open(tmp_path / "c.png") as picture:
        assert 250 < picture.width < 1600
        assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 5, "something is drawn"
    assert not recwarn.list


# ---- code that is copied -------------------------------------------------------------------------------------------


def blocks(card: str) -> list[str]:
    return [part.partition("```")[0] for part in section(card, "usage").split("```python\n")[1:]]


def said(code: str) -> Any:
    """Run code of a card and return what it prints as label -> number."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "card", "exec"), {"__name__": "card"})
    line = out.getvalue().strip().splitlines()[-1]
    if line.startswith(("[", "{")):
        found = eval(line, {})
        first = found[0] if isinstance(found, list) else found
        return first["label"], first["score"]
    label, _, number = line.rpartition(" ")
    return label, float(number)


@pytest.mark.parametrize("name", TRAINED)
def test_the_code_of_a_card_answers_as_predict_does(
    name: str, trained: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trained(name)
    image = TRAINED[name][0] in ("resnet", "vit", "vision-vit")
    photo = next(Path(runs.images()).rglob("validation/*/*.png"))
    Image.open(photo).save(tmp_path / "photo.jpg", quality=100)
    pair = {"text": "The soup was cold.", "other": "It was not warm."}
    given = tmp_path / "pair.jsonl"
    given.write_text(json.dumps(pair), encoding="utf-8")
    asked = str(tmp_path / "photo.jpg") if image else str(given) if "pairs" in name else pair["text"]
    expected = predict_inputs(str(done.path), [asked])[0]
    monkeypatch.chdir(tmp_path)
    card = (done.model_folder / "README.md").read_text(encoding="utf-8")
    found = blocks(card)
    assert len(found) == (2 if name.startswith("timm") and "adapter" not in name else 1)
    for code in found:
        base = f"PATH/TO/{Path(runs.backbone(TRAINED[name][0])).name}"
        code = code.replace(FOLDER, str(done.model_folder)).replace(base, runs.backbone(TRAINED[name][0]))
        label, number = said(code)
        if name == "values":
            assert number == pytest.approx(expected["value"], abs=1e-4)
        else:
            assert (label, number) == (expected["label"], pytest.approx(expected["probability"], abs=1e-2))


@pytest.mark.parametrize("name", ["timm", "transformers text", "timm adapter"])
def test_the_code_of_a_published_card(
    name: str,
    trained: Callable[[str], Run],
    cache: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = trained(name)
    folder = cache("me/it", {})
    for file in done.model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (done.model_folder / "README.md").read_text(encoding="utf-8")
    card = with_repo_id(text, "me/it")
    Image.open(next(Path(runs.images()).rglob("*.png"))).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for local, code in zip(blocks(text), blocks(card), strict=True):
        assert "PATH/TO/THIS" not in code
        base = f"PATH/TO/{Path(runs.backbone(TRAINED[name][0])).name}"
        local, code = (each.replace(base, runs.backbone(TRAINED[name][0])) for each in (local, code))
        assert said(code) == said(local.replace(FOLDER, str(done.model_folder)))


def test_a_repository_id_goes_in_once(trained: Callable[[str], Run]) -> None:
    text = (trained("timm").model_folder / "README.md").read_text(encoding="utf-8")
    card = with_repo_id(text, "me/it")
    assert with_repo_id(card, "me/it") == card
    assert edited_sections(card) == []
    assert ModelCard(card).data.to_dict()["model-index"][0]["name"] == "it"
    assert keep_edits(card, card) == card


# ---- what people write into it ---------------------------------------------------------------------------------------


def made(values: str = "0.5", tags: tuple[str, ...] = ("a", "b"), **metadata: Any) -> str:
    """Return a card of three generated sections."""
    index = [{"name": "it", "results": [{"metrics": values}]}]
    data = {"license": "mit", "tags": list(tags), "model-index": index, **metadata}
    data = {key: value for key, value in data.items() if value is not None}
    texts = {
        "summary": f"# Title\n\nIt has {values}.",
        "results": f"## Results\n\n{values}",
        "usage": "## Use\n\nlike this",
    }
    return str(new_card(data, [Section.new(key, text) for key, text in texts.items()]))


OLD, NEW = made("0.5"), made("0.9")
FOREIGN = "---\nlicense: gpl-3.0\ntags:\n- mine\nmodel-index:\n- name: old\n---\n# My model\n\nAll by hand.\n"
EDITS: dict[str, tuple[str, list[str], list[str]]] = {
    "nothing": (OLD, ["It has 0.9.", "## Results\n\n0.9", "like this"], ["0.5", NOTE]),
    "a section of one's own at the end": (OLD + "\n## Limits\n\nNone known.\n", ["0.9", "## Limits\n\nNone known."], ["0.5", NOTE]),
    "a section of one's own between": (
        OLD.replace("<!-- hf_finetune:begin results", "## Mine\n\nwords\n\n<!-- hf_finetune:begin results"),
        ["0.9.\n<!-- hf_finetune:end summary -->\n\n## Mine\n\nwords\n\n<!-- hf_finetune:begin results"], ["0.5"],
    ),
    "an edited section": (OLD.replace("like this", "like that"), ["like that", NOTE, "0.9"], ["like this", "0.5"]),
    "a section taken out": (
        OLD.replace(str(Section.new("usage", "## Use\n\nlike this")), ""), ["0.9"], ["like this", "begin usage", NOTE],
    ),
    "line ends of Windows": (OLD.replace("\n", "\r\n"), ["0.9"], ["0.5", NOTE]),
    "blanks at line ends": (OLD.replace("It has 0.5.", "It has 0.5.  "), ["It has 0.9."], ["0.5", NOTE]),
    "a mark that was damaged": (
        OLD.replace("<!-- hf_finetune:end usage -->", ""), ["like this", "0.9"], ["0.5"],
    ),
    "a copied section": (
        OLD + str(Section.new("usage", "## Use\n\nlike this")).replace("like this", "copied"), ["like this", "copied", "0.9"], ["0.5"],
    ),
    "another licence": (OLD.replace("license: mit", "license: gpl-3.0"), ["license: gpl-3.0"], ["license: mit"]),
    "no licence": (OLD.replace("license: mit\n", ""), ["0.9"], ["license: mit"]),
    "a key of one's own": (OLD.replace("license: mit", "license: mit\nthumbnail: x.png"), ["license: mit", "thumbnail: x.png"], ["0.5"]),
    "a tag more": (OLD.replace("- b\n", "- b\n- mine\n"), ["- a\n- b\n- mine\n"], ["0.5"]),
    "a tag less": (OLD.replace("- b\n", ""), ["- a\n"], ["- b\n"]),
    "results of one's own in the metadata": (OLD.replace("metrics: '0.5'", "metrics: '1.0'"), ["metrics: '0.9'"], ["1.0"]),
    "somebody else's card": (
        FOREIGN, ["# My model\n\nAll by hand.\n", "license: gpl-3.0", "- mine", "- a", "It has 0.9.", "metrics: '0.9'"],
        ["license: mit", "name: old", NOTE],
    ),
    "the Hub's own first card": ("---\nlicense: gpl-3.0\n---\n", ["license: gpl-3.0", "It has 0.9."], ["license: mit"]),
    "no metadata": ("# Mine\n", ["# Mine\n", "license: mit", "It has 0.9."], []),
    "an empty file": ("", ["license: mit", "It has 0.9."], []),
    "broken metadata": ("---\n: [\n---\nwords\n", ["license: mit", ": [", "words", "It has 0.9."], []),
    "a record that was damaged": (OLD.replace('record {"', 'record {'), ["0.9", "license: mit"], []),
}  # fmt: skip
"""What happened to the card on the Hub -> the card, what must stand in the next one, what must not."""


@pytest.mark.parametrize("name", EDITS)
def test_edits_survive(name: str, tmp_path: Path) -> None:
    old, there, gone = EDITS[name]
    kept = keep_edits(NEW, old)
    plain, record = kept.replace("\r\n", "\n").rsplit("<!-- hf_finetune:record", 1)
    for words in there:
        assert words in plain, words
    for words in gone:
        assert words not in plain, words
    (tmp_path / "README.md").write_text(kept, encoding="utf-8")
    assert isinstance(metadata_load(tmp_path / "README.md"), dict)
    assert keep_edits(NEW, kept) == kept, "a third push changes nothing"
    assert "0.9" in keep_edits(NEW, keep_edits(OLD, old)), "nor is anything lost by one between"
    assert record


def test_a_section_that_is_new_takes_its_place() -> None:
    old = read_card(OLD)
    parts = [part for part in old.parts if not (isinstance(part, Section) and part.key == "results")]
    never = dataclasses.replace(old, parts=parts, sections=["summary", "usage"])
    keys = [part.key for part in read_card(keep_edits(NEW, str(never))).parts if isinstance(part, Section)]
    assert keys == ["summary", "results", "usage"]


def test_edited_sections_are_named() -> None:
    assert edited_sections(keep_edits(NEW, OLD.replace("like this", "like that"))) == ["usage"]


def test_metadata_that_is_no_longer_known_goes() -> None:
    kept = keep_edits(made("0.9", license=None), OLD)
    assert "license" not in (read_card(kept).metadata)


# ---- emissions -----------------------------------------------------------------------------------------------------


class Tracker:
    """Stands in for codecarbon's."""

    given: dict[str, Any] = {}
    fails = ""
    country: str | None = "France"

    def __init__(self, **given: Any) -> None:
        self.fail("init")
        Tracker.given = given

    def fail(self, where: str) -> None:
        if Tracker.fails == where:
            raise RuntimeError("no power meter")

    def start(self) -> None:
        self.fail("start")

    def stop(self) -> float | None:
        self.fail("stop")
        return None if Tracker.fails == "none" else 0.002

    @property
    def final_emissions_data(self) -> Any:
        return types.SimpleNamespace(energy_consumed=0.03, country_name=Tracker.country)


@pytest.fixture
def codecarbon(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("codecarbon")
    module.OfflineEmissionsTracker = Tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(Tracker, "fails", "")
    monkeypatch.setattr(Tracker, "country", "France")


@pytest.mark.usefixtures("codecarbon")
def test_emissions_of_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = runs.run("resnet", tmp_path / "run", strategy="frozen", training={"steps": 1})
    assert done.status["emissions"] == {"energy_kwh": 0.03, "co2_grams": 2.0, "country": "France"}
    assert Tracker.given["save_to_file"] is False
    card = ModelCard.load(done.model_folder / "README.md")
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == 2.0
    assert capfd.readouterr().out + capfd.readouterr().err == ""
    resumed = emissions.added(load_run(done.path).status["emissions"], emissions.start_metering()())
    assert resumed == {"energy_kwh": 0.06, "co2_grams": 4.0, "country": "France"}


@pytest.mark.usefixtures("codecarbon")
@pytest.mark.parametrize("fails", ["init", "start", "stop", "none"])
def test_a_meter_that_fails_is_none(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "fails", fails)
    assert emissions.start_metering()() is None


def test_without_codecarbon_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    assert emissions.start_metering()() is None
    assert emissions.added({"energy_kwh": 1, "co2_grams": 1}, None) is None
