"""A run's model to the Hub: asked for on the command line or in a recipe, told in words, never at the run's cost."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from hf_finetune.errors import HubError, UserError
from hf_finetune.hub.card import keep_edits, with_repo_id
from hf_finetune.hub.retry import (
    BRIEF,
    HUB_ERRORS,
    PATIENT,
    Patience,
    Persistence,
    quiet_client,
    refused,
    status,
)
from hf_finetune.hub.space import space_files
from hf_finetune.hub.spec import REPO_ID, HubSpec
from hf_finetune.hub.upload import Pushed, Target, Unsure, claim, tag, upload
from hf_finetune.runfolder import Run, RunFolder, load_run

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be pushed where; the options of the `push` verb."""

    repo_id: str
    private: bool = False
    branch: str | None = None
    pr: bool = False
    tag: str | None = None
    message: str | None = None
    space: bool = False
    space_id: str | None = None

    @property
    def targets(self) -> list[Target]:
        """The repository of the model, and that of the Space if there is to be one."""
        targets = [Target(self.repo_id, branch=self.branch, pr=self.pr, tag=self.tag)]
        if self.space or self.space_id:
            targets.append(Target(self.space_id or f"{self.repo_id}-demo", kind="space"))
        return targets

    def command(self, run: Path) -> str:
        """Return the command that does this."""
        options = [
            f"--{name.replace('_', '-')}" for name in ("private", "pr", "space") if getattr(self, name)
        ]
        for name in ("branch", "tag", "message", "space_id"):
            if (value := getattr(self, name)) is not None:
                options += [f"--{name.replace('_', '-')}", value]
        return shlex.join(["hf-finetune", "push", str(run), self.repo_id, *options])


def push_run(place: str, order: Order, *, say: Say = lambda text: None) -> list[str]:
    """Push the best model of a run folder, which is only read, and return the addresses of what was made.

    Raises:
        UserError: the folder holds no run, or no whole model, or a Space cannot be made of it; an id is none.
        HubError: the Hub cannot be reached, or refuses.
    """
    for target in order.targets:
        if not re.fullmatch(REPO_ID, target.repo_id):
            raise UserError(f"push: '{target.repo_id}' is no repository's id. Write user/name.")
    run = load_run(place)
    _check_model(run)
    if run.status.get("status") == "running":
        say(f"{place} is still running: what is pushed is its best model so far.")
    with _unchanging(run) as folder:
        contents = [_model_files(folder)]
        if len(order.targets) > 1:
            contents.append(space_files(run, folder, order.repo_id))
        check_rights(order, say=say)
        addresses: list[str] = []
        for target, files in zip(order.targets, contents, strict=True):
            try:
                pushed = _push(target, files, message=order.message or commit_message(run.best), say=say)
            except HubError as error:
                before = f" (The model is there: {addresses[0]})" if addresses else ""
                raise HubError(
                    f"{error}{before} The model is complete in {run.model_folder}. Try again: {order.command(run.path)}"
                ) from None
            addresses.append(pushed.url)
            if not pushed.is_new:
                say(f"{target.repo_id} held these very files already.")
    return addresses


def check_rights(order: Order, *, say: Say = lambda text: None, training: bool = False) -> None:
    """Make the repositories that are not there and see that they may be written to: a run must not end in a 403.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    for target in order.targets:
        try:
            with quiet_client(bars=False):
                claim(HfApi(), target, private=order.private, persist=Persistence(PATIENT, say))
        except HUB_ERRORS as error:
            raise refused(
                f"{target.repo_id} cannot be written to", error, _remedy(error, order, training)
            ) from None


def push_finished(run: Run, spec: HubSpec, *, say: Say = lambda text: None) -> str:
    """Push the model of a run that is done, as its recipe says; run.json records where to, or why not.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    order = Order(spec.repo_id, private=spec.private)
    try:
        return _recorded(run.path, order, run.best, PATIENT, say).url
    except HubError as error:
        raise HubError(
            f"{error} The run is done and its model complete in {run.model_folder}. "
            f"Try again: {order.command(run.path)}"
        ) from None


def push_best(run: Path, spec: HubSpec, best: Mapping[str, Any]) -> None:
    """Push the best model so far while training waits, with little patience: a failure is a warning."""
    try:
        _recorded(run, Order(spec.repo_id, private=spec.private), best, BRIEF, lambda text: None)
    except HubError as error:
        # The run is worth more than this push: it goes on, and pushes again at its end.
        sys.stderr.write(f"warning: {error} Training goes on; the model is pushed again at its end.\n")


