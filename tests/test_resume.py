"""Exact resume: killed runs end as if nothing had happened; damaged state is told; what must agree does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import runs
from hf_finetune.checkpoint import (
    find_checkpoint,
    model_tensors,
    pack_optimizer,
    random_state,
    restore_model,
    restore_random_state,
    save_checkpoint,
    unpack_optimizer,
)
from hf_finetune.cli import main
from hf_finetune.errors import FinetuneError, Interrupted, UserError
from hf_finetune.evaluation import Evaluation
from hf_finetune.optim import OptimizerSpec, ParamGroup, build_optimizer
from hf_finetune.recipe import dump_recipe, load_recipe
from hf_finetune.runfolder import Run, load_run
from hf_finetune.train import finetune
from nursery import ENVIRONMENT, Process, ranks

KILLS = int(os.environ.get("HF_FINETUNE_KILLS", "0"))
"""How many processes the long form kills."""


@dataclass(frozen=True)
class Row:
    """One kind of run that is killed again and again."""

    backbone: str
    changes: dict[str, Any]
    kills: int
    processes: int = 1
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


RANDOM_VIEWS = ["random_resized_crop", "horizontal_flip", "rand_augment"]
MATRIX = {
    "frozen, bf16": Row("bert", {"strategy": "frozen", "augment": ["word_dropout"]}, 4, training={"precision": "bf16"}),
    "gradual by plateau, 2 workers": Row("resnet", {
        "strategy": {"name": "gradual", "every": "plateau", "patience": 1}, "augment": RANDOM_VIEWS,
        "monitor": {"evaluate": "3 steps", "metric": "accuracy", "early_stopping": {"patience": 12}},
        "schedule": {"name": "reduce_on_plateau", "patience": 2, "warmup": None},
    }, 6, data={"workers": 2}),
    "full, mixup, EMA, dropout, bf16": Row("vit", {
        "strategy": "full", "augment": [*RANDOM_VIEWS, "mixup"], "optimizer": {"name": "lamb", "lr": 1e-2},
    }, 6, training={"precision": "bf16", "ema": {"decay": 0.9}, "micro_batch_size": 4}, data={"workers": 2}),
    "lora": Row("bert", {"strategy": "lora"}, 2),
    "full, dropout, 2 processes": Row("bert", {"strategy": "full"}, 2, processes=2, training={"ema": {"decay": 0.9}}),
    "gradual by plateau, BatchNorm, 2 processes": Row("resnet", {
        "strategy": {"name": "gradual", "every": "plateau", "patience": 1}, "augment": RANDOM_VIEWS,
        "monitor": {"evaluate": "3 steps", "metric": "accuracy"},
    }, 2, processes=2),
}  # fmt: skip
MOMENTS = ("swap", "artefact", "step", "checkpoint", "step", "start")
"""When a process is killed, in turn: amid each kind of write, at a random moment of the loop and of the start-up.

A fresh run's first evaluation is its best so far, so the writes of a best model come first: later ones may be none."""


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- real processes, killed ----------------------------------------------------------------------------------------


VICTIM = Path(__file__).with_name("victim.py")


