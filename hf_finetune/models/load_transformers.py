"""Backbones of transformers: build, load with an account of what was loaded, save in its Hub layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError, did_you_mean
from hf_finetune.models.backbone import Modality
from hf_finetune.models.layout import foreign_code
from hf_finetune.models.load_timm import PROBLEM_TYPES, Loading
from hf_finetune.models.source import Source, again
from hf_finetune.models.spec import BackboneSpec

_AUTO: dict[str, Any] = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
_REFUSED = {
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), "the data's labels decide"),
    **dict.fromkeys(("dtype", "torch_dtype"), "`training.precision` decides"),
}
"""Constructor option -> what settles it instead."""
_LOADING_OPTIONS = ("attn_implementation",)


def build(
    spec: BackboneSpec, source: Source, labels: Labels, modality: Modality
) -> tuple[Any, Loading, bool]:
    """Return the model with an output layer for `labels`, what was loaded, and whether that layer was kept.

    The checkpoint's output layer is kept only when it was trained on the same label names in the same order.

    Raises:
        ModelError: transformers cannot build it, or an option does not fit.
    """
    where = f"backbone '{spec.id}'"
    config, keeps_outputs = _config(where, spec, source, labels)
    auto = _AUTO[modality]
    remote = spec.trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto._model_mapping and not remote:
        raise ModelError(
            f"{where}: transformers has no {modality} classification model of type '{source.architecture}'. "
            f"Take another backbone.{_remote_hint(spec, source)}"
        )
    options = {key: value for key, value in spec.options.items() if key in _LOADING_OPTIONS}
    # Weights are kept in float32 whatever the checkpoint's type: lower precision is the loop's matter.
    options |= {"dtype": torch.float32, "trust_remote_code": spec.trust_remote_code}
    loading = Loading()
    try:
        with quiet():
            if not spec.pretrained:
                return auto.from_config(config, **options), loading, False
            model, info = auto.from_pretrained(
                source.readable,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                **options,
            )
    except SafetensorError as error:
        raise ModelError(f"{where}: its weights cannot be read ({error}). {again(source)}") from None
    # The constructors of hundreds of architectures fail in as many ways; options are why they do.
    except Exception as error:
        given = f" with options {spec.options}" if spec.options else ""
        raise ModelError(
            f"{where}: transformers cannot build '{source.architecture}'{given}: {_said(error)}"
        ) from error
    loading.missing = list(info["missing_keys"])
    loading.mismatched = [each[0] if isinstance(each, tuple) else each for each in info["mismatched_keys"]]
    loading.unexpected = sorted(info["unexpected_keys"])
    return model, loading, keeps_outputs


def renew(model: Any, layer: nn.Module) -> None:
    """Give a layer the library's own random start, as if no checkpoint had held it."""
    with torch.no_grad():
        for tensor in layer.parameters(recurse=False):
            tensor._is_hf_initialized = False  # type: ignore[attr-defined]
        model._init_weights(layer)


def save(model: Any, beside: Any, folder: Path, labels: Labels) -> None:
    """Write model, config and what is `beside` it (tokenizer or image processor) with `save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    _describe(model.config, labels)
    with quiet():
        model.save_pretrained(folder)
    beside.save_pretrained(folder)


def save_config(model: Any, beside: Any, folder: Path, labels: Labels) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _describe(model.config, labels)
    model.config.save_pretrained(folder)
    beside.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading report inside: our report says the same."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(where: str, spec: BackboneSpec, source: Source, labels: Labels) -> tuple[Any, bool]:
    """Return the config with the recipe's options and the data's labels, and whether it had these labels."""
    if spec.trust_remote_code and (elsewhere := foreign_code(source.readable)):
        raise ModelError(
            f"{where}: it runs code of another repository, {elsewhere}, which `revision` does not pin. Read that code, "
            "put it beside the model, and name the file alone in `auto_map`."
        )
    for key, decider in _REFUSED.items():
        if key in spec.options:
            raise ModelError(f"{where}: options.{key} is given, but {decider}. Remove it.")
    try:
        config = AutoConfig.from_pretrained(source.readable, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        if hint := _remote_hint(spec, source):
            raise ModelError(
                f"{where}: '{source.architecture}' is not part of transformers.{hint}"
            ) from error
        raise ModelError(f"{where}: transformers cannot read its config.json: {_said(error)}") from error
    for key, value in spec.options.items():
        if key in _LOADING_OPTIONS:
            continue
        if not hasattr(config, key):
            known = [*config.to_dict(), *_LOADING_OPTIONS]
            raise ModelError(
                f"{where}: options.{key}: '{source.architecture}' has no such setting."
                f"{did_you_mean(key, known)}"
            )
        try:
            setattr(config, key, value)
        except Exception as error:
            raise ModelError(f"{where}: options.{key}: {value!r} does not do. {_said(error)}") from error
    stored = tuple(config.id2label[index] for index in sorted(config.id2label or {}))
    kind = source.config.get("problem_type")
    _describe(config, labels)
    same = "id2label" in source.config and stored == labels.names and kind in (None, config.problem_type)
    return config, spec.keep_head and same


def _describe(config: Any, labels: Labels) -> None:
    config.id2label = labels.id2label()
    config.label2id = labels.label2id()
    config.problem_type = PROBLEM_TYPES[labels.kind]


def _remote_hint(spec: BackboneSpec, source: Source) -> str:
    if not source.config.get("auto_map") or spec.trust_remote_code:
        return ""
    return " It brings code of its own: read it, then set `backbone.trust_remote_code: true` and `revision`."


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{' '.join(line.strip() for line in lines[:3]).rstrip('.')}."
        if lines
        else f"{type(error).__name__}."
    )
