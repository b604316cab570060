"""Backbones in and out: load one for the data's labels, run it, save it in its own library's Hub layout.

transformers is imported when a backbone of it is loaded: a timm model needs none of its seconds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.layers import set_reentrant_ckpt
from torch import nn

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError, first_line
from hf_finetune.fetch import COMMIT
from hf_finetune.models import load_timm
from hf_finetune.models.anatomies import module_groups, output_layers, timm_anatomy, transformers_anatomy
from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.models.backbone import Backbone, ImageInput, LoadReport, Modality, TextInput
from hf_finetune.models.convert import labels_of, unpickled
from hf_finetune.models.forward import compute_in_fp32, forward
from hf_finetune.models.inputs import (
    load_processor,
    load_text_input,
    processor_input,
    resize_processor,
    timm_input,
)
from hf_finetune.models.layout import CONFIG
from hf_finetune.models.load_timm import Loading
from hf_finetune.models.source import Source, expected_modality, find_source
from hf_finetune.models.spec import BackboneSpec

__all__ = [
    "Backbone",
    "ImageInput",
    "LoadReport",
    "TextInput",
    "checkpoint_gradients",
    "expected_modality",
    "forward",
    "load_backbone",
    "module_groups",
    "save_backbone",
    "save_beside",
    "seeded",
]


def load_backbone(spec: BackboneSpec, labels: Labels, modality: Modality, *, seed: int) -> Backbone:
    """Return the backbone a spec names, with outputs for `labels`, on the CPU, in float32, in eval mode.

    What is newly initialised depends on `seed` alone; the global random state is left as it was. With `quantize` the
    linear layers of the blocks are in 8 or 4 bits.

    Raises:
        ModelError: it cannot be found, does not read `modality`, cannot be quantised, or the checkpoint fills too
            little of it.
    """
    pinned = COMMIT.fullmatch(spec.revision or "") or Path(spec.id).expanduser().is_dir()
    if spec.trust_remote_code and not pinned:
        raise ModelError(
            f"backbone '{spec.id}': trust_remote_code runs code from the repository, so name the version "
            "you have read: set `backbone.revision` to a commit, all 40 digits of it."
        )
    source = find_source(spec)
    with seeded(seed), TemporaryDirectory(prefix="hf-finetune-") as aside:
        if source.base is not None:
            source = _merged_into_base(spec, source, modality, Path(aside))
        elif source.pickle is not None:
            source = unpickled(spec, source, Path(aside))
        load = _load_timm if source.library == "timm" else _load_transformers
        backbone = load(spec, source, labels, modality)
    if spec.quantize is None:
        return backbone
    from hf_finetune.models.quantize import quantized

    return quantized(backbone, spec.quantize)


def save_backbone(backbone: Backbone, folder: Path, labels: Labels) -> None:
    """Write a backbone to `folder`, where its own library and `load_backbone` find it with equal outputs."""
    library, beside = _library(backbone)
    library.save(backbone.model, beside, folder, labels)


def save_beside(backbone: Backbone, folder: Path, labels: Labels) -> None:
    """Write what stands beside the weights: config.json with the labels, and the processor or tokenizer."""
    library, beside = _library(backbone)
    library.save_config(backbone.model, beside, folder, labels)


def _library(backbone: Backbone) -> tuple[Any, Any]:
    """Return the module that saves for a backbone's library, and what it saves beside the weights."""
    if backbone.library == "timm":
        return load_timm, backbone.input
    from hf_finetune.models import load_transformers

    beside = backbone.input.tokenizer if isinstance(backbone.input, TextInput) else backbone.processor
    return load_transformers, beside


def checkpoint_gradients(backbone: Backbone) -> None:
    """Let the model compute activations anew in the backward pass instead of keeping them: less memory, more time.

    Raises:
        ModelError: the architecture cannot.
    """
    model: Any = backbone.model
    try:
        # With torch's older, reentrant kind nothing would learn behind a frozen first layer.
        if backbone.library == "timm":
            set_reentrant_ckpt(False)
            model.set_grad_checkpointing(True)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except (AttributeError, AssertionError, ValueError, NotImplementedError):
        raise ModelError(
            f"training.gradient_checkpointing: {backbone.library}'s {backbone.source['architecture']} does not support "
            "it. Remove it; a smaller training.micro_batch_size saves memory too."
        ) from None


