"""What an arm is told and what it answers: JSON in, one line of JSON out."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGAN = "HF_FINETUNE_BENCHMARK_BEGAN"
"""Environment variable: time.monotonic() at which the parent started this process."""


@dataclass
class Job:
    """One arm's work: the same data, weights, batch, epochs, seed and rate for every arm."""

    arm: str
    recipe: str
    backbone: str
    data: str
    folder: str
    """Where the arm may write."""
    epochs: int
    batch_size: int
    seed: int
    overrides: list[str] = field(default_factory=list)
    """Further changes to the recipe, as on our command line."""
    lr: float = 0.0
    weight_decay: float = 0.0
    precision: str = "fp32"
    modality: str = "image"
    rows: int | None = None
    """Training rows to take; None for all."""
    learning: list[str] = field(default_factory=list)
    """Names of the parameters that learn, as timm or transformers name them."""
    folder_of_backbone: str = ""
    """Local folder of the weights, in Hub layout."""

    def learns(self, name: str) -> bool:
        """Return whether the parameter of a wrapped or plain model learns."""
        return any(name == each or name.endswith(f".{each}") for each in self.learning)

    def freeze(self, model: Any) -> None:
        """Switch the gradients of what does not learn off, as most training scripts do."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self.learns(name)


def read_job() -> Job:
    """Return the job this process was started with."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def since_start() -> float:
    """Return the seconds since the parent started this process, imports included."""
    return time.monotonic() - float(os.environ[BEGAN])


def answer(**values: Any) -> None:
    """Tell the parent what came out: first_step, samples_per_second, accuracy …"""
    print(json.dumps(values), flush=True)
