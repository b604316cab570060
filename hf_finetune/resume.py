"""The resume contract: what must be as it was for a run to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.checkpoint import Checkpoint, find_checkpoint
from hf_finetune.errors import FinetuneError, UserError
from hf_finetune.recipe import load_recipe
from hf_finetune.runfolder import CHECKPOINTS, METRICS, RECIPE, STATUS, Run, RunFolder, load_run, newest_run
from hf_finetune.runlock import RunLock
from hf_finetune.timeline import phase_end

if TYPE_CHECKING:
    from hf_finetune.setup import Setup

# Recipe keys that say where and how to run, not what comes out.
FREE_KEYS = (
    "output", "hub", "trackers", "data.workers", "data.cache_budget", "training.checkpoint", "training.max_hours",
    "training.reload_check",
)  # fmt: skip
# What a revision means is compared instead: the backbone's commit, the data's content.
_BY_COMMIT = ("backbone.revision", "data.revision")
LENGTH_KEYS = ("training.epochs", "training.steps")
"""May grow: the run is then extended."""
RESULT_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "hf-finetune",
)
"""Packages whose other version may compute other numbers."""


@dataclass(frozen=True)
class Resumed:
    """A run that goes on."""

    checkpoint: Checkpoint | None
    """None when it was stopped before its first checkpoint."""
    finished: bool
    seconds: float
    """Wall time up to the checkpoint."""


def find_run(setup: Setup, name: str) -> Path | None:
    """Return the folder of the run to resume: `output`, or the newest unfinished one of this recipe and backbone.

    None when `output` holds no run yet: a job that is always started with `--resume` begins this way.

    Raises:
        UserError: `output` is not given and there is no unfinished run, or its process still lives.
    """
    output = setup.recipe.output
    if output is not None:
        folder = Path(output)
        if not (folder / STATUS).is_file():
            return None
        if not any((folder / name).exists() for name in (RECIPE, METRICS, CHECKPOINTS)):
            RunLock(folder).release()  # raises while the process that has just claimed it lives
            (folder / STATUS).unlink()  # killed right after it had claimed the folder: nothing is lost
            return None
        return folder
    found = newest_run(name, setup.recipe.backbone.id)
    if found is None:
        raise UserError(
            f"--resume: runs/ holds no unfinished run of '{name}' on this backbone. Name its folder with --output, "
            "or leave --resume out to start one."
        )
    return found


def take_over(
    folder: Path, setup: Setup, facts: Mapping[str, Any], *, allow_changes: bool, say: Callable[[str], None]
) -> Resumed:
    """Check that `setup` continues the run in `folder` as it began, and find where it goes on.

    Args:
        facts: what run.json would say of this run if it started now.
        allow_changes: continue although something differs that changes the result.
        say: told what was rejected, what differs, and where the run goes on.

    Raises:
        UserError: something differs that changes the result; both values are named.
        FinetuneError: there are checkpoints, and none is valid.
    """
    run = load_run(folder)
    changes = [*_recipe_changes(run, setup), *_fact_changes(run.status, facts)]
    if changes and not allow_changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise UserError(
            f"{folder}: this would not go on as the run began:\n{listed}\n"
            "Put back what was, start another run with another --output, or accept another result with --allow-changes."
        )
    for change in [*changes, *_free_changes(run.status, facts)]:
        say(f"resume: {change}")

    total, total_before = setup.timeline.total_steps, run.status.get("total_steps", 0)
    done = run.status.get("status") == "done"
    if done and total <= total_before:
        return Resumed(None, finished=True, seconds=0.0)
    checkpoint, rejected = find_checkpoint(folder / CHECKPOINTS)
    for reason in rejected:
        say(f"resume: checkpoint rejected: {reason}")
    if checkpoint is None:
        if rejected or done:
            why = "; ".join(rejected) if rejected else "it kept none: training.checkpoint is null"
            raise FinetuneError(
                f"{folder}: no checkpoint can be used ({why}). The best model so far is in "
                f"{folder / 'model'}, if any; start again with another --output."
            )
        say("resume: the run stopped before its first checkpoint; it starts from the beginning")
        RunFolder(folder).cut_metrics(0)
        return Resumed(None, finished=False, seconds=0.0)
    state = checkpoint.state
    step = state["position"]["step"]
    if step > total:
        raise UserError(f"{folder}: {step} steps are done, more than the {total} the recipe asks for now.")
    if total > state["total_steps"]:
        say(f"resume: the run grows from {state['total_steps']} to {total} steps")
        _lengthen(state, setup)
    if RunFolder(folder).cut_metrics(state["rows"]) < state["rows"]:
        say(f"resume: {METRICS} has lost rows from before step {step}")
    say(f"resume: from {checkpoint.path.name} in {folder}")
    return Resumed(checkpoint, finished=False, seconds=_seconds_at(folder, step))


def _recipe_changes(run: Run, setup: Setup) -> Iterator[str]:
    was = _flat(load_recipe(run.recipe_path).model_dump(mode="json", by_alias=True))
    now = _flat(setup.recipe.model_dump(mode="json", by_alias=True))
    grows = setup.timeline.total_steps >= run.status.get("total_steps", 0)
    chosen = {choice.key for choice in setup.choices if choice.key.startswith(("training.", "schedule."))}
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) == now.get(key) or key.startswith((*FREE_KEYS, *_BY_COMMIT)):
            continue
        if grows and (key in LENGTH_KEYS or key in chosen):
            continue
        yield f"{key}: was {was.get(key)}, is {now.get(key)}"


def _fact_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs outside the recipe and changes the result."""
    places = [
        ("data", "fingerprint"),
        ("backbone", "fingerprint"),
        ("labels",),
        ("processes",),
        ("parallel",),
    ]
    places += [("versions", package) for package in RESULT_PACKAGES]
    if _at(was, ("backbone", "quantize")):
        places.append(("versions", "bitsandbytes"))
    for place in places:
        before, after = _at(was, place), _at(now, place)
        if before is not None and before != after:
            yield f"{' '.join(place)}: was {before}, is {after}"
    # "cuda:0" and "cpu:0" are what earlier versions wrote of the first of several processes.
    before, after = _at(was, ("hardware", "device")), _at(now, ("hardware", "device"))
    if before is not None and str(before).partition(":")[0] != after:
        yield f"hardware device: was {before}, is {after}"
    for part in ("backbone", "data"):
        before, after = _at(was, (part, "commit")), _at(now, (part, "commit"))
        same_content = _at(was, (part, "fingerprint")) == _at(now, (part, "fingerprint"))
        # Rows are all that is taken from a data set; beside a backbone's weights there is a tokenizer or processor.
        if before not in (None, after) and not (part == "data" and same_content):
            yield f"{part} commit: was {before}, is {after}; set {part}.revision={before} to go on with that"