def _load_timm(spec: BackboneSpec, source: Source, labels: Labels, modality: Modality) -> Backbone:
    where = f"backbone '{spec.id}'"
    if modality != "image":
        raise ModelError(
            f"{where}: timm's '{source.architecture}' reads images, the task gives texts. {_OTHER_TASK}"
        )
    model, loading, keeps_outputs = load_timm.build(spec, source, labels)
    read = timm_input(where, model)
    outputs = _outputs(where, model, labels)
    new = _new(spec, model, loading)
    anatomy = timm_anatomy(model, outputs, new=new)
    report = _report(spec, source, model, anatomy, loading, kept_head=spec.pretrained and keeps_outputs)
    _start_outputs(spec, outputs, new)
    return Backbone(model.eval(), "timm", anatomy, read, report, source.as_dict())


def _load_transformers(spec: BackboneSpec, source: Source, labels: Labels, modality: Modality) -> Backbone:
    from hf_finetune.models import load_transformers

    where = f"backbone '{spec.id}'"
    expected = expected_modality(spec)
    if expected and expected != modality:
        raise ModelError(
            f"{where}: '{source.architecture}' reads {expected}s, the task gives {modality}s. {_OTHER_TASK}"
        )
    folder = source.readable
    assert folder is not None
    model, loading, keeps_outputs = load_transformers.build(spec, source, labels, modality)
    outputs = _outputs(where, model, labels)
    if spec.pretrained and not keeps_outputs:
        inside = {f"{path}.{name}" for path, layer in outputs.items() for name, _ in layer.named_parameters()}
        for layer in outputs.values():
            load_transformers.renew(model, layer)
        loading.mismatched = [name for name in loading.mismatched if name not in inside]
        loading.missing = [*loading.missing, *inside.difference(loading.missing)]
    processor = None
    read: ImageInput | TextInput
    if modality == "image":
        processor = load_processor(where, folder, trust_remote_code=spec.trust_remote_code)
        read = processor_input(where, processor, image_size=spec.options.get("image_size"))
        if "image_size" in spec.options:
            resize_processor(processor, read)
    else:
        read = load_text_input(where, folder, model, trust_remote_code=spec.trust_remote_code)
    new = _new(spec, model, loading)
    anatomy = transformers_anatomy(model, outputs, new=new, text=modality == "text")
    report = _report(spec, source, model, anatomy, loading, kept_head=spec.pretrained and keeps_outputs)
    _start_outputs(spec, outputs, new)
    return Backbone(model.eval(), "transformers", anatomy, read, report, source.as_dict(), processor)


