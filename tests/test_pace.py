"""Time waited for data: what counts, and when it is worth a remark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runs
from hf_finetune import pace
from hf_finetune.errors import Interrupted
from hf_finetune.runfolder import load_run
from hf_finetune.setup import less_waiting, prepare


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def loading(self, *seconds: float) -> Iterator[float]:
        for each in seconds:
            self.now += each
            yield each


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_only_steps_and_evaluations_count(clock: Clock) -> None:
    mine = pace.Pace()
    assert mine.facts()["data_wait_share"] == 0
    batches = clock.loading(2, 1)
    for _ in range(2):
        mine.next_of(batches)
        clock.now += 7
        mine.stepped(34)
        clock.now += 1000  # saving, or computing features
    assert mine.samples_per_second() == 68 / 17
    for _ in mine.evaluating(clock.loading(1, 1, 1)):
        clock.now += 2
    seconds = {"training": 17, "training_waited": 3, "evaluating": 9, "evaluating_waited": 3}
    assert mine.facts() == {"seconds": seconds, "data_wait_share": pytest.approx(3 / 17, abs=1e-4)}
    assert mine.facts(seconds)["seconds"] == {name: 2 * each for name, each in seconds.items()}


@pytest.mark.parametrize(
    ("loading", "working", "remark"), [(1, 9, False), (30, 100, True), (30, 200, False), (3, 1, False)]
)
def test_what_helps_is_told_where_it_is_worth_it(
    loading: float, working: float, remark: bool, clock: Clock
) -> None:
    mine = pace.Pace()
    mine.next_of(clock.loading(loading))
    clock.now += working
    mine.stepped(1)
    said = mine.told(["more workers", "fewer pixels"])
    assert said.startswith(f"{loading / (loading + working):.1%} of the training time")
    assert said.endswith("; more workers; fewer pixels") is remark


def test_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_finetune.setup.cores_per_process", lambda world_size: 4)

    def helps(family: str, **data: Any) -> str:
        recipe = runs.recipe(family, tmp_path / "run", strategy="full", data=data)
        return " ".join(less_waiting(prepare(recipe, world_size=1, device=torch.device("cpu"))))

    assert "data.cache: decoded" in helps("vit")
    assert "data.workers: 3" in helps("vit")
    assert helps("vit", cache="decoded", workers=4) == ""
    assert helps("bert") == ""


def test_a_run_that_goes_on_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.recipe("vit", tmp_path / "run", strategy="full", training={"max_hours": 1e-9})
    with pytest.raises(Interrupted):
        runs.finetune(recipe)
    first = load_run(tmp_path / "run").status["seconds"]["training"]
    run = runs.finetune(runs.recipe("vit", tmp_path / "run", strategy="full"), resume=True)
    assert run.status["seconds"]["training"] > first > 0
    assert 0 < run.status["data_wait_share"] < 1
    assert capsys.readouterr().out.count("of the training time was spent waiting for data") == 2