def commit_message(best: Mapping[str, Any] | None) -> str:
    """Return a commit message that says what the weights measured."""
    if not best:
        return "Model that was not measured"
    return f"{best['metric']} {best['value']:.4f} at step {best['step']}"


def _recorded(
    run: Path, order: Order, best: Mapping[str, Any] | None, patience: Patience, say: Say
) -> Pushed:
    """Push and write into run.json what came of it."""
    facts = {"repo_id": order.repo_id, "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    folder = RunFolder(run)
    try:
        pushed = _push(
            order.targets[0],
            _model_files(run / "model"),
            message=commit_message(best),
            patience=patience,
            say=say,
        )
    except HubError as error:
        folder.write_status(push=facts | {"error": str(error)})
        raise
    folder.write_status(push=facts | {"commit": pushed.commit, "url": pushed.url})
    return pushed


def _push(
    target: Target,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    patience: Patience | None = None,
    say: Say,
) -> Pushed:
    def merge_card(new: str, old: str) -> str:
        return keep_edits(new, old) if target.kind == "model" else new

    if target.kind == "model" and isinstance(files.get("README.md"), Path):
        card = Path(str(files["README.md"])).read_text(encoding="utf-8")
        files = {**files, "README.md": with_repo_id(card, target.repo_id).encode()}
    persist, what = Persistence(patience or PATIENT, say), f"push to {target.repo_id} failed"
    try:
        with quiet_client(bars=sys.stderr.isatty()):
            api = HfApi()
            pushed = upload(api, target, files, message=message, merge_card=merge_card, persist=persist)
            what = f"{pushed.url} is pushed, but the tag '{target.tag}' failed"
            if target.tag:
                tag(api, target, pushed.commit, persist)
            return pushed
    except Unsure as error:
        raise refused(
            what, error, f"Whether the commit was made is not known: see {target.repo_id}."
        ) from None
    except HUB_ERRORS as error:
        raise refused(what, error, "") from None


def _model_files(folder: Path) -> dict[str, Path | bytes]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _check_model(run: Run) -> None:
    """Raise a UserError when the run's model folder is not all there."""
    folder = run.model_folder
    if not folder.is_dir():
        raise UserError(
            f"{run.path}: this run kept no model (status {run.status.get('status')}), so nothing can be pushed."
        )
    missing = [name for name in ("README.md", "config.json", "recipe.yaml") if not (folder / name).is_file()]
    weights = [name for name in WEIGHTS if (folder / name).is_file()]
    if not weights and (folder / INDEX).is_file():
        weights = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        missing += [name for name in weights if not (folder / name).is_file()]
    if not weights:
        missing.append(" or ".join(WEIGHTS))
    if missing:
        raise UserError(
            f"{folder}: the model is not complete, {' and '.join(missing)} missing; it is not pushed. {_ANEW}"
        )
    for name in weights:
        try:
            with safe_open(folder / name, "pt"):  # reads the header, which tells the size
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: damaged ({error}); the model is not pushed. {_ANEW}") from None


_ANEW = "Train again, or continue the run with --resume."


@contextmanager
def _unchanging(run: Run) -> Iterator[Path]:
    """Give the model folder; of a run in progress, which may put another in its place, a copy."""
    if run.status.get("status") != "running":
        yield run.model_folder
        return
    with tempfile.TemporaryDirectory(prefix="hf-finetune-push-") as aside:
        copy = Path(aside) / "model"
        for _ in range(3):
            before = os.stat(run.model_folder).st_ino
            shutil.copytree(run.model_folder, copy)
            if os.stat(run.model_folder).st_ino == before:
                break
            shutil.rmtree(copy)
        else:
            raise UserError(
                f"{run.path}: its model changes faster than it can be copied. Push when the run is done."
            )
        yield copy


def _remedy(error: BaseException, order: Order, training: bool) -> str:
    later = "Or train with `hub=` and push later." if training else ""
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return later
    if status(error) in (401, 403, 404):
        other = "choose another repo_id" + (
            "" if training or order.pr else ", or open a pull request with --pr"
        )
        who = "Log in with `hf auth login` as somebody who may, with a token that may write"
        return f"{who}; {other}. {later}".rstrip()
    return f"Is the Hub at {HfApi().endpoint} to be reached? Try again later. {later}".rstrip()
