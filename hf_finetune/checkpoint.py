"""Crash-safe state: written aside, fsynced, manifest with hashes last, renamed; the newest valid one is used.

A checkpoint is a folder of safetensors and JSON; nothing in it is code. What no phase trains is not in it: the backbone
still holds it. Where processes hold shares of the tensors (FSDP2), each writes its own into a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_finetune.durable import sync_folder, write_text
from hf_finetune.errors import FinetuneError, UserError
from hf_finetune.parallel import fill
from hf_finetune.runfolder import os_error, writing

MANIFEST, STATE = "manifest.json", "state.json"
Tensors = Mapping[str, Tensor]
_SET_BY_RECIPE = frozenset({"params", "name", "lr", "weight_decay"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    state: dict[str, Any]

    def tensors(self, part: str) -> Tensors:
        """Return one part's tensors by name, whole ones; empty when the checkpoint has no such part."""
        file = self.path / f"{part}.safetensors"
        plain = load_file(file) if file.exists() else {}
        shares = sorted(self.path.glob(f"{part}-*-of-*.safetensors"))
        return ChainMap(plain, _Joined(shares)) if shares else plain  # type: ignore[arg-type]


class _Joined(Mapping[str, Tensor]):
    """The tensors of several files, each of which holds some rows of every one; read one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [safe_open(file, "pt") for file in files]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files[0].keys():  # noqa: SIM118 - it is no dict
            raise KeyError(name)
        return torch.cat([file.get_tensor(name) for file in self._files])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0].keys())

    def __len__(self) -> int:
        return len(self._files[0].keys())


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Return the folder into which the checkpoint of `step` is written, aside; leftovers of others are removed.

    Raises:
        FinetuneError: it cannot be made.
    """
    with writing(folder):
        # Not the run folder itself: when that is gone, its disk may be.
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".step-*"):
            _remove(leftover)
        aside = folder / f".{_free_name(folder, step)}"
        aside.mkdir()
    return aside


def save_shares(aside: Path, parts: Mapping[str, Tensors], *, process: int, processes: int) -> dict[str, Any]:
    """Write what this process alone holds of each part's tensors; return size and hash of each file by its name.

    Args:
        aside: as `begin_checkpoint` made it.
        parts: tensors by part and name: this process's rows, in the order of the processes.
        process: this one's number, from 0.
        processes: how many there are.

    Raises:
        FinetuneError: they cannot be written.
    """
    files = {
        part: aside / f"{part}-{process + 1:05d}-of-{processes:05d}.safetensors"
        for part in parts
        if parts[part]
    }
    with writing(aside):
        for part, file in files.items():
            _save_tensors(file, parts[part])
        return {file.name: _facts(file) for file in files.values()}