class Group:
    """The processes of one start of a run, each with its loaders' workers in a group of its own."""

    def __init__(self, arguments: list[str], processes: int, log: Path, **env: str) -> None:
        self.log = log
        self.members = [Process(VICTIM, *arguments, log=log, env=env | rank) for rank in ranks(processes)]

    @property
    def over(self) -> bool:
        return any(member.poll() is not None for member in self.members)

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def end(self, timeout: float = 240) -> list[int]:
        try:
            return [member.wait(timeout) for member in self.members]
        finally:
            self.kill()

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait for `condition`; return False when a process ended first."""
        limit = time.monotonic() + timeout
        while not condition():
            if self.over:
                return False
            assert time.monotonic() < limit, f"nothing happened: {self.log.read_text()}"
            time.sleep(0.01)
        return True


def written_recipe(row: Row, folder: Path, steps: int) -> Path:
    training = {"steps": steps, "checkpoint": {"every": "3 steps"}} | row.training
    changes = {"monitor": {"evaluate": "4 steps", "metric": "loss"}} | row.changes
    folder.mkdir(parents=True, exist_ok=True)
    recipe = runs.recipe(row.backbone, training=training, data=row.data, **changes)
    (folder / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder / "r.yaml"


def kill_again_and_again(row: Row, folder: Path, kills: int, seed: int) -> tuple[Path, Path, int]:
    """Run twice, once undisturbed; return both run folders and how often the other was killed."""
    rng = random.Random(seed)
    recipe = written_recipe(row, folder, steps=14 + 7 * kills)
    whole, torn, marker, log = folder / "whole", folder / "torn", folder / "marker", folder / "log"
    undisturbed = Group(
        ["train", str(recipe), "--output", str(whole), "-q"], row.processes, folder / "whole.log"
    )
    again = ["train", str(recipe), "--output", str(torn), "--resume", "-q"]
    killed = 0
    try:
        while killed < kills:
            moment = MOMENTS[(killed + (kills == 2) * 2) % len(MOMENTS)]
            marker.unlink(missing_ok=True)
            hang = {} if moment in ("step", "start") else {"HANG": moment}
            group = Group(again, row.processes, log, PACE="0.05", MARKER=str(marker), **hang)
            try:
                rows = torn / "metrics.jsonl"
                stamp = rows.stat().st_mtime_ns if rows.exists() else 0

                def trains(rows: Path = rows, stamp: int = stamp) -> bool:
                    return rows.exists() and rows.stat().st_mtime_ns > stamp and rows.stat().st_size > 0

                if moment == "start":  # on a fast machine the start-up is over earlier
                    limit = time.monotonic() + rng.uniform(0, 1.5)
                    group.until(lambda limit=limit, trains=trains: trains() or time.monotonic() > limit)
                elif moment == "step":
                    group.until(trains)
                    time.sleep(rng.uniform(0, 0.4))
                elif killed < len(MOMENTS):
                    group.until(marker.exists)
                else:  # a run that is good already may write no better model
                    group.until(lambda trains=trains: trains() or marker.exists())
                    limit = time.monotonic() + 0.3
                    group.until(lambda limit=limit: marker.exists() or time.monotonic() > limit)
                alive = not group.over
            finally:
                group.kill()
            if not alive:
                break  # it came to its end, or failed: the comparison will tell
            killed += 1
        assert Group(again, row.processes, log, MARKER=str(marker)).end() == [0] * row.processes, (
            log.read_text()
        )
        assert undisturbed.end() == [0] * row.processes, (folder / "whole.log").read_text()
    finally:
        undisturbed.kill()
    return whole, torn, killed


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in run.rows]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(one: Path, other: Path) -> None:
    """Assert that two finished runs are bit by bit the same: weights, state, numbers."""
    a, b = load_run(one), load_run(other)
    assert rows_of(a) == rows_of(b)
    assert a.best == b.best
    assert (a.status["status"], a.status["why"]) == (b.status["status"], b.status["why"])
    assert a.status["status"] == "done"
    assert runs.same(tensors_of(a.model_folder), tensors_of(b.model_folder))
    newest = [sorted((run.path / "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    assert newest[0].name == newest[1].name
    assert runs.same(*map(tensors_of, newest))
    states = [json.loads((path / "state.json").read_text()) for path in newest]
    assert states[0] == states[1]
    assert not [path for path in b.path.rglob(".*") if path.is_dir()]


def start_all(folder: Path, kills: Callable[[Row], int], seed: int) -> Iterator[dict[str, Future]]:
    # First what several threads may not make at once.
    [written_recipe(row, folder / "x", 100) for row in MATRIX.values()]
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(kill_again_and_again, row, folder / str(number), kills(row), seed + number)
            for number, (name, row) in enumerate(MATRIX.items())
        }


@pytest.fixture(scope="module")
def torn_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    yield from start_all(tmp_path_factory.mktemp("killed"), lambda row: row.kills, seed=0)


def test_the_matrix_kills_at_least_20_times() -> None:
    assert sum(row.kills for row in MATRIX.values()) >= 20


@pytest.mark.parametrize("name", MATRIX)
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(
    name: str, torn_runs: dict[str, Future]
) -> None:
    whole, torn, killed = torn_runs[name].result()
    assert killed == MATRIX[name].kills
    assert_same(whole, torn)
    if "gradual" in name:
        assert len({row["phase_index"] for row in load_run(torn).rows}) > 2


@pytest.fixture(scope="module")
def long_torn_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    each = -(-KILLS // len(MATRIX))
    yield from start_all(tmp_path_factory.mktemp("killed-long"), lambda row: each, seed=1000)


@pytest.mark.slow
@pytest.mark.skipif(
    not KILLS, reason="takes half an hour: HF_FINETUNE_KILLS=200 pytest -m slow tests/test_resume.py"
)
@pytest.mark.parametrize("name", MATRIX)
def test_the_long_form(name: str, long_torn_runs: dict[str, Future]) -> None:
    whole, torn, killed = long_torn_runs[name].result()
    assert killed == -(-KILLS // len(MATRIX))
    assert_same(whole, torn)


# ---- stopped in good order -------------------------------------------------------------------------------------------


def started(folder: Path, row: Row, **env: str) -> tuple[Group, Path]:
    """Start, or resume, a run in `folder`/torn; return its processes and the file they mark."""
    recipe = folder / "r.yaml" if (folder / "r.yaml").exists() else written_recipe(row, folder, 16)
    marker = folder / "marker"
    marker.unlink(missing_ok=True)
    again = ["train", str(recipe), "--output", str(folder / "torn"), "--resume", "-q"]
    return Group(again, row.processes, folder / "log", MARKER=str(marker), **env), marker


def has_rows(group: Group, run: Path) -> None:
    rows = run / "metrics.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else 0
    assert group.until(lambda: rows.exists() and rows.stat().st_mtime_ns > before), group.log.read_text()


def whole_run(folder: Path, row: Row) -> Path:
    recipe = load_recipe(str(folder / "r.yaml"))
    finetune(recipe.model_copy(update={"output": str(folder / "whole")}), quiet=True)
    return folder / "whole"


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_signal_saves_and_leaves_within_a_step(tmp_path: Path) -> None:
    """A cluster signals a process and its workers alike; the second time amid an evaluation."""
    row = Row("resnet", {"strategy": "full", "augment": RANDOM_VIEWS}, 0, data={"workers": 2})
    torn = tmp_path / "torn"
    group, _ = started(tmp_path, row, PACE="0.1")
    try:
        has_rows(group, torn)
        os.killpg(group.members[0].pid, signal.SIGTERM)
        at = len(load_run(torn).rows)
        assert group.end(30) == [130], group.log.read_text()
        assert load_run(torn).status["status"] == "interrupted"
        assert load_run(torn).status["why"] == "stopped by SIGTERM"
        assert len(load_run(torn).rows) <= at + 3  # a step, and an evaluation if it was due
        assert "Traceback" not in group.log.read_text()

        group, marker = started(tmp_path, row, HANG="evaluation")
        assert group.until(marker.exists)
        before = len(load_run(torn).rows)
        os.killpg(group.members[0].pid, signal.SIGINT)
        assert group.end(30) == [130], group.log.read_text()
        assert len(load_run(torn).rows) == before  # the evaluation is left for later
        assert load_run(torn).status["why"] == "stopped by SIGINT"
        assert f"--output {torn} --resume` continues" in group.log.read_text()
        group, _ = started(tmp_path, row)
        assert group.end() == [0], group.log.read_text()
    finally:
        group.kill()
    assert_same(whole_run(tmp_path, row), torn)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    row = Row("vit", {"strategy": "frozen"}, 0)
    group, marker = started(tmp_path, row, HANG="checkpoint")
    try:
        assert group.until(marker.exists)
        os.kill(group.members[0].pid, signal.SIGTERM)
        time.sleep(0.5)
        assert not group.over
        os.kill(group.members[0].pid, signal.SIGTERM)
        assert group.end(10) == [130]
    finally:
        group.kill()


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    row = Row("vit", {"strategy": "full"}, 0, processes=2)
    group, _ = started(tmp_path, row, PACE="0.1")
    try:
        has_rows(group, tmp_path / "torn")
        os.kill(group.members[1].pid, signal.SIGTERM)
        assert group.end(60) == [130, 130], group.log.read_text()
    finally:
        group.kill()
    assert load_run(tmp_path / "torn").status["status"] == "interrupted"
    assert list((tmp_path / "torn" / "checkpoints").glob("step-*"))
    assert "Traceback" not in group.log.read_text()


def test_torchrun_and_its_processes_are_signalled_alike(tmp_path: Path) -> None:
    """torchrun passes its signal on: the copy that arrives is not taken for a second wish."""
    recipe = written_recipe(Row("vit", {"strategy": "full"}, 0), tmp_path, 40)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(VICTIM),
    ]
    rows = tmp_path / "torn" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen([*command, "train", str(recipe), "--output", str(tmp_path / "torn"), "-q"],
                                 stdout=log, stderr=log, env=os.environ | ENVIRONMENT | {"PACE": "0.1"})  # fmt: skip
    workers = []
    try:
        limit = time.monotonic() + 120
        while not rows.exists():
            assert agent.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        workers = [
            int(child) for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        ]
        for process in (*workers, agent.pid):
            os.kill(process, signal.SIGTERM)
        agent.wait(60)
    finally:
        for process in (*workers, agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        agent.wait()
    assert load_run(tmp_path / "torn").status["status"] == "interrupted", (tmp_path / "log").read_text()


STEP_BY_STEP = {
    "gradual by plateau": ("vit", {
        "strategy": {"name": "gradual", "every": "plateau", "patience": 1}, "augment": [*RANDOM_VIEWS, "mixup"],
        "schedule": {"name": "reduce_on_plateau", "patience": 1, "warmup": None},
    }),
    "lora": ("bert", {"strategy": "lora"}),
    "adalora": ("bert", {"strategy": "adalora"}),
    "pissa": ("vit", {"strategy": "pissa", "augment": RANDOM_VIEWS}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_stopped_after_every_single_step(name: str, tmp_path: Path) -> None:
    """`training.max_hours` is used up after each step: as many starts as steps, and each evaluation after a start."""

    def recipe(name: str, **training: Any) -> Any:
        return runs.recipe(
            backbone, tmp_path / name, monitor={"evaluate": "1 steps", "metric": "accuracy"}, **changes,
            training={"steps": 7, "ema": {"decay": 0.9}, "checkpoint": None} | training,
        )  # fmt: skip

    backbone, changes = STEP_BY_STEP[name]
    finetune(recipe("whole", checkpoint={"every": "100%"}), quiet=True)
    for _ in range(7):
        with pytest.raises(Interrupted, match=r"training.max_hours \(1e-09\) is used up; the state is saved"):
            finetune(recipe("torn", max_hours=1e-9), quiet=True, resume=True)
        assert load_run(tmp_path / "torn").status["status"] == "interrupted"
    finetune(recipe("torn", checkpoint={"every": "100%"}), quiet=True, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_early_stopping_is_not_forgotten_when_killed_before_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last checkpoint and run.json: the run is over, though nobody has said so."""
    monkeypatch.setattr(Evaluation, "value", lambda self, metric: 0.5)
    monitor = {"evaluate": "1 steps", "early_stopping": {"patience": 2}}
    run = runs.run("vit", tmp_path / "run", strategy="full", training={"steps": 8}, monitor=monitor)
    before = rows_of(run)
    assert run.status["why"] == "no better accuracy in 2 evaluations"
    (run.path / "run.json").write_text(json.dumps(run.status | {"status": "running", "why": ""}))
    again = finetune(load_recipe(str(run.recipe_path)), quiet=True, resume=True)
    assert (again.status["status"], again.status["why"]) == ("done", "no better accuracy in 2 evaluations")
    assert rows_of(again) == before


