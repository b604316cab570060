"""The reload gate: before a run is done, a fresh process must get the trained model's logits out of `model/`.

The logits to meet are taken in memory, when the model is written, and not read back from the disk. Both sides compute
in float32, so the tolerance is tight enough to tell a wrong or rounded tensor from the rounding of another kernel.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_finetune.data.columns import column_values
from hf_finetune.data.loaders import EvalSet, collate
from hf_finetune.errors import TrainingError
from hf_finetune.evaluation import to_device
from hf_finetune.hub import fresh
from hf_finetune.models.load import ImageInput, TextInput, forward
from hf_finetune.runfolder import writing

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_finetune.setup import Setup

SAMPLES = 16
EXPECTED = ".expected.safetensors"
"""In the run folder: the logits that the kept model gave in memory."""
TOLERANCE = {"cpu": 2e-5, "elsewhere": 1e-4}
"""Largest difference of logits allowed, as a share of the largest logit, by where the model was trained.

Rounding to float32 (6e-8) adds up over layers and sums, in another order on another kernel: measured on CPUs, 3e-7 on
the tests' tiny networks, 1.4e-6 on MobileNetV2. A GPU's kernels differ more from the CPU's, which the fresh process
computes on; how much has not been measured. A tensor rounded to bfloat16 is off by 4e-3."""
FLOOR = 1e-6
"""Difference of logits always allowed: of a model whose logits are all near zero."""
LEVELS = {"timm": 0.02, "transformers": 1.0}
"""Mean difference allowed, in steps of 8-bit colour, between the pixels the run saw and those the library makes.

timm resizes as we do; transformers' processors resize with other code, which rounds some pixels to the next step."""
RAW_SHARE = 0.1
"""Difference allowed, as a share of the largest logit, where pixels differ within `LEVELS`."""


@dataclass(frozen=True)
class Samples:
    """Validation samples as a model reads them, and as they were given."""

    inputs: dict[str, Tensor]
    rows: Dataset
    max_length: int | None
    """Tokens that texts are cut at."""

    @property
    def digest(self) -> str:
        """A hash of the inputs."""
        found = hashlib.sha256()
        for name in sorted(self.inputs):
            found.update(name.encode() + self.inputs[name].numpy().tobytes())
        return found.hexdigest()