def _free_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs and is worth a line, though the result stays the same."""
    for package, version in now["versions"].items():
        before = _at(was, ("versions", package))
        if package not in RESULT_PACKAGES and before is not None and before != version:
            yield f"{package} was {before}, is {version}; that does not change the result"
    before, after = _at(was, ("data", "commit")), _at(now, ("data", "commit"))
    if before not in (None, after) and _at(was, ("data", "fingerprint")) == _at(now, ("data", "fingerprint")):
        yield f"data commit: was {before}, is {after}; the rows are the same"
    for name in ("cpu", "cores", "gpus"):
        before, after = _at(was, ("hardware", name)), _at(now, ("hardware", name))
        if before is not None and before != after:
            yield f"{name}: was {before}, is {after}; another kernel may round the last bits differently"


def _lengthen(state: dict[str, Any], setup: Setup) -> None:
    """Let the phase that ended with the run end where it does in the longer one; early stopping counts afresh."""
    at = state["position"]
    if at["phase_end"] == state["total_steps"] and 0 <= at["phase"] < len(setup.plans):
        at["phase_end"] = max(
            at["step"], phase_end(setup.plans, at["phase"], at["phase_start"], setup.timeline)
        )
    if state["watch"]["early"]:
        state["watch"]["early"]["waited"] = 0


def _seconds_at(folder: Path, step: int) -> float:
    rows = [row for row in load_run(folder).rows if row.get("step", 0) <= step]
    return float(rows[-1].get("seconds", 0.0)) if rows else 0.0


def _at(facts: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = facts
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flat(inner, f"{key}.{name}" if key else name).items()
    }