# ---- damaged state -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same run twice: `whole`, and `torn`, stopped at step 5 with checkpoints at 3, 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped")

    def recipe(name: str) -> Any:
        training = {"steps": 8, "ema": {"decay": 0.9}, "checkpoint": {"every": "1 steps", "keep": 3}}
        return runs.recipe(
            "vit",
            folder / name,
            strategy="full",
            training=training,
            monitor={"evaluate": "2 steps", "metric": "loss"},
        )

    with pytest.MonkeyPatch.context() as patch:
        finetune(recipe("whole"), quiet=True)
        steps = iter(range(1, 9))
        patch.setattr(
            "hf_finetune.train.asked_to_stop", lambda *_: "stopped by the test" if next(steps) == 5 else None
        )
        with pytest.raises(Interrupted):
            finetune(recipe("torn"), quiet=True)
    assert [path.name for path in sorted((folder / "torn/checkpoints").iterdir())] == [
        f"step-0000000{n}" for n in (3, 4, 5)
    ]
    return folder


@pytest.fixture
def torn(stopped: Path, tmp_path: Path) -> Path:
    """Return a copy of the stopped run, free to be damaged."""
    shutil.copytree(stopped / "torn", tmp_path / "torn")
    return tmp_path / "torn"


def resume(run: Path, *changes: str, **options: Any) -> Run:
    recipe = load_recipe(str(run / "recipe.yaml"), [f"output={run}", *changes])
    return finetune(recipe, resume=True, **options)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "deleted": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(file: str, damage: str, torn: Path) -> None:
    DAMAGES[damage](torn / "checkpoints/step-00000005" / file)
    found, rejected = find_checkpoint(torn / "checkpoints")
    assert found is not None
    assert found.path.name == "step-00000004"
    (reason,) = rejected
    assert reason.startswith(f"step-00000005: {file}") or (
        file == "manifest.json" and reason.startswith("step-00000005: ")
    )


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


HALVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "model flipped": (
        lambda folder: flip(folder / "model.safetensors"),
        "model.safetensors is damaged (its hash differs)",
    ),
    "manifest deleted": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty folder": (empty, "manifest.json is missing"),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.touch()),
        "manifest.json cannot be read (NotADirectoryError)",
    ),
}


@pytest.mark.parametrize("case", HALVES)
def test_resume_falls_back_says_so_and_ends_the_same(
    case: str, torn: Path, stopped: Path, capsys: pytest.CaptureFixture
) -> None:
    damage, reason = HALVES[case]
    damage(torn / "checkpoints/step-00000005")
    half = torn / "checkpoints/.step-00000006"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resume(torn)
    said = capsys.readouterr().out
    assert f"resume: checkpoint rejected: step-00000005: {reason}" in said
    assert f"resume: from step-00000004 in {torn}" in said
    assert_same(stopped / "whole", torn)
    assert sorted(path.name for path in (torn / "checkpoints").iterdir()) == [
        f"step-0000000{n}" for n in (6, 7, 8)
    ]


def test_a_damaged_newest_checkpoint_does_not_crowd_out_good_ones(
    torn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep: 1` with a damaged checkpoint of a later step lying about: the new one stays."""
    shutil.copytree(torn / "checkpoints/step-00000005", torn / "checkpoints/step-00000007")
    flip(torn / "checkpoints/step-00000007/model.safetensors")
    monkeypatch.setattr("hf_finetune.train.asked_to_stop", lambda *_: "stopped by the test")
    with pytest.raises(Interrupted):
        resume(torn, "training.checkpoint.keep=1", quiet=True)
    found, rejected = find_checkpoint(torn / "checkpoints")
    assert (found is not None, rejected) == (True, [])
    assert [path.name for path in (torn / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_same_step_saved_again_replaces_the_first_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    first = save_checkpoint(folder, 3, {"model": {"x": torch.zeros(2)}}, {"n": 1}, keep=1)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FinetuneError, match="the disk is full"):
        save_checkpoint(folder, 3, {"model": {"x": torch.ones(2)}}, {"n": 2}, keep=1)
    monkeypatch.undo()
    assert find_checkpoint(folder)[0].path == first  # type: ignore[union-attr]
    save_checkpoint(folder, 3, {"model": {"x": torch.ones(2)}}, {"n": 2}, keep=1)
    found, rejected = find_checkpoint(folder)
    assert found is not None
    assert (found.state, rejected, len(list(folder.iterdir()))) == ({"n": 2}, [], 1)


def test_no_checkpoint_left_is_an_error_that_names_them(torn: Path, capsys: pytest.CaptureFixture) -> None:
    for folder in (torn / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    rows = (torn / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["train", str(torn), "--resume"])
    error = capsys.readouterr().err
    assert end.value.code == 1
    for number in (3, 4, 5):
        assert f"step-0000000{number}: state.json is missing" in error
    assert str(torn / "model") in error
    assert (torn / "metrics.jsonl").read_bytes() == rows


# name -> what was done to the run folder, exit code, what is said
FOLDERS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "run.json deleted": (
        lambda run: (run / "run.json").unlink(),
        2,
        "holds checkpoints and metrics.jsonl and model of a run, but no run.json",
    ),
    "run.json emptied": (lambda run: (run / "run.json").write_bytes(b""), 2, "run.json: damaged, not JSON"),
    "recipe.yaml deleted": (lambda run: (run / "recipe.yaml").unlink(), 2, "recipe.yaml missing"),
    "recipe.yaml emptied": (lambda run: (run / "recipe.yaml").write_bytes(b""), 2, "recipe.yaml"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_run_folder_is_told(case: str, torn: Path, capsys: pytest.CaptureFixture) -> None:
    damage, code, text = FOLDERS[case]
    recipe = torn.parent / "r.yaml"
    shutil.copy(torn / "recipe.yaml", recipe)
    damage(torn)
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe), "--output", str(torn), "--resume"])
    assert end.value.code == code
    assert text in capsys.readouterr().err


def test_a_run_killed_while_it_claimed_its_folder_starts(torn: Path) -> None:
    run = torn.parent / "claimed"
    run.mkdir()
    (run / "run.json").write_text("")
    recipe = load_recipe(str(torn / "recipe.yaml"), [f"output={run}"])
    assert finetune(recipe, resume=True, quiet=True).status["status"] == "done"


def test_rows_that_were_lost_are_told(torn: Path, capsys: pytest.CaptureFixture) -> None:
    os.truncate(torn / "metrics.jsonl", 10)
    assert resume(torn).status["status"] == "done"
    assert "metrics.jsonl has lost rows from before step 5" in capsys.readouterr().out


# ---- the contract --------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    for key, value in changes.items():
        place = found
        *way, last = key.split("__")
        for part in way:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(found))


# What another recipe, machine or version would be -> what is said.
RECIPES = [
    (["optimizer.lr=0.002"], "optimizer.lr: was 0.01, is 0.002"),
    (["optimizer=sgd", "optimizer.lr=0.01"], "optimizer.name: was adamw, is sgd"),
    (["training.seed=1"], "training.seed: was 0, is 1"),
    (["training.precision=bf16"], "training.precision: was fp32, is bf16"),
    (["training.batch_size=4"], "training.batch_size: was 8, is 4"),
    (["strategy=frozen"], "strategy.name: was full, is frozen"),
    (["training.steps=7"], "training.steps: was 8, is 7"),
    (["training.steps=2"], "training.steps: was 8, is 2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), RECIPES)
def test_another_recipe_is_refused(changes: list[str], text: str, torn: Path) -> None:
    before = {path: path.read_bytes() for path in torn.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        resume(torn, *changes, quiet=True)
    assert text in str(caught.value)
    assert "--allow-changes" in str(caught.value)
    assert before == {path: path.read_bytes() for path in torn.rglob("*") if path.is_file()}


FACTS = [
    ({"data__fingerprint": "0"}, "data fingerprint: was 0, is "),
    ({"backbone__fingerprint": "0"}, "backbone fingerprint: was 0, is "),
    ({"labels": ["a", "b"]}, "labels: was ['a', 'b'], is ['blue', 'green', 'red']"),
    ({"processes": 2}, "processes: was 2, is 1"),
    ({"versions__torch": "1.0"}, f"versions torch: was 1.0, is {torch.__version__.split('+')[0]}"),
    ({"hardware__device": "cuda:0"}, "hardware device: was cuda:0, is cpu"),
]


@pytest.mark.parametrize(("changes", "text"), FACTS)
def test_what_is_not_in_the_recipe_must_agree_too(
    changes: dict[str, Any], text: str, torn: Path, capsys: pytest.CaptureFixture
) -> None:
    edit_json(torn / "run.json", **changes)
    with pytest.raises(UserError) as caught:
        resume(torn, quiet=True)
    assert text in str(caught.value)
    assert resume(torn, allow_changes=True).status["status"] == "done"
    assert f"resume: {text}" in capsys.readouterr().out


FREE = [
    (["data.workers=2"], {}, None),
    (["training.checkpoint.keep=5", "training.max_hours=9"], {}, None),
    ([], {"versions__datasets": "1.0"}, "resume: datasets was 1.0, is "),
    ([], {"hardware__cpu": "abacus"}, "resume: cpu: was abacus, is "),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "facts", "text"), FREE)
def test_what_changes_no_result_is_free(
    changes: list[str],
    facts: dict[str, Any],
    text: str | None,
    torn: Path,
    stopped: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    edit_json(torn / "run.json", **facts)
    resume(torn, *changes)
    assert text is None or text in capsys.readouterr().out
    assert_same(stopped / "whole", torn)


def test_other_data_and_another_backbone_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fingerprints are of: a text edited, a label added, a weight moved, under the same names."""
    shutil.copytree(runs.backbone("bert"), tmp_path / "bert")
    rows = [
        (f"the {('bad', 'good')[n % 2]} film {'very ' * (n % 4)}", ("neg", "pos")[n % 2]) for n in range(16)
    ]
    recipe = runs.recipe(
        "bert", tmp_path / "run", strategy="frozen", backbone=str(tmp_path / "bert"), data={"path": runs.table(tmp_path, rows)},
        training={"steps": 4, "checkpoint": {"every": "1 steps"}},
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("hf_finetune.train.asked_to_stop", lambda *_: "stopped by the test")
        with pytest.raises(Interrupted):
            finetune(recipe, quiet=True)
    for others, text in (
        ([("a good film", "neg"), *rows[1:]], "data fingerprint"),
        ([*rows[:-3], *[("so", "odd")] * 3], "labels: was"),
    ):
        runs.table(tmp_path, others)
        with pytest.raises(UserError, match=text):
            finetune(recipe, quiet=True, resume=True)
    with pytest.raises(UserError, match="the checkpoint is of another model: its "):
        finetune(recipe, quiet=True, resume=True, allow_changes=True)
    runs.table(tmp_path, rows)
    weights = load_file(tmp_path / "bert/model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "bert/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="backbone fingerprint"):
        finetune(recipe, quiet=True, resume=True)


def test_allowed_changes_are_made(torn: Path) -> None:
    run = resume(
        torn, "optimizer.lr=0.002", "optimizer.options={betas: [0.5, 0.9]}", quiet=True, allow_changes=True
    )
    rates = [row["lr"]["head"] for row in runs.train_rows(run)]
    assert rates[4] > 0.002 > rates[5]
    with pytest.raises(
        UserError, match=r"resume: the checkpoint holds the state of AdamW, the recipe asks for Lion"
    ):
        resume(torn, "optimizer=lion", "training.steps=9", quiet=True, allow_changes=True)


def test_a_finished_run_has_nothing_to_do(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped / "whole", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main_returns(["train", str(run), "--resume"])
    assert f"nothing to do: the run in {run} is done" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")  # a run that kept none is as finished
    main_returns(["train", str(run / "recipe.yaml"), "--resume"])
    assert all(
        path.read_bytes() == content for path, content in before.items() if "checkpoints" not in str(path)
    )
    with pytest.raises(FinetuneError, match="no checkpoint can be used"):
        resume(run, "training.steps=12", quiet=True)


def main_returns(arguments: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert not main(arguments)
        return
    raise AssertionError(f"{arguments} failed")


def test_a_finished_run_grows(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped / "whole", run)
    grown = resume(run, "training.steps=12")
    assert "resume: the run grows from 8 to 12 steps" in capsys.readouterr().out
    assert [row["step"] for row in runs.train_rows(grown)] == [*range(1, 13)]
    assert (grown.status["status"], grown.status["total_steps"]) == ("done", 12)
    with pytest.raises(UserError, match=r"training\.steps: was 12, is 8"):
        resume(run, "training.steps=8", quiet=True)


def test_a_run_that_grows_reaches_the_phases_it_had_no_time_for(tmp_path: Path) -> None:
    """A group wakes every epoch of two steps."""
    run = runs.run("vit", tmp_path / "run", strategy="gradual", training={"steps": 4})
    assert [row["phase_index"] for row in runs.train_rows(run)] == [0, 0, 1, 1]
    grown = resume(run.path, "training.steps=7", quiet=True)
    assert [row["phase_index"] for row in runs.train_rows(grown)] == [0, 0, 1, 1, 2, 2, 3]


def test_an_early_stopped_run_is_done_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Evaluation, "value", lambda self, metric: 0.5)
    monitor = {"evaluate": "1 steps", "early_stopping": {"patience": 2}}
    run = runs.run("vit", tmp_path / "run", strategy="full", training={"steps": 8}, monitor=monitor)
    resume(run.path)
    assert "nothing to do" in capsys.readouterr().out
    grown = resume(run.path, "training.steps=9", quiet=True)
    assert [row["step"] for row in runs.train_rows(grown)] == [1, 2, 3, 4, 5]


def test_without_resume_a_folder_with_a_run_is_refused_and_resume_is_offered(torn: Path) -> None:
    with pytest.raises(
        UserError, match=r"already holds a run \(interrupted, started .*Continue it with --resume"
    ):
        finetune(load_recipe(str(torn / "recipe.yaml"), [f"output={torn}"]), quiet=True)


def test_resume_without_a_folder_takes_the_newest_unfinished_run(
    torn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(torn.parent)
    recipe = torn.parent / "mine.yaml"
    shutil.copy(torn / "recipe.yaml", recipe)
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe), "output=", "--resume"])
    assert end.value.code == 2
    assert "runs/ holds no unfinished run of 'mine' on this backbone" in capsys.readouterr().err
    run = torn.parent / "runs/mine-vit-20300101-000000"
    shutil.copytree(torn, run)
    broken = torn.parent / "runs/mine-vit-20300101-000001"
    shutil.copytree(torn, broken)
    edit_json(broken / "run.json", status="done")
    main_returns(["train", str(recipe), "output=", "--resume"])
    assert "resume: from step-00000005 in runs/mine-vit-20300101-000000" in capsys.readouterr().out
    assert load_run(run).status["status"] == "done"


# ---- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "you may not write there"),
    ],
)
@pytest.mark.parametrize("call", ["hf_finetune.checkpoint.save_file", "os.fsync"])
def test_a_disk_that_takes_no_more_keeps_the_last_good_state(
    call: str,
    number: int,
    text: str,
    torn: Path,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise (
            SafetensorError(f"I/O error: no (os error {number})")
            if "save" in call
            else OSError(number, os.strerror(number))
        )

    kept = {path: path.read_bytes() for path in (torn / "checkpoints").rglob("*") if path.is_file()}
    monkeypatch.setattr(call, refuse)
    with pytest.raises(SystemExit) as end:
        main(["train", str(torn), "--resume", "-q"])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ")
    assert text in error
    assert kept == {path: path.read_bytes() for path in (torn / "checkpoints").rglob("*") if path.is_file()}
    monkeypatch.undo()
    resume(torn, quiet=True)
    assert_same(stopped / "whole", torn)


def test_a_model_that_cannot_be_written_is_told(torn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_finetune.hub.artefact.save_backbone", full_disk)
    with pytest.raises(FinetuneError, match=r"cannot write .*the disk is full"):
        resume(torn, quiet=True)
    assert load_run(torn).status["status"] == "failed"
    assert (torn / "model/model.safetensors").is_file()


def test_a_run_folder_that_vanishes_is_told(torn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(9))
    monkeypatch.setattr(
        "hf_finetune.train.asked_to_stop", lambda *_: shutil.rmtree(torn) if next(steps) == 1 else None
    )
    with pytest.raises(FinetuneError, match="the run folder is gone"):
        resume(torn, quiet=True)
    assert not torn.exists()


# ---- optimizers ----------------------------------------------------------------------------------------------------

OPTIMIZERS = (
    "adamw",
    "sgd",
    "lion",
    "lamb",
    "adafactor",
    "muon",
    "nadamw",
    "adan",
    "kron",
    "radam",
    "adopt",
    "madgrad",
)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 8), nn.GELU(), nn.Linear(8, 3)
    )
    return model.to(memory_format=torch.channels_last)


def optimizer_of(name: str, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, list[str]]:
    parameters = dict(model.named_parameters())
    weights, rest = (
        [n for n, p in parameters.items() if p.ndim > 1],
        [n for n, p in parameters.items() if p.ndim <= 1],
    )
    groups = [
        ParamGroup("a", "a", tuple(weights), (1.0,), True, 1),
        ParamGroup("b", "b", tuple(rest), (1.0,), False, 1),
    ]
    return build_optimizer(OptimizerSpec(name=name, lr=1e-2, weight_decay=0.05), groups, parameters), [
        *weights,
        *rest,
    ]


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(4, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(
            model(pixels), torch.randint(0, 3, (4,), generator=generator)
        ).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@torch.compiler.set_stance("force_eager")  # kron would compile its step for most of a minute
def test_an_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = network()
    optimizer, names = optimizer_of(name, model)
    learn(model, optimizer, range(3))
    tensors, plan = pack_optimizer(optimizer, names)
    parts = {"model": model_tensors(model, frozenset(names)), "optimizer": tensors}
    save_checkpoint(tmp_path / "c", 3, parts, {"plan": plan, "random": random_state()}, keep=1)
    learn(model, optimizer, range(3, 6))

    found, _ = find_checkpoint(tmp_path / "c")
    assert found is not None
    other = network()
    again, _ = optimizer_of(name, other)
    restore_model(other, found.tensors("model"))
    unpack_optimizer(again, names, found.tensors("optimizer"), found.state["plan"])
    restore_random_state(found.state["random"])
    learn(other, again, range(3, 6))
    assert runs.same(dict(model.state_dict()), dict(other.state_dict()))
    (one, plan), (two, other_plan) = pack_optimizer(optimizer, names), pack_optimizer(again, names)
    assert runs.same(one, two)
    assert json.dumps(plan) == json.dumps(other_plan)


@pytest.mark.parametrize("place", ["parameter", "optimizer", "group"])
def test_state_that_cannot_be_stored_is_an_error(place: str) -> None:
    model = network()
    optimizer, names = optimizer_of("sgd", model)
    learn(model, optimizer, range(1))
    first = optimizer.param_groups[0]["params"][0]
    {"parameter": optimizer.state[first], "optimizer": optimizer.state, "group": optimizer.param_groups[0]}[
        place
    ]["strange"] = object()  # type: ignore[index]
    with pytest.raises(
        FinetuneError, match=r"optimizer SGD: its state holds .*strange.*, which a checkpoint cannot"
    ):
        pack_optimizer(optimizer, names)
