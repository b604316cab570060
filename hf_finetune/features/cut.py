"""A network's frozen prefix, cut off: what it returns is stored, and the rest runs on that.

The model's own forward runs as it is, so masks, positions, pooling and whatever an architecture does between its
modules stay its own affair. Only its frozen modules are not run: those whose outputs the rest needs return what was
stored, the others return NaN of the right shape, which nothing that matters may read. `trials.find_cut` finds out
which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_finetune.models.backbone import FEATURES
from hf_finetune.models.load import forward as forward_whole

Inputs = dict[str, Tensor]


class _EnoughError(Exception):
    """All that is wanted has been computed."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of an output: what is stored under `key`, or a shape that is filled with NaN."""

    dims: tuple[tuple[str, int], ...]
    """For each dimension ("rows", k): k times the samples; ("tokens", c): c more than the tokens; ("is", d): d."""
    dtype: torch.dtype
    key: str = ""
    first: bool = False
    """Of the second dimension only the first entry is needed: the token that is classified."""

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Return the tensor's shape in a batch."""
        sizes: dict[str, Callable[[int], int]] = {
            "rows": lambda k: k * rows,
            "tokens": lambda c: c + tokens,
            "is": lambda d: d,
        }
        sized = tuple(sizes[kind](number) for kind, number in self.dims)
        return (sized[0], 1, *sized[2:]) if self.first else sized

    @property
    def ragged(self) -> bool:
        """Whether a sample has one entry per token, and is stored without padding."""
        return not self.first and len(self.dims) > 1 and self.dims[1][0] == "tokens"


@dataclass(frozen=True)
class Call:
    """One call of a frozen module, and what it returned: tensors while tracing, a `Leaf` for each of them in a cut."""

    module: str
    structure: TreeSpec
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Cut:
    """The end of a frozen prefix."""

    calls: tuple[Call, ...]
    """Calls that are not made, in their order."""
    pixels: tuple[int, ...] = ()
    """Shape of an image; empty for texts."""

    @property
    def stored(self) -> dict[str, Leaf]:
        """What is stored of each sample, by name."""
        return {
            leaf.key: leaf
            for call in self.calls
            for leaf in call.leaves
            if isinstance(leaf, Leaf) and leaf.key
        }

    @property
    def modules(self) -> list[str]:
        """Names of the modules that are not run."""
        return list(dict.fromkeys(call.module for call in self.calls))

    @property
    def last(self) -> str:
        """Name of the last module whose output is stored."""
        return [
            call.module for call in self.calls if any(isinstance(x, Leaf) and x.key for x in call.leaves)
        ][-1]

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return logits, from stored features where `inputs` carries them and through the whole model where not."""
        within = model.module if isinstance(model, DistributedDataParallel) else model
        return self.forward_within(model, within, inputs)

    def forward_within(self, model: Any, within: nn.Module, inputs: Inputs) -> Tensor:
        """As `forward`, with the modules looked up in `within`."""
        stored = {name: tensor for name, tensor in inputs.items() if name.startswith(FEATURES)}
        if not stored:
            return forward_whole(model, inputs)
        rest = {name: tensor for name, tensor in inputs.items() if name not in stored}
        some = next(iter(stored.values()))
        tokens = 0 if self.pixels else rest["input_ids"].shape[1]
        if self.pixels:  # images are not even read; their stand-in takes no memory
            rest = {"pixel_values": torch.zeros((), device=some.device).expand(len(some), *self.pixels)}

        def output(call: Call) -> Any:
            leaves = [
                (
                    stored[leaf.key].to(leaf.dtype)
                    if leaf.key
                    else _nothing(leaf, len(some), tokens, some.device)
                )
                if isinstance(leaf, Leaf)
                else leaf
                for leaf in call.leaves
            ]
            return tree_unflatten(leaves, call.structure)

        with returning(within, self.calls, output):
            return forward_whole(model, rest)

    @torch.no_grad()
    def capture(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """Return what is stored of a batch; the model runs no further than it must."""
        return capture([self], model, inputs)[0]


@torch.no_grad()
def capture(cuts: Sequence[Cut], model: nn.Module, inputs: Inputs) -> list[Inputs]:
    """Return what each cut stores of a batch, out of one pass."""
    found: list[Inputs] = [{} for _ in cuts]
    missing = sum(len(cut.stored) for cut in cuts)

    def watch(keeps: Inputs, calls: Iterator[Call]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal missing
            call = next(calls, None)
            if call is None:
                return
            for leaf, tensor in zip(call.leaves, tree_flatten(output)[0], strict=True):
                if isinstance(leaf, Leaf) and leaf.key:
                    keeps[leaf.key] = tensor[:, :1] if leaf.first else tensor
                    missing -= 1
            if not missing:
                raise _EnoughError

        return keep

    with ExitStack() as hooks:
        for cut, keeps in zip(cuts, found, strict=True):
            for name, calls in _by_module(cut.calls).items():
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_hook(watch(keeps, iter(calls))).remove)
        with suppress(_EnoughError):
            forward_whole(model, inputs)
    return found


def _nothing(leaf: Leaf, rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=leaf.dtype, device=device).expand(leaf.shape(rows, tokens))


def _by_module(calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(call)
    return found


@contextmanager
def returning(model: nn.Module, calls: Sequence[Call], output: Callable[[Call], Any]) -> Iterator[None]:
    """Let calls of modules return `output` instead of running, inside; calls beyond those run."""

    def stub(calls: Iterator[Call], run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls, None)
            return run(*args, **kwargs) if call is None else output(call)

        return forward

    with ExitStack() as undo:
        for name, these in _by_module(calls).items():
            module = model.get_submodule(name)
            # FSDP2's hooks around `forward` would gather weights that are not needed.
            replaced = "_call_impl" if isinstance(module, FSDPModule) else "forward"
            undo.callback(_restore, module, replaced, module.__dict__.get(replaced))
            module.__dict__[replaced] = stub(iter(these), getattr(module, replaced))
        yield


def _restore(module: nn.Module, replaced: str, own: Any) -> None:
    if own is None:
        del module.__dict__[replaced]
    else:
        module.__dict__[replaced] = own
