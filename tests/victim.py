"""A training process that tests kill: `python victim.py train RECIPE …`, slowed and halted where the test asks.

Without arguments it is a nursery: it imports what training needs once, and for each line of its input, `{"arguments",
"env", "log"}` in JSON, forks such a process, in a group of its own, prints its number, and writes its exit code to
`CODES/<number>` when it has ended.

PACE: seconds that every forward pass takes at least. HANG: where to make the file MARKER and wait for the end:
`checkpoint` (its tensors are written, its manifest is not), `artefact` (model/ is half written), `swap` (the old model/ is
put away, the new one not yet in its place), `evaluation` (in its midst; goes on after a while).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import conftest  # noqa: F401
import hf_finetune.checkpoint
import hf_finetune.evaluation
import hf_finetune.record
import hf_finetune.train
from hf_finetune import cli
from hf_finetune.models import adapters, load_transformers  # noqa: F401 - imported late by those who need them


def hang(seconds: float = 600) -> None:
    Path(os.environ["MARKER"]).touch()
    time.sleep(seconds)


def before(module: Any, name: str, first: Callable[..., None]) -> None:
    """Let `first` run before each call of `module.name`."""
    real = getattr(module, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        first(*args)
        return real(*args, **kwargs)

    setattr(module, name, both)


def train(arguments: list[str]) -> None:
    """Run the command line, slowed and halted as the environment says."""
    pace, halt = float(os.environ.get("PACE", "0")), os.environ.get("HANG", "")

    def renaming(source: Path, target: Path) -> None:
        if halt == "swap" and source.name == ".model.new":
            hang()

    torch.set_num_threads(1)
    hf_finetune.record.save_curves = lambda rows, best, path, *, title: path.write_bytes(b"")  # type: ignore[assignment]
    before(hf_finetune.train, "sample_losses", lambda *_: time.sleep(pace))
    before(Path, "rename", renaming)
    if halt == "checkpoint":
        before(hf_finetune.checkpoint, "_sha256", lambda *_: hang())
    if halt == "artefact":
        before(
            hf_finetune.record,
            "write_artefact",
            lambda folder, *_: (folder.mkdir(), (folder / "x").touch(), hang()),
        )
    if halt == "evaluation":
        before(hf_finetune.evaluation, "sample_losses", lambda *_: hang(2))
    cli.main(arguments)


def child(request: dict[str, Any]) -> None:
    """Become the process that a line asks for."""
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    train(request["arguments"])


def bury(pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    aside = Path(os.environ["CODES"], f".{pid}")
    aside.write_text(str(code))
    aside.rename(aside.with_name(str(pid)))


def nursery() -> None:
    while line := sys.stdin.readline():
        pid = os.fork()
        os.setpgid(pid, 0)  # by whichever of the two comes first
        if not pid:
            child(json.loads(line))
            return
        threading.Thread(target=bury, args=(pid,), daemon=True).start()
        print(pid, flush=True)


if __name__ == "__main__":
    train(sys.argv[1:]) if sys.argv[1:] else nursery()
