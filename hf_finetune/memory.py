"""Memory: what there is, what a process took at its worst moment, and what a computation takes on more samples.

On a GPU it is what torch's allocator handed out (`max_memory_allocated`). On a CPU it is the resident set of the
process: libraries, data and weights are in it, its data workers and the process that compares the model are not.
"""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_finetune.heap import Blocks

_PROC, _CGROUP = Path("/proc/self"), Path("/sys/fs/cgroup")
_MARGIN = 0.9
"""Share of what is free that a run may plan with: other programs grow too."""


@dataclass(frozen=True)
class Meter:
    """Counts from where everything was loaded and nothing had been trained."""

    device: torch.device
    ready: int
    """Bytes that were in use then."""

    @classmethod
    def start(cls, device: torch.device) -> Meter:
        """Forget earlier peaks, as far as the system can, and start."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # elsewhere the peak is that of the whole process
                (_PROC / "clear_refs").write_text("5")  # Linux: VmHWM starts from the present resident set
        return cls(device, in_use(device))

    def facts(self) -> dict[str, Any]:
        """Return what run.json says of a run's memory, in bytes."""
        found: dict[str, Any] = {"device": str(self.device), "ready": self.ready, "peak": peak(self.device)}
        if self.device.type == "cuda":
            found["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return found


def in_use(device: torch.device) -> int:
    """Return the bytes in use now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak(device: torch.device) -> int:
    """Return the most bytes in use since the last `Meter.start`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available(device: torch.device) -> int:
    """Return the bytes that this process may still take: its share of what is free, less a margin for others."""
    if device.type == "cuda":
        return int(_MARGIN * torch.cuda.mem_get_info(device)[0])
    import psutil

    free = [psutil.virtual_memory().available, *_left_in_cgroup()]
    return int(_MARGIN * min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _left_in_cgroup() -> list[int]:
    """Return what the limit of this process's container leaves; nothing where there is none."""
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return [int((_CGROUP / most).read_text()) - int((_CGROUP / now).read_text())]
        except (OSError, ValueError):  # no such file; `max` means no limit
            continue
    return []


def size_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of these tensors."""
    return sum(tensor.nbytes for tensor in tensors)


class Tape(TorchDispatchMode):
    """Notes after every operation how many bytes of new tensors live; exact, and the same on every device.

    What a kernel takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[int] = []
        """Bytes that live after each operation, of those allocated since the start."""
        self.blocks: Blocks = []
        """Where a tensor's memory begins and ends."""
        self._live = 0
        self._count = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs or {})):
            self._note(storage, 0)  # what was there before is none of ours
        output = func(*args, **(kwargs or {}))
        for storage in _storages(output):
            self._note(storage, storage.nbytes())
        self.curve.append(self._live)
        return output

    def _note(self, storage: Any, size: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._live += size
            self._count += 1
            if size:
                self.blocks.append((self._count, size))
            weakref.finalize(storage, self._forget, storage._cdata, size, self._count)

    def _forget(self, key: int, size: int, number: int) -> None:
        self._known.discard(key)
        self._live -= size
        if size:
            self.blocks.append((-number, 0))


def _storages(values: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Growth:
    """What a computation takes above what was there, as a function of the number of samples.

    The same operations run whatever that number is, and each tensor's size is linear in it: two small batches tell.
    """

    counts: tuple[int, int]
    curves: tuple[Sequence[int], Sequence[int]]
    blocks: tuple[Blocks, Blocks]

    @classmethod
    def of(cls, run: Callable[[int], None], counts: tuple[int, int]) -> Growth:
        """Watch `run(count)` for both counts."""
        few, more = Tape(), Tape()
        for count, tape in zip(counts, (few, more), strict=True):
            with tape:
                run(count)
        return cls(counts, (few.curve, more.curve), (list(few.blocks), list(more.blocks)))

    def at(self, count: int) -> int:
        """Return the bytes at the worst moment with `count` samples."""
        few, more = self.curves
        if len(few) != len(more):  # the network does something else on other batches: by the peaks alone
            few, more = [max(few)], [max(more)]
        return max(self._drawn(a, b, count) for a, b in zip(few, more, strict=True))

    def blocks_at(self, count: int) -> Blocks | None:
        """Return when which tensors come and go with `count` samples; None where that depends on the batch."""
        few, more = (_renumbered(blocks) for blocks in self.blocks)
        if [at for at, _ in few] != [at for at, _ in more]:
            return None
        return [(at, self._drawn(a, b, count)) for (at, a), (_, b) in zip(few, more, strict=True)]

    def _drawn(self, few: int, more: int, count: int) -> int:
        """Return where the line through both batches is at `count` samples."""
        first, second = self.counts
        return round(few + (more - few) * (count - first) / (second - first))


def _renumbered(blocks: Blocks) -> Blocks:
    """Return blocks numbered from 1 in the order in which they begin."""
    numbers = {at: number for number, at in enumerate((at for at, _ in blocks if at > 0), 1)}
    return [(numbers[at] if at > 0 else -numbers[-at], size) for at, size in blocks]


def optimizer_bytes(
    build: Callable[[str, nn.Parameter], torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, int]:
    """Return what an optimizer keeps for each parameter, by one step on a copy of one of each shape.

    Args:
        build: from a parameter's name and a stand-in for it to its optimizer.
        parameters: by name.
    """
    known: dict[Any, int] = {}
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        kind = (tuple(parameter.shape), parameter.dtype)
        if kind not in known:
            copy = nn.Parameter(torch.zeros_like(parameter))
            copy.grad = torch.zeros_like(copy)
            optimizer = build(name, copy)
            optimizer.step()
            kept = tree_leaves(dict(optimizer.state[copy]))
            known[kind] = size_of([leaf for leaf in kept if isinstance(leaf, Tensor)])
        found[name] = known[kind]
    return found
