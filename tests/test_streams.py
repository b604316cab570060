"""Streams: every row once a pass, one order for any workers and processes, resumed exactly, never held whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Value

import runs
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.stream_splits import load_streams
from hf_finetune.data.streams import LANES, Stream
from hf_finetune.errors import FinetuneError, Interrupted
from hf_finetune.train import finetune

ROWS, SHARDS = 26, 3
"""Rows of a shard, and shards."""


def shards(folder: Path, kind: str = "csv", rows: int = ROWS, count: int = SHARDS) -> list[str]:
    """Write shards of texts that say their shard and row."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(count):
        table = {
            "text": [f"film {shard} {row} {'very ' * (row % 4)}good" for row in range(rows)],
            "label": [("neg", "pos")[row % 2] for row in range(rows)],
        }
        path = folder / f"part-{shard}.{kind}"
        data = Dataset.from_dict(table, features=Features(dict.fromkeys(table, Value("string"))))
        {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[kind](path)  # type: ignore[operator]
        paths.append(str(path))
    return paths


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    datasets.disable_progress_bars()


def spec(path: Any, **changes: Any) -> DataSpec:
    known = {"streaming": True, "shuffle_buffer": 20, "rows": ROWS * SHARDS, "validation": 0.1}
    return DataSpec(path=path, **(known | changes))


def stream(data: DataSpec, seed: int = 0, samples: int | None = None) -> Stream:
    train = load_streams(data, seed=seed, samples=samples).train
    assert isinstance(train, Stream)
    return train


def numbers(train: Stream, steps: int, step: int = 0, size: int = 8) -> list[list[int]]:
    batches = train.batches(size, step)
    return [[row["row"] for row in next(batches)[1]] for _ in range(steps)]


SOURCES = {
    "csv": lambda folder: {"path": shards(folder)},
    "jsonl": lambda folder: {"path": shards(folder, "jsonl")},
    "parquet": lambda folder: {"path": shards(folder, "parquet"), "rows": None},
    "one csv": lambda folder: {"path": shards(folder, rows=ROWS * SHARDS, count=1)},
    "more shards than lanes": lambda folder: {"path": shards(folder, rows=6, count=LANES + 5)},
    "images": lambda folder: {"path": runs.images(78, 7), "rows": None, "validation": "auto"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_pass_has_every_row_once_in_an_order_of_its_own(name: str, tmp_path: Path) -> None:
    data = spec(**SOURCES[name](tmp_path))
    splits = load_streams(data, seed=3)
    train = splits.train
    assert isinstance(train, Stream)
    held = [] if name == "images" else splits.validation.with_format(None)["row"]
    per_pass = -(-len(train) // 8)
    passes: list[list[int]] = []
    batches = train.batches(8)
    for number in range(2):
        found = [next(batches) for _ in range(per_pass)]
        assert {each for each, _ in found} == {number}
        passes.append([row["row"] for _, rows in found for row in rows])
    assert len(passes[0]) == len(set(passes[0])) == len(train), "every row once"
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    assert not set(held) & set(passes[0]), "what validation holds is not learned"
    assert len(train) + len(held) == 78

    again = stream(data, seed=3)
    assert [row for batch in numbers(again, per_pass) for row in batch] == passes[0]
    assert [row for batch in numbers(stream(data, seed=4), per_pass) for row in batch] != passes[0]


@pytest.mark.parametrize("name", SOURCES)
def test_a_stream_goes_on_from_a_mark(name: str, tmp_path: Path) -> None:
    data = spec(**SOURCES[name](tmp_path))
    whole = stream(data)
    wanted = numbers(whole, 27)
    for step in (1, 5, 9, 10, 14, 26):
        fresh = stream(data)
        fresh.resume(json.loads(json.dumps(whole.mark_at(step))))
        before = fresh.read
        assert numbers(fresh, 27 - step, step) == wanted[step:], step
        assert fresh.read - before <= (27 - step) * 8 + 2 * 24 + ROWS, "what was passed is not read anew"


def test_little_more_is_read_than_is_used(tmp_path: Path) -> None:
    data = spec(shards(tmp_path, rows=3000, count=4), rows=12_000, shuffle_buffer=100, validation=0.001)
    train = stream(data)
    before = train.read
    numbers(train, 10)
    assert train.read - before <= 10 * 8 + 104
    numbers(train, 111)
    mark = train.mark_at(110)
    late = stream(data)
    late.resume(mark)
    before = late.read
    numbers(late, 1, 110)
    assert late.read - before <= 104


def texts(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "path": shards(folder),
        "streaming": True,
        "shuffle_buffer": 20,
        "rows": ROWS * SHARDS,
        "validation": 0.1,
        **changes,
    }


IMAGES = {"path": runs.images(26, 7), "streaming": True, "shuffle_buffer": 16}
CASES = {
    "texts": ("bert", {"strategy": "frozen", "augment": ["word_dropout"]}, texts),
    "images": (
        "resnet",
        {"strategy": "frozen", "augment": ["random_resized_crop", "mixup"]},
        lambda folder: IMAGES,
    ),
    "images, augmented on the device": (
        "resnet",
        {"strategy": "frozen", "augment": ["random_resized_crop", "rand_augment", "mixup"]},
        lambda folder: IMAGES | {"augment_on": "accelerator"},
    ),
}


def losses(run: Any) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run.rows if "loss" in row and row.get("kind") != "features"]


@pytest.mark.parametrize("case", CASES)
def test_workers_and_an_interruption_change_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, section = CASES[case]
    data, training = section(tmp_path / "data"), {"steps": 13, "checkpoint": {"every": "3 steps"}}

    def start(folder: str, workers: int = 0) -> Any:
        return runs.recipe(
            name, tmp_path / folder, data=data | {"workers": workers}, training=training, **changes
        )

    whole = finetune(start("whole"), quiet=True)
    asked = iter([None] * 6 + ["stopped"] * 9)
    with monkeypatch.context() as patched:
        patched.setattr("hf_finetune.train.asked_to_stop", lambda *_: next(asked))
        with pytest.raises(Interrupted):
            finetune(start("cut", workers=2), quiet=True)
    resumed = finetune(start("cut", workers=2), quiet=True, resume=True)
    assert len(losses(whole)) >= 13
    assert losses(resumed) == losses(whole)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no length": ({"rows": None}, ["no epochs", "`training.steps`", "`data.rows`"]),
    "no split": ({"validation": "dev"}, ["there is no split or file 'dev'", "Splits there are: train"]),
    "one class": ({"classes": None, "columns": {"label": "one"}}, ["only 'a'", "data.classes"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_is_said(case: str, tmp_path: Path) -> None:
    changes, said = REFUSED[case]
    rows = [(f"film {n}", "ab"[n % 2], "a") for n in range(20)]
    path = runs.table(tmp_path, rows, header=("text", "label", "one"))
    with pytest.raises(FinetuneError) as caught:
        load_streams(spec(path, **changes), seed=0)
    assert all(each in str(caught.value) for each in said), caught.value


def test_validation_is_not_set_aside_from_an_unknown_number(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"0.1 of train cannot be set aside.*`data.rows`"):
        load_streams(spec(shards(tmp_path), rows=None), seed=0, samples=80)


def test_an_empty_stream_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(FinetuneError, match=r"x\.jsonl"):
        load_streams(spec(str(tmp_path / "x.jsonl")), seed=0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_row_is_named_or_skipped(skip: bool, tmp_path: Path) -> None:
    rows = [(f"film {n}", "ab"[n % 2]) for n in range(40)]
    rows[25], rows[31] = ("", "a"), ("a film", "c")
    data = spec(
        runs.table(tmp_path, rows),
        rows=40,
        classes=["b", "a"],
        on_error="skip" if skip else "stop",
    )
    splits = load_streams(data, seed=0)
    assert splits.labels.names == ("b", "a")
    train = splits.train
    assert isinstance(train, Stream)
    if skip:
        found = [row for batch in numbers(train, 5) for row in batch]
        assert len(set(found)) == 40 - 4 - 2
        assert splits.report.skipped == {"train": 2}
        return
    with pytest.raises(FinetuneError, match=r"row 25 of 'rows.csv' .*no text.*data.on_error: skip"):
        numbers(train, 5)


def test_a_broken_shard_names_the_place(tmp_path: Path) -> None:
    paths = shards(tmp_path, "jsonl")
    data = spec(paths)
    train = stream(data)
    Path(paths[1]).write_text('{"text": "a", "label": "pos"}\n{"text": \n')
    with pytest.raises(FinetuneError, match=r"the stream broke off at row \d+ of 'part-1.jsonl'"):
        numbers(train, 12)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_shard_without_rows_is_passed_over(kind: str, tmp_path: Path) -> None:
    paths = [*shards(tmp_path / "a", kind, rows=0, count=1), *shards(tmp_path / "b", kind, count=2)]
    data = spec(paths, rows=None if kind == "parquet" else 2 * ROWS)
    train = stream(data)
    found = [row for batch in numbers(train, 6) for row in batch]
    assert len(found) == len(set(found)) == len(train) == 2 * ROWS - 5


@pytest.mark.parametrize("count", [2, LANES + 1])
@pytest.mark.parametrize("left", [0, 300])
def test_a_broken_parquet_file_is_named(count: int, left: int, tmp_path: Path) -> None:
    paths = shards(tmp_path, "parquet", count=count)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:left])
    with pytest.raises(FinetuneError, match=r"part-1\.parquet"):
        load_streams(spec(paths, rows=None), seed=0)


def test_parts_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = {"text": [f"film {row}" for row in range(40)], "label": ["neg", "pos"] * 20}
    Dataset.from_dict(table).to_parquet(path, batch_size=20)
    splits = load_streams(spec(str(path), rows=None), seed=0)
    _, rows = next(splits.train.batches(36))  # type: ignore[union-attr]
    assert "row 19 of row group 1 of 'x.parquet'" in {row["name"] for row in rows}
    assert " 36 rows from 1 file," in splits.report.notes[-1]


def test_more_rows_than_there_are_cannot_be_set_aside(tmp_path: Path) -> None:
    with pytest.raises(
        FinetuneError,
        match=r"78 rows that can be used.* 0\.1 of the 5,000 that data\.rows.*Correct data\.rows",
    ):
        load_streams(spec(shards(tmp_path), rows=5_000), seed=0)


def test_other_files_are_not_the_same_data(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    prints = [load_streams(spec(paths), seed=0).report.fingerprint for _ in range(2)]
    text = Path(paths[2]).read_text()
    Path(paths[2]).write_text(text.replace("film 2 25", "filn 2 25"))
    prints.append(load_streams(spec(paths), seed=0).report.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_regression_pairs_and_several_labels(tmp_path: Path) -> None:
    rows = [(f"film {n}", f"book {n}", n / 7, "red|round" if n % 3 else "red") for n in range(30)]
    path = runs.table(tmp_path, rows, header=("one", "two", "value", "tags"))
    columns = {"text": ["one", "two"], "label": "value"}
    splits = load_streams(spec(path, rows=30, columns=columns, labels="regression"), seed=0)
    _, (row, *_) = next(splits.train.batches(4))  # type: ignore[union-attr]
    assert row["text_pair"].removeprefix("book ") == row["text"].removeprefix("film ")
    assert row["label"] == pytest.approx(int(row["text"].removeprefix("film ")) / 7)
    columns |= {"label": "tags"}
    splits = load_streams(spec(path, rows=30, columns=columns, labels="multi"), seed=0)
    assert splits.labels.names == ("red", "round")
    _, (row, *_) = next(splits.train.batches(4))  # type: ignore[union-attr]
    assert row["label"][0] == 1.0
