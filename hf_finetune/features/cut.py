"""Where a frozen prefix ends, and how the rest of a network runs without it.

The model's own forward runs as it is, so masks, positions, pooling and whatever an architecture does between its
modules stay its own affair. Only its frozen modules are not run: those whose outputs the rest needs return what was
stored, the others return NaN of the right shape, which nothing that matters may read. Which outputs the rest needs is
found by trial: NaN in an output that is needed reaches the logits. A cut is used only if it gives the whole model's
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_finetune.models.backbone import FEATURES
from hf_finetune.models.load import forward as forward_whole

Inputs = dict[str, Tensor]


class NoCutError(Exception):
    """The frozen prefix cannot be cut off; the text says why."""


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
        return self._forward(model, within, inputs)

    def _forward(self, model: Any, within: nn.Module, inputs: Inputs) -> Tensor:
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

        with _returning(within, self.calls, output):
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


@torch.no_grad()
def find_cut(
    model: nn.Module, learning: Collection[str], asleep: Collection[str], batches: Sequence[Inputs]
) -> Cut:
    """Return the cut above the frozen prefix of a model; the model is left as it was.

    Args:
        model: in any mode; `asleep` modules are in eval mode whenever it trains.
        learning: names of the parameters that learn.
        asleep: names of the frozen modules.
        batches: two batches of real samples of unlike size, and of unlike length where they are texts.

    Raises:
        NoCutError: there is no such prefix, or the rest does not run without it as it does with it.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        cut = _find(model, learning, asleep, batches)
        evaluated = cut.capture(model, batches[1])
        for name, module in model.named_modules():
            module.training = name not in asleep
        state = torch.get_rng_state()
        trained = cut.capture(model, batches[1])
        if not torch.equal(state, torch.get_rng_state()) or any(
            not torch.equal(evaluated[name], trained[name]) for name in evaluated
        ):
            raise NoCutError("its frozen layers compute something else while the others train")
        return cut
    except NoCutError:
        raise
    except Exception as error:  # hundreds of architectures: whatever one of them cannot do, it trains without
        raise NoCutError(f"it does not run in parts ({type(error).__name__}: {error})") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _find(
    model: nn.Module, learning: Collection[str], asleep: Collection[str], batches: Sequence[Inputs]
) -> Cut:
    run = _with_lively_outputs(model, learning)
    traces, logits = zip(*(_trace(model, run, learning, asleep, batch) for batch in batches), strict=True)
    small, large = traces
    if not small:
        raise NoCutError("nothing frozen runs before the first layer that learns")
    if [call.module for call in small] != [call.module for call in large]:
        raise NoCutError("its layers run in another order from batch to batch")
    places = [
        (at, n) for at, call in enumerate(large) for n, x in enumerate(call.leaves) if isinstance(x, Tensor)
    ]
    # What the rest of the network reads itself, not through another frozen module: as a rule the last output.
    needed = {place for place in places if place[0] == len(large) - 1}
    if not _finite(model, run, large, batches[1], set(places) - needed):
        needed = {place for place in places if not _finite(model, run, large, batches[1], {place})}
    elif len(needed) > 1:
        needed = {place for place in needed if not _finite(model, run, large, batches[1], {place})}
    # What follows from no features, such as positions, is computed each time: a module is skipped or run as a whole.
    live = {
        large[at].module for at, _ in needed
        if at and _runs_by_itself(model, run, large, batches[1], large[at].module, places)
    }  # fmt: skip
    calls = []
    for at, (one, other) in enumerate(zip(small, large, strict=True)):
        if one.module in live:
            continue
        leaves = [_leaf(*pair, batches) for pair in zip(one.leaves, other.leaves, strict=True)]
        keyed = [
            replace(leaf, key=f"{FEATURES}{at}.{n}.{one.module}") if (at, n) in needed else leaf
            for n, leaf in enumerate(leaves)
        ]
        calls.append(Call(one.module, one.structure, tuple(keyed)))
    pixels = batches[0].get("pixel_values")
    cut = Cut(tuple(calls), () if pixels is None else tuple(pixels.shape[1:]))
    if not cut.stored:
        raise NoCutError("nothing that depends on the sample passes its frozen layers")
    for leaf in cut.stored.values():
        late = [
            at for at, (kind, number) in enumerate(leaf.dims) if kind == "tokens" and (at, number) != (1, 0)
        ]
        if leaf.dims[0] != ("rows", 1) or late:
            raise NoCutError("what passes its frozen layers is not one entry for each sample")
    if all(len(leaf.dims) == 3 for leaf in cut.stored.values()):
        shorter = replace(cut, calls=tuple(_first_of_each(call) for call in cut.calls))
        if _agrees(shorter, model, run, batches, logits):
            return shorter
    if not _agrees(cut, model, run, batches, logits):
        raise NoCutError("the rest of the network reads more than its frozen layers return")
    return cut


def _trace(
    model: nn.Module, run: Any, learning: Collection[str], asleep: Collection[str], inputs: Inputs
) -> tuple[list[Call], Tensor]:
    """Return the outermost calls of frozen modules before anything that learns or moves, and the logits."""
    calls: list[Call] = []
    inside, reached = 0, False
    moves = {name.rpartition(".")[0] for name in learning}
    moves |= {name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and name not in asleep}
    around = {outer for name in moves for outer in _outer(name)}

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal inside
        inside += 1

    def reach(module: nn.Module, args: Any) -> None:
        nonlocal reached
        reached = True

    def leave(name: str) -> Callable[..., None]:
        def left(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal inside
            inside -= 1
            if inside or reached:
                return
            leaves, structure = tree_flatten(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            # Pooling belongs to the prefix wherever it stands: what is stored becomes smaller.
            pools = (
                bool(args)
                and isinstance(args[0], Tensor)
                and all(x.numel() < args[0].numel() for x in tensors)
            )
            if (name in asleep or pools) and tensors and all(x.is_floating_point() for x in tensors):
                calls.append(Call(name, structure, tuple(leaves)))

        return left

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            bare = next(module.parameters(), None) is None
            if name in moves:
                hooks.callback(module.register_forward_pre_hook(reach).remove)
            elif name not in around and (name in asleep or bare):
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave(name)).remove)
        logits = forward_whole(run, inputs)
    return calls, logits