def _merged_into_base(spec: BackboneSpec, source: Source, modality: Modality, folder: Path) -> Source:
    """Write the adapter `source`, merged into its base model, to `folder` as the plain network it stands for.

    Raises:
        ModelError: the base model cannot be had, or the adapter does not fit it or cannot be merged.
    """
    import peft

    assert source.base is not None
    where = f"backbone '{spec.id}'"
    labels = labels_of(where, source)
    try:
        base = load_backbone(source.base, labels, modality, seed=0)
    except ModelError as error:
        raise ModelError(
            f"{where}: it is an adapter, and its base model cannot be loaded. {str(error)[0].upper()}{str(error)[1:]}"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they speak of peft's own options
            shell: Any = peft.PeftModel.from_pretrained(base.model, str(source.folder), torch_device="cpu")
            model = shell.merge_and_unload()
    except Exception as error:
        raise ModelError(
            f"{where}: this adapter cannot be merged into its base model '{source.base.id}': "
            f"{first_line(error)}. Start from the base model, or from a run with "
            "`strategy.merge: true`."
        ) from error
    save_backbone(replace(base, model=model), folder, labels)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return replace(source, library=base.library, config=config, prepared=folder)


SMALL_STD = 0.02
"""Of the weights of a head that starts small."""
_OTHER_TASK = "Take a backbone for the task's kind of data, or the task for the backbone's."


def _new(spec: BackboneSpec, model: nn.Module, loading: Loading) -> frozenset[str]:
    """Return the tensors that start without pretrained values."""
    return frozenset(loading.missing + loading.mismatched if spec.pretrained else model.state_dict())


def _report(
    spec: BackboneSpec,
    source: Source,
    model: nn.Module,
    anatomy: Anatomy,
    loading: Loading,
    *,
    kept_head: bool,
) -> LoadReport:
    """Return the load report.

    Raises:
        ModelError: less than `min_loaded` of the backbone was filled.
    """
    tensors = list(model.state_dict())
    if not spec.pretrained:
        return LoadReport(0, (), (), tuple(tensors), (), 0.0, f"random weights, {source}", source.note)
    homes = module_groups(model, anatomy)
    parameters_of_head = anatomy.names_in({HEAD})

    def in_head(name: str) -> bool:
        return name in parameters_of_head or homes.get(name.rpartition(".")[0]) == HEAD

    absent_anywhere = [name for name in tensors if name in {*loading.missing, *loading.mismatched}]
    new = tuple(name for name in absent_anywhere if in_head(name) and name not in loading.mismatched)
    mismatched = tuple(name for name in absent_anywhere if name in loading.mismatched)
    missing = tuple(name for name in absent_anywhere if name not in {*new, *mismatched})
    absent = {*missing, *mismatched}
    backbone = [parameter for parameter in anatomy.parameters if parameter.group != HEAD]
    total = sum(parameter.size for parameter in backbone)
    filled = sum(parameter.size for parameter in backbone if parameter.name not in absent)
    share = filled / total if total else 1.0
    report = LoadReport(
        loaded=len(set(tensors) - absent - set(new)),
        missing=missing,
        mismatched=mismatched,
        new=new,
        unexpected=tuple(loading.unexpected),
        share=share,
        source=str(source),
        note=source.note,
        kept_head=kept_head,
    )
    if share < spec.min_loaded:
        raise ModelError(_too_little(spec, report))
    return report


def _too_little(spec: BackboneSpec, report: LoadReport) -> str:
    def some(label: str, names: tuple[str, ...]) -> str:
        if not names:
            return ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f" {label}: {', '.join(names[:3])}{more}."

    return (
        f"backbone '{spec.id}': the checkpoint fills {report.share:.1%} of the backbone's parameters, "
        f"at least {spec.min_loaded:.0%} is asked for."
        + some("Missing", report.missing)
        + some("Of another shape", report.mismatched)
        + some("In the checkpoint but not in the model", report.unexpected)
        + " Is it the checkpoint of this architecture, with these options? If so, lower "
        "`backbone.min_loaded`; to train from random weights set `backbone.pretrained: false`."
    )


def _outputs(where: str, model: nn.Module, labels: Labels) -> dict[str, nn.Module]:
    """Return the output layers by name; they compute in fp32 whatever the others do."""
    outputs = output_layers(where, model, labels.outputs)
    for layer in outputs.values():
        compute_in_fp32(layer)
    return outputs


def _start_outputs(spec: BackboneSpec, outputs: Mapping[str, nn.Module], new: frozenset[str]) -> None:
    """Start a new output layer at zero: all classes equally likely at first (BiT, Kolesnikov et al. 2020)."""
    if spec.head_init == "library":
        return
    with torch.no_grad():
        for path, layer in outputs.items():
            if f"{path}.weight" in new:
                for tensor in layer.parameters():
                    tensor.zero_()


@torch.no_grad()
def start_small(backbone: Backbone, seed: int) -> None:
    """Draw the weights of a new output layer with a standard deviation of 0.02, as BERT's and ViT's were.

    At a small rate a head that starts at zero stays near it for hundreds of steps, and the layers below it learn next
    to nothing from it meanwhile.
    """
    parameters = dict(backbone.model.named_parameters())
    with seeded(seed):
        for each in backbone.anatomy.parameters:
            if each.is_output and each.is_new and not each.is_bias:
                parameters[each.name].normal_(std=SMALL_STD)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, on the CPU; the random state outside is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