def samples_of(setup: Setup) -> Samples:
    """Return up to `SAMPLES` validation samples, spread over the split."""
    rows = setup.splits.validation
    count = min(SAMPLES, len(rows))
    chosen = rows.select([index * len(rows) // count for index in range(count)])
    read = setup.backbone.input
    data = EvalSet(chosen, setup.splits.labels, read, max_length=setup.recipe.data.max_length)
    tokenizer = read.tokenizer if isinstance(read, TextInput) else None
    inputs = collate([data[index] for index in range(count)], tokenizer=tokenizer)["inputs"]
    return Samples(inputs, chosen, data.tokens.max_length if data.tokens else None)


def left_out(setup: Setup) -> str | None:
    """Return why this run's model is not compared, None if it is."""
    if not setup.recipe.training.reload_check:
        return "training.reload_check is false"
    if not all(parameter.is_floating_point() for parameter in setup.backbone.model.parameters()):
        return "the base model's weights are quantised, which have no exact float32 logits"
    return None


def modules(setup: Setup) -> tuple[str, ...]:
    """Return what a fresh process imports to load this run's model, its architecture's own modules included."""
    backbone = setup.backbone
    read = backbone.processor or getattr(backbone.input, "tokenizer", None)
    found = [type(part).__module__ for part in (backbone.model, read) if part is not None]
    auto = [
        "modeling_auto",
        "tokenization_auto" if isinstance(backbone.input, TextInput) else "image_processing_auto",
    ]
    if backbone.library == "timm":
        found += ["timm.data"]
    else:
        found += [f"transformers.models.auto.{name}" for name in auto]
    if backbone.adapter and not backbone.adapter.spec.merge:
        found += ["peft"]
    return tuple(name for name in found if name.split(".")[0] in ("timm", "transformers", "peft"))


def write_expected(run: Path, model: nn.Module, samples: Samples) -> None:
    """Keep the logits of `model`, as it is in memory, in the folder of a run.

    Raises:
        FinetuneError: they cannot be written.
    """
    device = next(model.parameters()).device
    logits = exact_logits(model, samples.inputs)
    about = {"samples": samples.digest, "device": "cpu" if device.type == "cpu" else "elsewhere"}
    with writing(run):
        aside = run / f"{EXPECTED}.tmp"
        save_file({"logits": logits}, aside, metadata=about)
        os.replace(aside, run / EXPECTED)


@torch.no_grad()
def exact_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits in float32, whatever it was trained in; the model is left as it was."""
    was_training, convolutions = model.training, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model.eval()
    try:
        logits = forward(model, to_device(inputs, next(model.parameters()).device))
    finally:
        model.train(was_training)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
    return logits.float().cpu().contiguous()


def check_reload(
    run: Path, setup: Setup, samples: Samples, *, on_wait: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare the model folder of `run` with what the model answered in memory; return what run.json says of it.

    Args:
        samples: as `samples_of` gives them.
        on_wait: called while the fresh process works; may raise.

    Raises:
        TrainingError: the folder cannot be loaded by its own library, or the model in it is another one.
    """
    try:
        with safe_open(run / EXPECTED, "pt") as file:
            expected, about = file.get_tensor("logits"), file.metadata()
    except (OSError, SafetensorError):
        return {"compared": False, "why": "the logits that the kept model gave in memory are not known"}
    if about["samples"] != samples.digest:
        return {"compared": False, "why": "the validation samples are not those of the model that was kept"}
    folder = run / "model"
    with tempfile.TemporaryDirectory(prefix="hf-finetune-") as place:
        _lay_out(samples, Path(place))
        request = {
            "folder": str(folder.resolve()), "task": setup.recipe.task, "place": place,
            "max_length": samples.max_length, "remote_code": setup.recipe.backbone.trust_remote_code,
            "threads": torch.get_num_threads(), "base": _base_folder(setup),
        }  # fmt: skip
        answer = fresh.ask(request, on_wait=on_wait)
        found = {} if "error" in answer else load_file(Path(place) / "answer.safetensors")
    if "error" in answer:
        raise TrainingError(f"{folder} cannot be loaded in a fresh process: {answer['error']}. {_REMEDY}")

    scale = float(expected.abs().max())
    tolerance = max(FLOOR, scale * TOLERANCE[about["device"]])
    levels = _levels(setup, samples, found)
    # Where another resize rounds pixels otherwise, so do logits.
    raw_tolerance = tolerance if not levels or levels <= LEVELS["timm"] else max(tolerance, RAW_SHARE * scale)
    result = {
        "compared": True,
        "samples": len(expected),
        "max_difference": _difference(expected, found["ready"]),
        "tolerance": tolerance,
        "raw_max_difference": _difference(expected, found["raw"]),
        "raw_tolerance": raw_tolerance,
        "pixel_difference": levels,
        **{key: answer[key] for key in ("library", "versions", "seconds")},
    }
    if faults := list(_faults(setup, samples, result, answer["labels"], found)):
        raise TrainingError(
            f"{folder}, loaded by {answer['library']} {answer['versions'][answer['library']]} in a fresh process, is "
            f"not the model that was trained: {'; '.join(faults)}. {_REMEDY}"
        )
    return result


def _base_folder(setup: Setup) -> str | None:
    """Return where the base model lies; None for one of the Hub, which its id and commit name."""
    source = setup.backbone.source
    return str(Path(source["folder"]).resolve()) if source["folder"] and source["commit"] is None else None


_REMEDY = (
    "Everything is kept. Once the cause is gone, `--resume` compares again; "
    "training.reload_check=false leaves the comparison out."
)


def _faults(
    setup: Setup, samples: Samples, result: dict[str, Any], labels: list[str], found: dict[str, Tensor]
) -> Iterator[str]:
    """Yield what differs, and where to look."""
    adapter = setup.backbone.adapter
    weights = "adapter_model.safetensors" if adapter and not adapter.spec.merge else "model.safetensors"
    names = list(setup.splits.labels.names)
    if labels != names:
        wrong = next(
            (i for i, pair in enumerate(zip(labels, names, strict=False)) if pair[0] != pair[1]), None
        )
        what = f"{len(labels)} labels instead of {len(names)}"
        if wrong is not None:
            what = f"label {wrong} is '{labels[wrong]}' instead of '{names[wrong]}'"
        yield f"{what} (look at config.json)"
    if not result["max_difference"] <= result["tolerance"]:
        yield (
            f"the logits of {result['samples']} validation samples differ by up to {result['max_difference']:.3g}, "
            f"{result['tolerance']:.1g} is allowed (look at the weights in {weights}: head, normalisation statistics, "
            "number format)"
        )
    inputs = _wrong_inputs(setup, samples, result["pixel_difference"], found)
    if inputs:
        yield inputs
    elif (
        not result["raw_max_difference"] <= result["raw_tolerance"]
        and result["max_difference"] <= result["tolerance"]
    ):
        yield (
            f"from raw samples its logits differ by up to {result['raw_max_difference']:.3g}, "
            f"{result['raw_tolerance']:.1g} is allowed (look at what the model makes of its inputs)"
        )


def _wrong_inputs(
    setup: Setup, samples: Samples, levels: float | None, found: dict[str, Tensor]
) -> str | None:
    """Return how the library's own preprocessing differs from the run's, None where it does not."""
    if isinstance(setup.backbone.input, ImageInput):
        library = setup.backbone.library
        if levels is not None and levels <= LEVELS[library]:
            return None
        file = "config.json" if library == "timm" else "preprocessor_config.json"
        what = f"by {levels:.3g} of 255 levels on average" if levels is not None else "in size"
        return f"its preprocessing gives other pixels, {what} (look at size, crop, mean and std in {file})"
    for name, tensor in samples.inputs.items():
        other = found.get(f"inputs.{name}")
        if other is None or not torch.equal(other, tensor):
            return f"its tokenizer gives other {name} (look at tokenizer.json and tokenizer_config.json)"
    return None


def _levels(setup: Setup, samples: Samples, found: dict[str, Tensor]) -> float | None:
    """Return the mean difference of pixels, of 255 levels, in the channel with most; None for texts or other sizes."""
    read = setup.backbone.input
    if not isinstance(read, ImageInput):
        return None
    ours, theirs = samples.inputs["pixel_values"], found["inputs.pixel_values"]
    if ours.shape != theirs.shape:
        return None
    by_channel = (ours - theirs).abs().mean(dim=(0, 2, 3)) * torch.tensor(read.std) * 255
    return float(by_channel.max())


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference; infinite for another shape, NaN for numbers that are none."""
    return float((expected - found).abs().max()) if expected.shape == found.shape else math.inf


def _lay_out(samples: Samples, place: Path) -> None:
    """Write what `reader.read` reads."""
    save_file(
        {name: tensor.contiguous() for name, tensor in samples.inputs.items()}, place / "inputs.safetensors"
    )
    if "image" in samples.rows.column_names:
        for index in range(len(samples.rows)):
            samples.rows[index]["image"].save(place / f"{index:02}.png", compress_level=1)  # read once
    else:
        names = [name for name in ("text", "text_pair") if name in samples.rows.column_names]
        texts = [column_values(samples.rows, name) for name in names]
        (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
