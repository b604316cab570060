"""Where a run stands, and how that is stored and restored, bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_finetune.checkpoint import (
    Checkpoint,
    begin_checkpoint,
    model_tensors,
    pack_optimizer,
    random_state,
    restore_model,
    restore_random_state,
    save_checkpoint,
    save_shares,
    unpack_optimizer,
)
from hf_finetune.data.streams import Stream
from hf_finetune.errors import UserError
from hf_finetune.monitor import Watch
from hf_finetune.parallel import split_shares
from hf_finetune.runfolder import CHECKPOINTS, RunFolder
from hf_finetune.together import together

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from timm.utils import ModelEmaV3

    from hf_finetune.setup import Setup


@dataclass
class Position:
    """All that the loop decides by, beside the monitor's memory."""

    step: int = 0
    """Optimizer steps done."""
    phase: int = -1
    phase_start: int = 0
    phase_end: int = 0
    """Step at which the phase ends at the latest."""
    reduction: float = 1.0
    """What reduce_on_plateau has brought the rates down to."""
    due: bool = False
    """An evaluation of this step is still to come."""


def store(
    run: Path,
    at: Position,
    watch: Watch,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    ema: ModelEmaV3 | None,
    setup: Setup,
    accelerator: Accelerator,
    *,
    keep: int,
) -> None:
    """Write a checkpoint of everything that `restore` puts back; every process calls this.

    Raises:
        FinetuneError: it cannot be written; earlier checkpoints are as they were.
    """
    folder, names = run / CHECKPOINTS, _names(setup)
    tensors, plan = pack_optimizer(optimizer.optimizer, names)
    parts = {"model": model_tensors(model, frozenset(names)), "optimizer": tensors}
    if ema:
        parts["ema"] = model_tensors(ema.module, frozenset(names))
    adapter = setup.backbone.adapter
    parts["adapter"], rearranged = adapter.state() if adapter else ({}, {})
    state = {
        "position": asdict(at),
        "adapter": rearranged,
        "watch": watch.state(),
        "optimizer": plan,
        "randomness": gather_object([random_state()]),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "total_steps": setup.timeline.total_steps,
        "stream": setup.splits.train.mark_at(at.step) if isinstance(setup.splits.train, Stream) else None,
    }
    alike, shares = split_shares(parts)
    begun: Path | None = None
    files: dict[str, Any] = {}
    if shares:
        me = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        begun = together(lambda: begin_checkpoint(folder, at.step), main_only=True)
        for each in gather_object([together(lambda: save_shares(begun, shares, **me))]):
            files |= each

    def save() -> None:
        rows = RunFolder(run).sync_metrics()
        save_checkpoint(
            folder, at.step, alike, state | {"rows": rows}, keep=keep, begun=begun, shares=files
        )  # fmt: skip

    together(save, main_only=True)


def restore(
    checkpoint: Checkpoint,
    at: Position,
    watch: Watch,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    ema: ModelEmaV3 | None,
    setup: Setup,
    accelerator: Accelerator,
) -> None:
    """Put a run where `store` found it.

    Raises:
        UserError: the checkpoint is of another model, optimizer or strategy.
    """
    state = checkpoint.state
    if state["position"]["phase"] >= len(setup.plans):
        raise UserError(
            f"resume: the checkpoint stands in phase {state['position']['phase'] + 1}, the recipe has "
            f"{len(setup.plans)}. Start another run with another --output."
        )
    for name, value in state["position"].items():
        setattr(at, name, value)
    watch.load(state["watch"])
    if isinstance(setup.splits.train, Stream) and state.get("stream"):
        setup.splits.train.resume(state["stream"])
    restore_model(model, checkpoint.tensors("model"))
    unpack_optimizer(optimizer.optimizer, _names(setup), checkpoint.tensors("optimizer"), state["optimizer"])
    if ema:
        restore_model(ema.module, checkpoint.tensors("ema"))
    if setup.backbone.adapter:
        setup.backbone.adapter.restore(checkpoint.tensors("adapter"), state["adapter"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    # Of a run that is resumed with more processes on purpose, those without a state of their own keep their seed's.
    if accelerator.process_index < len(state["randomness"]):
        restore_random_state(state["randomness"][accelerator.process_index])


def _names(setup: Setup) -> list[str]:
    """Return the optimizer's parameters in the order of its groups."""
    return [name for group in setup.groups for name in group.parameters]
