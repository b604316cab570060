"""A training process that tests kill: `python victim.py train RECIPE …`, slowed and halted where the test asks.

PACE: seconds that every forward pass takes at least. HANG: where to make the file MARKER and wait for the end:
`checkpoint` (its tensors are written, its manifest is not), `artefact` (model/ is half written), `swap` (the old model/ is
put away, the new one not yet in its place), `evaluation` (in its midst; goes on after a while).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_finetune.checkpoint
import hf_finetune.evaluation
import hf_finetune.record
import hf_finetune.train
from hf_finetune import cli


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


if __name__ == "__main__":
    train(sys.argv[1:])
