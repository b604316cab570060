"""Why a run stops before its last step: a signal, the clock, a number that is none."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_finetune.data.columns import column_values
from hf_finetune.data.streams import Stream
from hf_finetune.data.tokens import kept_tokens
from hf_finetune.errors import FinetuneError, Interrupted, TrainingError
from hf_finetune.models.backbone import TextInput
from hf_finetune.monitor import Best
from hf_finetune.record import Record
from hf_finetune.setup import Setup
from hf_finetune.together import by_everyone, is_lost_peer, lost_peer


@contextmanager
def watched_signals() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM by name instead of obeying them at once; a second one leaves at once."""
    received: list[str] = []
    first = 0.0
    # A cluster signals torchrun and its processes alike, and torchrun passes on what it gets: a copy is no second wish.
    echo = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        nonlocal first
        if received and time.monotonic() >= first + echo:
            os._exit(Interrupted.exit_code)
        first = first or time.monotonic()
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def named_failures(setup: Setup) -> Iterator[None]:
    """Around training: turns what torch says of a full memory or a lost process into a TrainingError."""
    try:
        yield
    except torch.OutOfMemoryError:
        size, model_input = setup.micro_batch_size, setup.backbone.input
        half = max(1, size // 2)
        ways = f"training.micro_batch_size={half}"
        if isinstance(model_input, TextInput):
            longest = kept_tokens(model_input, setup.recipe.data.max_length)
            tokens = max(longest, (setup.recipe.training.micro_batch_tokens or size * longest) // 2)
            ways += f", or training.micro_batch_tokens={tokens}, which cuts batches of long texts alone"
        raise TrainingError(
            f"out of memory at {size} samples per forward pass. Set {ways}: gradients accumulate to the same "
            "batch_size, so the result stays the same."
        ) from None
    except RuntimeError as error:
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):  # both import slowly
            first = next(iter(str(error).strip().splitlines()), "")
            raise TrainingError(
                f"the training step could not be compiled ({type(error).__name__}: {first}). "
                "Set training.compile: off; on a CPU torch.compile needs a C++ compiler."
            ) from error
        if not is_lost_peer(error):
            raise
        raise lost_peer() from None


def asked_to_stop(
    signals: list[str], max_hours: float | None, started: float, accelerator: Accelerator
) -> str | None:
    """Return why the run should stop now, the same on every process, None to go on."""
    seconds = time.monotonic() - started
    out_of_time = max_hours is not None and seconds > max_hours * 3600
    if accelerator.num_processes > 1:
        # A signal may reach one process first: the others hear of it here.
        flags = torch.tensor([float(bool(signals)), float(out_of_time)], device=accelerator.device)
        signalled, out_of_time = (bool(flag) for flag in accelerator.reduce(flags, "sum").tolist())
    else:
        signalled = bool(signals)
    if signalled:
        return f"stopped by {signals[0] if signals else 'a signal to another process'}"
    return f"training.max_hours ({max_hours:g}) is used up" if out_of_time else None


def non_finite(
    what: str,
    step: int,
    epoch: int,
    answers: list[tuple[torch.Tensor, torch.Tensor]],
    record: Record,
    best: Best,
) -> FinetuneError:
    """Return the error that stops a run at its first non-finite number; every process calls this.

    `answers` holds (indices, losses) of each micro-batch. All samples are named when no loss tells which is to blame.
    """
    indices, losses = (torch.cat([part.cpu() for part in parts]) for parts in zip(*answers, strict=True))
    mine = [(int(index), bool(finite)) for index, finite in zip(indices, torch.isfinite(losses), strict=True)]
    batch = set(gather_object(mine))
    guilty = {index for index, finite in batch if not finite} or {index for index, _ in batch}
    train = record.setup.splits.train
    if isinstance(train, Stream):
        rows = train.names(sorted(guilty))
    else:
        numbers = column_values(train, "row")  # as the data's own file counts
        rows = [str(number) for number in sorted(int(numbers[index]) for index in guilty)]
    named = ", ".join(rows[:16]) + (", …" if len(rows) > 16 else "")
    kept = (
        f"The best model so far (step {best.step}) is in {record.path / 'model'}."
        if best.value is not None
        else ""
    )
    error = TrainingError(
        f"step {step + 1}, epoch {epoch + 1}: {what}, in rows {named} of train (the first is 0). Look at these "
        f"samples, lower optimizer.lr, or train in precision: fp32. {kept}".rstrip()
    )
    return by_everyone(error)