def save_checkpoint(
    folder: Path,
    step: int,
    parts: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    keep: int,
    begun: Path | None = None,
    shares: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps done.
        parts: tensors by part (`model`, `optimizer`, …) and name.
        state: everything else, as JSON holds it.
        keep: how many stay.
        begun: what `begin_checkpoint` made, where other processes have written there.
        shares: size and hash of the files they wrote.

    Raises:
        FinetuneError: it cannot be written; earlier checkpoints are as they were.
    """
    aside = begun or begin_checkpoint(folder, step)
    final = folder / aside.name.removeprefix(".")
    with writing(folder):
        try:
            written = dict(shares or {})
            for part, tensors in parts.items():
                if tensors:
                    _save_tensors(aside / f"{part}.safetensors", tensors)
            write_text(aside / STATE, json.dumps(state))
            written |= {
                file.name: _facts(file) for file in sorted(aside.iterdir()) if file.name not in written
            }
            write_text(aside / MANIFEST, json.dumps({"step": step, "files": written}))
            sync_folder(aside)
            aside.rename(final)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # Beside the older ones, what goes is another state of this step, and newer ones: those were found damaged
        # when the run was resumed from before them.
        saved = _newest_first(folder)
        older = [path for path in saved if path.name < f"step-{step:08d}"]
        for path in saved:
            if path != final and path not in older[: keep - 1]:
                _remove(path)
    return final


def _free_name(folder: Path, step: int) -> str:
    name = f"step-{step:08d}"
    while (
        folder / name
    ).exists():  # of this very step there is one already: it stays until the new one is whole
        name += "+"
    return name


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of `folder`, and why each newer one was rejected."""
    rejected: list[str] = []
    for path in _newest_first(folder) if folder.is_dir() else []:
        fault = _fault(path)
        if fault is None:
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8"))), rejected
        rejected.append(f"{path.name}: {fault}")
    return None, rejected


def pack_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by `<parameter>//<key>` and a plan, as JSON holds it, of what goes where.

    Args:
        optimizer: the optimizer.
        names: of its parameters, in the order of its groups.

    Raises:
        FinetuneError: it keeps something that cannot be stored.
    """
    kind = type(optimizer).__name__
    tensors: dict[str, Tensor] = {}
    owners: dict[Tensor, str] = dict(zip(_parameters(optimizer), names, strict=True))
    if foreign := [key for key in optimizer.state if key not in owners]:
        raise FinetuneError(_not_storable(kind, str(foreign[0])))
    plan: dict[str, Any] = {
        "kind": kind,
        "groups": {group["name"]: _pack_group(optimizer, group, tensors) for group in optimizer.param_groups},
        "state": {
            (name := owners[parameter]): {
                key: _pack(value, f"{name}//{key}", tensors, kind) for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        },
        "own": {key: _pack(value, f"//{key}", tensors, kind) for key, value in optimizer.state_dict().items()
                if key not in ("state", "param_groups")},
    }  # fmt: skip
    return tensors, plan


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Tensors, plan: Mapping[str, Any]
) -> None:
    """Put back what `pack_optimizer` took, bit for bit and in each parameter's memory layout.

    Parameters that the optimizer does not hold, as after a change that was allowed, are passed over.

    Raises:
        UserError: the state is another optimizer's, or of parameters of other shapes.
    """
    kind = type(optimizer).__name__
    if plan["kind"] != kind:
        raise UserError(
            f"resume: the checkpoint holds the state of {plan['kind']}, the recipe asks for {kind}."
        )
    if plan["own"]:
        own = {key: _unpack(value, tensors, None) for key, value in plan["own"].items()}
        optimizer.load_state_dict(optimizer.state_dict() | own)
    for group in optimizer.param_groups:
        for key, value in plan["groups"].get(group["name"], {}).items():
            group[key] = _unpack(value, tensors, None)
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        if name in plan["state"]:
            optimizer.state[parameter] = {
                key: _unpack(value, tensors, parameter) for key, value in plan["state"][name].items()
            }


def model_tensors(model: nn.Module, trained: set[str] | frozenset[str]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: the parameters any phase trains, and every buffer."""
    return {name: p.detach() for name, p in model.named_parameters() if name in trained} | dict(
        model.named_buffers()
    )


@torch.no_grad()
def restore_model(model: nn.Module, tensors: Tensors) -> None:
    """Copy a checkpoint's tensors into the model, in place.

    Raises:
        UserError: the model has no such tensor, or one of another shape.
    """
    owned = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if name not in owned or owned[name].shape != tensor.shape:
            there = tuple(owned[name].shape) if name in owned else "not there"
            raise UserError(
                f"resume: the checkpoint is of another model: its {name} is {tuple(tensor.shape)}, here it is {there}. "
                "Start another run with another --output."
            )
    for name, tensor in tensors.items():
        fill(owned[name], tensor)


def random_state() -> dict[str, Any]:
    """Return the state of every generator of this process, as JSON holds it."""
    version, words, gauss = random.getstate()
    kind, array, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(array).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator of this process where `random_state` found it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, array, *rest = state["numpy"]
    np.random.set_state((kind, np.array(array, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _pack_group(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what an optimizer itself keeps in a group, such as a count of steps; the recipe says the rest."""
    own = {key: value for key, value in group.items() if key not in _SET_BY_RECIPE}
    moved = {
        k: v
        for k, v in own.items()
        if isinstance(v, Tensor) or k not in optimizer.defaults or v != optimizer.defaults[k]
    }
    kind = type(optimizer).__name__
    return {key: _pack(value, f"{group['name']}//{key}", tensors, kind) for key, value in moved.items()}


def _pack(value: Any, place: str, tensors: dict[str, Tensor], kind: str) -> Any:
    """Return `value` as JSON holds it, its tensors by name in `tensors`; containers say what they are."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place, "on_host": value.device.type == "cpu"}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{place}//{i}", tensors, kind) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if _is_plain(value):
        return value
    raise FinetuneError(_not_storable(kind, f"{place} ({type(value).__name__})"))


def _unpack(packed: Any, tensors: Tensors, parameter: nn.Parameter | None) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "tensor" not in packed:
        ((kind, items),) = packed.items()
        return (tuple if kind == "tuple" else list)(_unpack(item, tensors, parameter) for item in items)
    value = tensors[packed["tensor"]]
    if parameter is None:
        return value
    if value.shape == parameter.shape:
        # Fused kernels walk state and parameter side by side in memory: the layouts must agree.
        return fill(torch.empty_like(parameter, dtype=value.dtype), value)
    return value if packed["on_host"] else value.to(parameter.device)


def _not_storable(kind: str, what: str) -> str:
    return (
        f"optimizer {kind}: its state holds {what}, which a checkpoint cannot. Choose another optimizer.name, or "
        "training.checkpoint=null for a run that cannot be resumed."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _save_tensors(path: Path, tensors: Tensors) -> None:
    # safetensors refuses views that share their memory. What has its own is written from where it lies: a copy of an
    # optimizer's whole state would be the largest thing in memory.
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        storage = here.untyped_storage()
        if storage.nbytes() != here.nbytes or storage.data_ptr() in taken:
            here = here.clone()
        taken.add(storage.data_ptr())
        plain[name] = here
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise os_error(error, path) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None when it is whole."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its hash differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if STATE in files else f"{STATE} is missing"
