"""Crash-safe state: written aside, fsynced, manifest with hashes last, renamed; the newest valid one is used.

A checkpoint is a folder of safetensors and JSON; nothing in it is code. What no phase trains is not in it: the backbone
still holds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_finetune.runfolder import writing

MANIFEST, STATE = "manifest.json", "state.json"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    state: dict[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return one part's tensors by name; empty when the checkpoint has no such part."""
        file = self.path / f"{part}.safetensors"
        return load_file(file) if file.exists() else {}


def save_checkpoint(
    folder: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps done.
        parts: tensors by part (`model`, `optimizer`, …) and name.
        state: everything else, as JSON holds it.
        keep: how many stay.

    Raises:
        FinetuneError: it cannot be written; earlier checkpoints are as they were.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            for part, tensors in parts.items():
                if tensors:
                    _save_tensors(aside / f"{part}.safetensors", tensors)
            _write_text(aside / STATE, json.dumps(state))
            files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(aside.iterdir())}
            _write_text(aside / MANIFEST, json.dumps({"step": step, "files": files}))
            _sync_folder(aside)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            _sync_folder(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in _newest_first(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of `folder`, and why each newer one was rejected."""
    rejected = []
    for path in _newest_first(folder) if folder.is_dir() else []:
        fault = _fault(path)
        if fault is None:
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8"))), rejected
        rejected.append(f"{path.name}: {fault}")
    return None, rejected


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by `<parameter>//<key>` and plain values.

    Args:
        optimizer: the optimizer.
        names: of its parameters, in the order of its groups.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"groups": [], "state": {}}
    for group in optimizer.param_groups:
        # Some optimizers count steps in the group; what the recipe sets is written along and does no harm.
        plain["groups"].append({key: value for key, value in group.items() if _is_plain(value) and key != "params"})
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            for place, item in _flat(f"{name}//{key}", value):
                if isinstance(item, Tensor):
                    tensors[place] = item
                else:
                    plain["state"][place] = item
    return tensors, plain


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Tensors, plain: Mapping[str, Any]
) -> None:
    """Put back what `pack_optimizer` took, bit for bit and in each parameter's memory layout."""
    owners = dict(zip(names, _parameters(optimizer), strict=True))
    saved = {group["name"]: group for group in plain["groups"]}
    for group in optimizer.param_groups:
        for key, value in saved.get(group["name"], {}).items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    lists: dict[tuple[str, str], list[Any]] = {}
    for place, value in [*tensors.items(), *plain["state"].items()]:
        name, key, *index = place.split("//")
        parameter = owners[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # Fused kernels walk state and parameter side by side in memory: the layouts must agree.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif isinstance(value, Tensor) and value.ndim:
            value = value.to(parameter.device)
        if index:
            lists.setdefault((name, key), []).append(value)
        else:
            optimizer.state[parameter][key] = value
    for (name, key), values in lists.items():
        optimizer.state[owners[name]][key] = values


def model_tensors(model: nn.Module, trained: set[str] | frozenset[str]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: the parameters any phase trains, and every buffer."""
    return {name: p.detach() for name, p in model.named_parameters() if name in trained} | dict(model.named_buffers())


@torch.no_grad()
def restore_model(model: nn.Module, tensors: Tensors) -> None:
    """Copy a checkpoint's tensors into the model, in place."""
    owned = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        owned[name].copy_(tensor)


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


def _flat(place: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        return [(f"{place}//{i}", item) for i, item in enumerate(value)]
    return [(place, value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _save_tensors(path: Path, tensors: Tensors) -> None:
    # Each tensor gets memory of its own: safetensors refuses views that share theirs.
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


