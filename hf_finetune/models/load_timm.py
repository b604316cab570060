"""Backbones of timm: build, load with an exact account of what was loaded, save in timm's Hub layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError
from hf_finetune.models.anatomies import output_layers
from hf_finetune.models.backbone import ImageInput
from hf_finetune.models.layout import CONFIG, WEIGHTS
from hf_finetune.models.source import Source, again
from hf_finetune.models.spec import BackboneSpec


@dataclass
class Loading:
    """What one loading of a checkpoint into a model did, by tensor name."""

    happened: bool = False
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def build(spec: BackboneSpec, source: Source, labels: Labels) -> tuple[nn.Module, Loading, bool]:
    """Return the model with an output layer for `labels`, what was loaded, and whether that layer was kept.

    The checkpoint's output layer is kept only when it was trained on the same label names in the same order.

    Raises:
        ModelError: timm cannot build it, or an option does not fit.
    """
    where = f"backbone '{spec.id}'"
    if "num_classes" in spec.options:
        raise ModelError(
            f"{where}: options.num_classes: {spec.options['num_classes']} is given, but the data's labels "
            f"decide it ({labels.outputs}). Remove it."
        )
    name = f"local-dir:{source.readable}" if source.readable else source.architecture
    keeps_outputs = spec.keep_head and knows(source.config, labels)
    loading = Loading()
    try:
        with _watched(loading, None if keeps_outputs else (where, labels.outputs)):
            model = timm.create_model(
                name, pretrained=spec.pretrained, **spec.options, num_classes=labels.outputs
            )
    except SafetensorError as error:
        raise ModelError(
            f"{where}: {source.readable}/{WEIGHTS} cannot be read ({error}). {again(source)}"
        ) from None
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        options = f" with options {spec.options}" if spec.options else ""
        raise ModelError(
            f"{where}: timm {timm.__version__} cannot build '{source.architecture}'{options}: {error}. "
            + (
                "Correct `backbone.options`."
                if spec.options
                else "Is it a newer architecture? `pip install -U timm`."
            )
        ) from None
    assert loading.happened or not spec.pretrained, "timm loads weights by the model's load_state_dict"
    return model, loading, keeps_outputs


def knows(config: dict[str, Any], labels: Labels) -> bool:
    """Return whether a timm config.json says that the outputs are these labels, of this kind."""
    return label_names(config) == labels.names and config.get("problem_type") in (
        None,
        PROBLEM_TYPES[labels.kind],
    )


def label_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the label names a timm config.json stores, in the order of the outputs."""
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(str(name) for name in names) if names else None


def save(model: nn.Module, read: ImageInput, folder: Path, labels: Labels) -> None:
    """Write config.json and model.safetensors as timm's `save_for_hf` does, from any device and layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_config(model, read, folder, labels)


def save_config(model: nn.Module, read: ImageInput, folder: Path, labels: Labels) -> None:
    """Write config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config_for_hf(
        model,
        str(folder / CONFIG),
        model_config={"label_names": list(labels.names), "problem_type": PROBLEM_TYPES[labels.kind]},
        data_config={
            "input_size": (3, *read.size),
            "mean": read.mean,
            "std": read.std,
            "crop_pct": read.crop_pct,
            "crop_mode": read.crop_mode,
            "interpolation": read.interpolation,
        },
    )
    # transformers' timm wrapper passes `num_classes` itself and fails on a second one; timm reads the root's.
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    for stale in ("label_names", "label_descriptions"):  # of the checkpoint we started from
        config["pretrained_cfg"].pop(stale, None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""Kind of labels -> what the Hub's configs call it."""


@contextmanager
def _watched(loading: Loading, fresh_outputs: tuple[str, int] | None) -> Iterator[None]:
    """Record what `load_state_dict` does inside, and keep it from failing: what does not fit is left out.

    With `fresh_outputs` (where, count) the output layer of `count` outputs is left out as well. timm has no
    other way to see a loading: its builder makes the model and loads it in one call.
    """
    original = nn.Module.load_state_dict

    def load(module: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if not hasattr(module, "get_classifier"):  # a part of a model
            return original(module, state_dict, strict=strict, assign=assign)
        given = dict(state_dict)
        if fresh_outputs:
            prefixes = tuple(f"{name}." for name in output_layers(fresh_outputs[0], module, fresh_outputs[1]))
            given = {name: tensor for name, tensor in given.items() if not name.startswith(prefixes)}
        own = module.state_dict()
        mismatched = {name for name in given if name in own and own[name].shape != given[name].shape}
        try:
            result = original(module, given, strict=False, assign=assign)
        except RuntimeError:
            # Some models resize while loading, so a shape that differs is a mismatch only when torch says so.
            given = {name: tensor for name, tensor in given.items() if name not in mismatched}
            result = original(module, given, strict=False, assign=assign)
        else:
            mismatched = set()
        loading.happened = True
        loading.mismatched[:] = sorted(mismatched)
        loading.missing[:] = [name for name in result.missing_keys if name not in mismatched]
        loading.unexpected[:] = list(result.unexpected_keys)
        return result

    nn.Module.load_state_dict = load  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]
