"""What an arm is told, how it takes its times, and what it answers: JSON in, one line of JSON out."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

BEGAN = "HF_FINETUNE_BENCHMARK_BEGAN"
"""Environment variable: time.monotonic() at which the parent started this process."""

Learning = Literal["all", "head", "adapters", "some", "phases"]


@dataclass
class Job:
    """One arm's work: the same data, weights, batch, epochs, seed and rate for every arm."""

    arm: str
    recipe: str
    backbone: str
    data: str
    """An image folder, or a folder with train.csv and dev.csv."""
    folder: str
    """Where the arm may write."""
    epochs: int
    batch_size: int
    seed: int
    floor_seconds: float = 8.0
    """How long each floor is measured, after two steps to warm up."""
    overrides: list[str] = field(default_factory=list)
    """Further changes to the recipe, as on our command line."""
    # From here on what our recipe was resolved to: plan.py fills it in.
    lr: float = 0.0
    weight_decay: float = 0.0
    precision: str = "fp32"
    modality: str = "image"
    workers: int = 0
    """Processes that load images."""
    train_samples: int = 0
    learns: Learning = "all"
    """What learns: everything, the head, adapters with the head, some other parameters, or ever more by phases."""
    learning: list[str] = field(default_factory=list)
    """Names of the parameters that learn, as timm or transformers name them."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """What peft's configuration of the adapters is made of; empty without adapters."""
    folder_of_backbone: str = ""
    """Local folder of the weights, in Hub layout."""

    def limited(self, model: Any) -> Any:
        """Return `model` with gradients for what learns alone, as most scripts do it; adapters put in by peft."""
        if self.learns == "adapters":
            import peft

            options = {key: value for key, value in self.adapter.items() if key != "peft_type"}
            config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.adapter["peft_type"]](**options)
            return peft.get_peft_model(model, config)
        if self.learns != "all":
            for name, parameter in model.named_parameters():
                parameter.requires_grad = any(
                    name == each or name.endswith(f".{each}") for each in self.learning
                )
        return model


@dataclass
class Watch:
    """The times of an arm's training: the first optimizer step, and every epoch without its evaluation."""

    first_step: float = 0.0
    speeds: list[float] = field(default_factory=list)
    """Samples per second in each epoch."""
    began: float = 0.0

    def epoch_begins(self) -> None:
        """Call before the epoch's first batch is asked for."""
        self.began = time.monotonic()

    def stepped(self) -> None:
        """Call after each optimizer step."""
        if not self.first_step:
            finish_queued()
            self.first_step = since_start()

    def epoch_ends(self, samples: int) -> None:
        """Call after the epoch's last optimizer step, before anything is measured or saved."""
        finish_queued()
        self.speeds.append(samples / (time.monotonic() - self.began))

    def times(self) -> dict[str, float]:
        """Return what to answer."""
        return {"first_step": self.first_step, "samples_per_second": usual_speed(self.speeds)}


def usual_speed(speeds: Sequence[float]) -> float:
    """Return the median over epochs, without the first where there are more: that one has the start in it."""
    return statistics.median(speeds[1:] or speeds)


def finish_queued() -> None:
    """Wait for what a GPU still has to do: until then a clock shows only how fast work was handed to it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_job() -> Job:
    """Return the job this process was started with."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def since_start() -> float:
    """Return the seconds since the parent started this process, imports included."""
    return time.monotonic() - float(os.environ[BEGAN])


def answer(**values: Any) -> None:
    """Tell the parent what came out: first_step, samples_per_second, accuracy …; a GPU's memory where one was used."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(values), flush=True)
