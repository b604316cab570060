"""What a run leaves behind while it trains: rows, status, the best model, curves. Written by the main process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import nn

from hf_finetune.checkpoint import Checkpoint
from hf_finetune.durable import sync_folder
from hf_finetune.emissions import Emissions, added, start_metering
from hf_finetune.errors import FinetuneError, Interrupted, first_line
from hf_finetune.evaluation import Evaluation
from hf_finetune.freeze import weights_fingerprint
from hf_finetune.hub.artefact import describe, write_artefact
from hf_finetune.hub.fresh import warm_up
from hf_finetune.hub.push import Order, check_rights, push_best, push_finished
from hf_finetune.hub.reload import (
    EXPECTED,
    Samples,
    check_reload,
    left_out,
    modules,
    samples_of,
    write_expected,
)
from hf_finetune.memory import Meter
from hf_finetune.monitor import Best
from hf_finetune.pace import Pace
from hf_finetune.parallel import gathered, holding, write_whole
from hf_finetune.precision import accelerator_in
from hf_finetune.recipe import dump_recipe
from hf_finetune.report.curves import save_curves
from hf_finetune.resume import Resumed, find_run, take_over
from hf_finetune.runfolder import RunFolder, hardware, load_run, read_status, versions, writing
from hf_finetune.runlock import RunLock
from hf_finetune.setup import Setup, less_waiting
from hf_finetune.tasks.metrics import default_metric
from hf_finetune.together import by_main, together

Status = Literal["running", "done", "failed", "interrupted"]


@dataclass
class Record:
    """The run folder of a run in progress, and where the run stands."""

    path: Path
    setup: Setup
    is_main: bool
    started: float
    """time.monotonic() at the start of the run."""
    status: Status = "failed"
    why: str = ""
    finished: bool = False
    """The run to resume is done: nothing is left to do."""
    checkpoint: Checkpoint | None = None
    """Where the run goes on; None starts it."""
    earlier_seconds: float = 0.0
    """What the run had taken when it was interrupted."""
    accelerator: Accelerator | None = None
    """Set once trackers are running."""
    pace: Pace = field(default_factory=Pace)
    """How fast this process goes, and how long it waited for data."""
    say: Callable[[str], None] = lambda text: None
    """Told what the user should know."""
    whole: nn.Module | None = None
    """Of a model whose processes hold shares: where the main one puts it together to write it."""
    locks: list[RunLock] = field(default_factory=list)
    """What keeps other processes from the folder; held by the main process."""
    memory: Meter | None = None
    """Counts from when everything is loaded."""
    _stop_metering: Callable[[], Emissions | None] | None = None
    _drawn: bool = False
    """Whether the curves show all that was logged."""

    @classmethod
    def open(
        cls,
        setup: Setup,
        state: PartialState,
        *,
        name: str,
        started: float,
        resume: bool = False,
        allow_changes: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Record:
        """Claim the run folder, or with `resume` take over the run in it; every process learns what was found.

        Raises:
            HubError: the recipe's `hub` may not be written to.
            UserError: the folder holds another run, or one that `setup` would not continue as it began.
            FinetuneError: none of the run's checkpoints is valid.
        """
        locks: list[RunLock] = []
        if hub := setup.recipe.hub:
            together(lambda: check_rights(Order(hub.repo_id, hub.private), training=True), main_only=True)

        def claim() -> tuple[Path, Resumed | None]:
            folder = find_run(setup, name) if resume else None
            if folder is None:
                folder = RunFolder.create(setup.recipe.output, name, setup.recipe.backbone.id).path
                locks.append(RunLock(folder, say))
                return folder, None
            locks.append(RunLock(folder, say))
            facts = cls(folder, setup, True, started)._facts(state)
            return folder, take_over(folder, setup, facts, allow_changes=allow_changes, say=say)

        try:
            path, taken = together(claim, main_only=True)
        except FinetuneError:
            for lock in locks:
                lock.release()
            raise
        record = cls(path, setup, state.is_main_process, started, locks=locks, say=say)
        if taken is not None:
            record.finished, record.checkpoint, record.earlier_seconds = (
                taken.finished,
                taken.checkpoint,
                taken.seconds,
            )
        if record.finished:
            record._unlock()
            say(f"nothing to do: the run in {path} is done and the recipe asks for no more steps")
            record.push()
        else:
            record._begin(state)
        return record

    @by_main
    def _begin(self, state: PartialState) -> None:
        for lock in self.locks:
            lock.sign()
        self._folder.write_recipe(dump_recipe(self.setup.recipe))
        self._folder.write_status(**self._facts(state), status="running", why="", reload=None)
        if self.checkpoint is None:
            self._folder.write_status(best=None)
        if not left_out(self.setup):
            warm_up(*modules(self.setup))  # its imports take seconds: from here on they pass beside training

    def _unlock(self) -> None:
        for lock in self.locks:
            lock.release()

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics to compute, the monitored one first, `loss` among them if that is monitored."""
        monitor = self.setup.recipe.monitor
        names = [monitor.metric, *monitor.metrics, default_metric(self.setup.splits.labels.kind)]
        return list(dict.fromkeys(names))

    def log_training(
        self, step: int, phase: int, loss: float, rates: dict[str, float], samples_per_second: float
    ) -> None:
        """Append a training row."""
        self._log(
            step,
            phase,
            {"split": "train", "loss": loss, "lr": rates, "samples_per_second": samples_per_second},
        )
        if self.accelerator is not None:
            values = {"train/loss": loss, "train/samples_per_second": samples_per_second}
            self.accelerator.log(values | {f"lr/{name}": rate for name, rate in rates.items()}, step=step)

    def log_evaluation(self, step: int, phase: int, split: str, result: Evaluation) -> None:
        """Append a row of measurements."""
        self._log(step, phase, {"split": split, "loss": result.loss, "metrics": result.metrics})
        if self.accelerator is not None:
            values = {f"{split}/{name}": value for name, value in result.metrics.items()}
            self.accelerator.log({f"{split}/loss": result.loss} | values, step=step)

    @by_main
    def log_features(self, phase: int, note: str) -> None:
        """Note in run.json what frozen layers compute once in a phase, or why they do not."""
        notes = read_status(self.path).get("features", {})
        self._folder.write_status(features=notes | {f"{phase + 1} {self.setup.plans[phase].name}": note})

    @by_main
    def log_solved(self, phase: int, facts: dict) -> None:
        """Note in run.json what a solver chose in a phase."""
        notes = read_status(self.path).get("solved", {})
        self._folder.write_status(solved=notes | {f"{phase + 1} {self.setup.plans[phase].name}": facts})

    def keep(self, model: nn.Module, best: Best, result: Evaluation) -> None:
        """Write the model as the run's best so far, and its answers on the validation set."""
        with gathered(model):
            self._keep(write_whole(model, self.whole), model, best, result)

    @by_main
    def _keep(self, model: nn.Module, live: nn.Module, best: Best, result: Evaluation) -> None:
        monitor = self.setup.recipe.monitor
        found = {
            "metric": monitor.metric, "mode": monitor.mode, "value": best.value, "step": best.step,
            "epoch": best.epoch, "metrics": best.metrics, "loss": result.loss,
        }  # fmt: skip
        self._write_model(model, live, found)
        if (answers := result.answers(self.setup.splits.labels)) is not None:
            self._folder.write_predictions(*answers)
        self._folder.write_status(best=found)
        hub = self.setup.recipe.hub
        if hub is not None and hub.when == "best":
            self._check_reload(())  # nothing is pushed that cannot be used
            self._describe()
            push_best(self.path, hub, found)

    def keep_if_none(self, model: nn.Module) -> None:
        """Write the model as it is when no best one was kept yet."""
        with gathered(model):
            self._keep_if_none(write_whole(model, self.whole), model)

    @by_main
    def _keep_if_none(self, model: nn.Module, live: nn.Module) -> None:
        old, final = self.path / ".model.old", self.path / "model"
        if old.exists() and not final.exists():
            old.rename(final)  # stopped between putting the one away and the other in its place
        if not final.exists() or not read_status(self.path).get("best"):
            self._write_model(model, live, None)

    @by_main
    def check_reload(self, signals: Sequence[str]) -> None:
        """Let a fresh process load the model that was kept, and compare: what is called done can be used.

        Raises:
            TrainingError: what was written is not the model that was trained.
            Interrupted: one of `signals` came meanwhile.
        """
        self._check_reload(signals)

    def _check_reload(self, signals: Sequence[str]) -> None:
        def on_wait() -> None:
            self._draw()  # beside the waiting it takes no time
            if signals:
                raise Interrupted(f"stopped by {signals[0]} while the model was loaded to compare it")

        why = left_out(self.setup)
        found = {"compared": False, "why": why}
        if why is None:
            found = check_reload(self.path, self.setup, self.samples, on_wait=on_wait)
        self._folder.write_status(reload=found)

    @cached_property
    def samples(self) -> Samples:
        """The validation samples that the model is compared on after it was written."""
        return samples_of(self.setup)

    @contextmanager
    def closing(self, accelerator: Accelerator) -> Iterator[None]:
        """Write status, wall time and curves when training ends, however it ends."""
        self._stop_metering = start_metering() if self.is_main else None
        try:
            yield
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, Interrupted)):
                self.status = "interrupted"
            self.why = self.why or first_line(error)
            # On a full or vanished disk what came first is what to tell; the other processes may be elsewhere.
            with suppress(FinetuneError):
                if self.is_main:
                    self._close()
            raise
        else:
            together(self._close, main_only=True)
            self.push()
        finally:
            self._unlock()
            if self.accelerator is not None:
                # `end_training` would end the other processes' group as well.
                for tracker in accelerator.trackers:
                    tracker.finish()

    @by_main
    def push(self) -> None:
        """Push the model of a run that is done to where its recipe says.

        Raises:
            HubError: it failed; the run is done all the same.
        """
        run, hub = load_run(self.path), self.setup.recipe.hub
        if hub is not None and run.status["status"] == "done":
            self.say(f"pushed: {push_finished(run, hub, say=self.say)}")

    def _close(self) -> None:
        shutil.rmtree(self.path / ".model.new", ignore_errors=True)  # stopped while writing
        emissions = self._stop_metering() if self._stop_metering else None
        before = read_status(self.path) if self.checkpoint else {}
        if self.checkpoint:
            emissions = added(before.get("emissions"), emissions)
        self._folder.write_status(
            status=self.status,
            why=self.why,
            wall_seconds=round(self._seconds(), 3),
            emissions=emissions,
            memory=self.memory.facts() if self.memory else None,
            **self.pace.facts(before.get("seconds")),
        )
        if self.pace.seconds["training"]:
            self.say(self.pace.told(less_waiting(self.setup)))
        self._describe()

    def _describe(self) -> None:
        """Draw the curves, and bring card and pictures beside the kept weights up to what the run knows now."""
        self._draw()
        run = load_run(self.path)
        if run.model_folder.is_dir():
            describe(run.model_folder, self.setup, run)

    def _draw(self) -> None:
        """Draw the curves, once for all that has been logged so far."""
        if not self._drawn:
            run = load_run(self.path)
            save_curves(run.rows, run.best, self.path / "curves.png", title=self.path.name)
            self._drawn = True

    def _seconds(self) -> float:
        """Return the wall time of the run, that of before an interruption included."""
        return self.earlier_seconds + time.monotonic() - self.started

    @by_main
    def _log(self, step: int, phase: int, row: dict) -> None:
        place = {"step": step, "epoch": self.setup.timeline.epoch(step), "phase": self.setup.plans[phase].name,
                 "phase_index": phase, "seconds": round(self._seconds(), 3)}  # fmt: skip
        self._folder.log(place | row)
        self._drawn = False

    def _write_model(self, model: nn.Module, live: nn.Module, best: dict | None) -> None:
        """Write `model/` aside, then put it in the place of the older one; `live` is the model as it was measured."""
        aside, old, final = (self.path / name for name in (".model.new", ".model.old", "model"))
        if old.exists() and not final.exists():
            old.rename(final)  # stopped between the two renames below
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        run = load_run(self.path)
        run = replace(run, status=run.status | {"best": best})
        write_artefact(aside, replace(self.setup.backbone, model=model), self.setup, run)
        (self.path / EXPECTED).unlink(missing_ok=True)
        if not left_out(self.setup):
            write_expected(self.path, live, self.samples)
        with writing(self.path):
            if final.exists():
                final.rename(old)
            aside.rename(final)
            sync_folder(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _facts(self, state: PartialState) -> dict:
        """What run.json says of a run from its start."""
        setup = self.setup
        report = setup.backbone.report
        return {
            "task": setup.recipe.task,
            "backbone": setup.backbone.source | {
                "library": setup.backbone.library,
                "family": setup.backbone.anatomy.family,
                "loaded_share": report.share,
                "kept_head": report.kept_head,
                "fingerprint": weights_fingerprint(setup.backbone.model),
            },
            "data": {
                "source": setup.splits.report.source,
                "commit": setup.splits.report.commit,
                "fingerprint": setup.splits.report.fingerprint,
                "rows": setup.splits.report.rows,
                "skipped": setup.splits.report.skipped,
            },
            "validation_rows": len(setup.splits.validation),
            "labels": list(setup.splits.labels.names),
            "phases": [plan.name for plan in setup.plans],
            "parameters": {"total": setup.total_size, "trainable": setup.trainable_size},
            "total_steps": setup.timeline.total_steps,
            "steps_per_epoch": setup.timeline.steps_per_epoch,
            "processes": state.num_processes,
            "parallel": holding(state.num_processes),
            "adapter": setup.backbone.adapter.facts() if setup.backbone.adapter else None,
            "precision": setup.recipe.training.precision,
            "notes": [*setup.splits.report.notes, *setup.notes],
            "auto": {choice.key: f"{choice.value} ({choice.why})" for choice in setup.choices},
            "versions": versions(),
            "hardware": hardware() | {"device": state.device.type},
        }  # fmt: skip


def start_accelerator(setup: Setup, record: Record) -> Accelerator:
    """Return the accelerator in the recipe's precision, with its trackers running; memory counts from here."""
    trackers = setup.recipe.trackers
    accelerator = accelerator_in(
        setup.recipe.training.precision,
        log_with=trackers or None,
        # A model may own parameters that its forward does not use (a mask token): DDP must not wait for them.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        project_config=ProjectConfiguration(str(record.path), logging_dir=str(record.path / "trackers")),
    )
    if trackers:
        accelerator.init_trackers("hf_finetune", config={"recipe": dump_recipe(setup.recipe)})
        record.accelerator = accelerator
    record.memory = Meter.start(accelerator.device)
    return accelerator