def _with_lively_outputs(model: nn.Module, learning: Collection[str]) -> Any:
    """Return the model with random numbers where what learns is all zero: a new output layer would hide everything."""
    generator = torch.Generator().manual_seed(0)
    lively = {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in model.named_parameters()
        if name in learning and not p.any()
    }
    return lambda *args, **kwargs: functional_call(model, lively, args, kwargs)


def _finite(
    model: nn.Module,
    run: Any,
    calls: Sequence[Call],
    inputs: Inputs,
    blank: Collection[tuple[int, int]],
    live: str = "",
    seen: Callable[..., None] | None = None,
) -> bool:
    """Return whether no NaN reaches the logits when the outputs in `blank` are NaN and the others what they were."""
    numbers = {id(call): at for at, call in enumerate(calls)}

    def output(call: Call) -> Any:
        at = numbers[id(call)]
        leaves = [torch.full_like(x, torch.nan) if (at, n) in blank else x for n, x in enumerate(call.leaves)]
        return tree_unflatten(leaves, call.structure)

    with ExitStack() as stack:
        stack.enter_context(_returning(model, [call for call in calls if call.module != live], output))
        if seen:
            stack.callback(model.get_submodule(live).register_forward_hook(seen).remove)
        return bool(torch.isfinite(forward_whole(run, inputs)).all())


def _runs_by_itself(
    model: nn.Module,
    run: Any,
    calls: Sequence[Call],
    inputs: Inputs,
    name: str,
    places: Sequence[tuple[int, int]],
) -> bool:
    """Return whether a module computes its output from nothing that other frozen modules return."""
    outputs: list[Any] = []
    others = {(at, n) for at, n in places if calls[at].module != name}
    _finite(model, run, calls, inputs, others, name, lambda module, args, output: outputs.append(output))
    tensors = [x for output in outputs for x in tree_flatten(output)[0] if isinstance(x, Tensor)]
    return bool(tensors) and all(bool(torch.isfinite(x).all()) for x in tensors)


def _agrees(
    cut: Cut, model: nn.Module, run: Any, batches: Sequence[Inputs], logits: Sequence[Tensor]
) -> bool:
    """Return whether the rest of the model gives the whole model's logits, from features without padding."""
    for inputs, expected in zip(batches, logits, strict=True):
        features = cut.capture(model, inputs)
        for name, leaf in cut.stored.items():
            if leaf.ragged:
                kept = inputs["attention_mask"].to(leaf.dtype)
                features[name] = features[name] * kept.view(*kept.shape, *[1] * (len(leaf.dims) - 2))
        try:
            given = cut._forward(run, model, inputs | features)
        except Exception:  # as `find_cut`: of two cuts the smaller one may not run at all
            return False
        tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
        scale = float(expected.float().abs().max())
        if not torch.allclose(given.float(), expected.float(), rtol=tolerance, atol=tolerance * scale):
            return False
    return True


def _leaf(small: Any, large: Any, batches: Sequence[Inputs]) -> Any:
    """Return the shape of an output as a function of the batch, told from two batches; what is no tensor as it is."""
    if not isinstance(small, Tensor):
        if small != large:
            raise NoCutError("its frozen layers return something else for every batch")
        return small
    rows, tokens = ([next(iter(batch.values())).shape[at] for batch in batches] for at in (0, 1))
    dims: list[tuple[str, int]] = []
    for at, (one, other) in enumerate(zip(small.shape, large.shape, strict=True)):
        if at == 0 and one * rows[1] == other * rows[0] and one % rows[0] == 0:
            dims.append(("rows", one // rows[0]))
        elif one == other:
            dims.append(("is", one))
        elif one - tokens[0] == other - tokens[1] and "input_ids" in batches[0]:
            dims.append(("tokens", one - tokens[0]))
        else:
            raise NoCutError(
                f"its frozen layers return {tuple(small.shape)} here and {tuple(large.shape)} there"
            )
    return Leaf(tuple(dims), large.dtype)


def _first_of_each(call: Call) -> Call:
    leaves = [
        replace(leaf, first=True) if isinstance(leaf, Leaf) and leaf.key else leaf for leaf in call.leaves
    ]
    return replace(call, leaves=tuple(leaves))


def _nothing(leaf: Leaf, rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=leaf.dtype, device=device).expand(leaf.shape(rows, tokens))


def _by_module(calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(call)
    return found


@contextmanager
def _returning(model: nn.Module, calls: Sequence[Call], output: Callable[[Call], Any]) -> Iterator[None]:
    """Let calls of modules return `output` instead of running, inside; calls beyond those run."""

    def stub(calls: Iterator[Call], run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls, None)
            return run(*args, **kwargs) if call is None else output(call)

        return forward

    with ExitStack() as undo:
        for name, these in _by_module(calls).items():
            module = model.get_submodule(name)
            own = module.__dict__.get("forward")
            undo.callback(_restore, module, own)
            module.__dict__["forward"] = stub(iter(these), module.forward)
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _outer(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the whole model's "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name
