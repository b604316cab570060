"""Where a frozen prefix ends, found by trial on real batches.

An output of a frozen module is needed by the rest if NaN in its place reaches the logits. A cut is used only if, with
NaN in place of all that it does not store, it gives the whole model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_finetune.features.cut import Call, Cut, Inputs, Leaf, returning
from hf_finetune.models.backbone import FEATURES
from hf_finetune.models.load import forward as forward_whole


class NoCutError(Exception):
    """The frozen prefix cannot be cut off; the text says why."""


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
        stack.enter_context(returning(model, [call for call in calls if call.module != live], output))
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
            given = cut.forward_within(run, model, inputs | features)
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


def _outer(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the whole model's "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name
