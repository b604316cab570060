"""A trained model as one file for other runtimes: ONNX or torch.export, checked before it gets its name."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_finetune.data.loaders import EvalSet, collate
from hf_finetune.errors import FinetuneError, UserError, did_you_mean, first_line
from hf_finetune.models.backbone import Backbone, ImageInput, TextInput
from hf_finetune.models.load import forward, save_beside
from hf_finetune.runfolder import load_run, writing
from hf_finetune.trained import Trained, rows_of

FORMATS = {"onnx": "onnx/model.onnx", "torch": "model.pt2"}
"""Format -> its file: where optimum and transformers.js look for it."""
SAMPLES = 16
TOLERANCE = 1e-4
"""Largest difference of logits allowed, of logits up to 1; above that as a share of the largest."""
NEEDED = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Exported:
    """A file that was written and found right."""

    path: Path
    size: int
    """Bytes, of weights in a file beside it too."""
    max_difference: float
    """Of its logits from the model's."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs it was compared on."""
    usage: str
    """Code that gets logits out of it."""


def export_model(
    place: str,
    trained: Trained,
    *,
    form: str = "onnx",
    output: str | None = None,
    opset: int | None = None,
    options: Sequence[str] = (),
) -> Exported:
    """Write a trained model for another runtime, config and processor or tokenizer beside it, and print its use.

    Adapters are merged. Batch and sequence length are free. The file is compared with the model on validation samples,
    in batches and lengths other than those it was traced with, and only then gets its name.

    Args:
        place: run folder, model folder or Hub repository.
        trained: the model in it.
        form: `onnx` or `torch`.
        output: folder to write to; default `export/` in a run's folder, else `<name>-export` here.
        opset: of ONNX; None for what torch writes.
        options: `data=…` (samples to check with, where the run's own are gone) and `split=…`.

    Raises:
        UserError: no such data or format; or the format's packages are missing.
        FinetuneError: the model cannot be traced, or the file computes something else.
    """
    check_request(form, opset)
    model = trained.backbone.model.eval()
    samples = _samples(place, trained, options)
    plain = _merged(trained.backbone)
    folder = Path(output) if output else _default_folder(place)
    target = folder / FORMATS[form]
    with writing(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        with _quiet():
            example = samples.batch([0, samples.count - 1], extra=1)
            program = _trace(plain, example, trained.backbone)
            with writing(folder):
                WRITERS[form](program, list(example), _about(trained), aside / target.name, opset)
            difference, shapes = _compare(model, OPENERS[form](aside / target.name), samples, example, target)
        with writing(folder):
            for file in sorted(aside.iterdir()):
                file.replace(target.parent / file.name)
            size = sum(each.stat().st_size for each in target.parent.glob(f"{target.name}*"))
            save_beside(trained.backbone, folder, trained.labels)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    exported = Exported(target, size, difference, shapes, _usage(target, trained, folder, form))
    _say(exported)
    return exported


# ---- samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    data: EvalSet
    tokenizer: Any

    @property
    def count(self) -> int:
        return len(self.data)

    def batch(self, rows: Sequence[int], *, extra: int = 0) -> dict[str, Tensor]:
        """Return rows as the model reads them; texts with `extra` tokens of padding, as far as they may have them."""
        inputs = collate([self.data[row] for row in rows], tokenizer=self.tokenizer)["inputs"]
        if self.tokenizer is None:
            return inputs
        tokens = self.data.tokens
        assert tokens is not None
        longest = min(tokens.max_length, inputs["input_ids"].shape[1] + extra)
        return dict(self.tokenizer.pad(inputs, padding="max_length", max_length=longest, return_tensors="pt"))


def _samples(place: str, trained: Trained, options: Sequence[str]) -> _Samples:
    """Return some rows to trace and check with."""
    rows = rows_of(place, trained, options, labelled=False).rows
    count = min(SAMPLES, len(rows))
    rows = rows.select([index * len(rows) // count for index in range(count)])
    read = trained.backbone.input
    data = EvalSet(rows, trained.labels, read, max_length=trained.recipe.data.max_length)
    return _Samples(data, read.tokenizer if isinstance(read, TextInput) else None)


# ---- one network, traced -------------------------------------------------------------------------------------------


class _Images(nn.Module):
    """A model of either library as every runtime calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return forward(self.model, {"pixel_values": pixel_values})


class _Texts(_Images):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return forward(
            self.model, inputs | ({} if token_type_ids is None else {"token_type_ids": token_type_ids})
        )


def _merged(backbone: Backbone) -> nn.Module:
    """Return the network without adapters, in torch's own memory layout."""
    model = backbone.model
    if any("PeftModel" in type(m).__name__ or hasattr(m, "base_layer") for m in model.modules()):
        from hf_finetune.models.adapter_files import merged

        model = merged(backbone).model
    return model.eval()


def _trace(model: nn.Module, inputs: dict[str, Tensor], backbone: Backbone) -> torch.export.ExportedProgram:
    """Return the network as a graph with free batch size and, for texts, length.

    Raises:
        FinetuneError: torch.export cannot follow the architecture's code.
    """
    free: dict[int, Any] = {0: torch.export.Dim("batch_size", min=1)}
    network: nn.Module = _Images(model)
    if isinstance(backbone.input, TextInput):
        free[1] = torch.export.Dim("sequence_length", min=1, max=backbone.input.max_length)
        network = _Texts(model)
    failed: Exception | None = None
    # Some code, of masks above all, follows one kind of attention only, or proves too little about sizes to name them.
    for attention in (None, "eager"):
        if attention is not None:
            if not hasattr(model, "set_attn_implementation"):
                break
            model.set_attn_implementation(attention)  # type: ignore[operator]
        for sizes in (free, dict.fromkeys(free, torch.export.Dim.DYNAMIC)):
            try:
                with torch.no_grad():
                    return torch.export.export(
                        network.eval(), (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes)
                    )
            except Exception as error:  # of hundreds of architectures each fails in its own way
                failed = failed or error
    assert failed is not None, "something was tried"
    said = first_line(failed)
    raise FinetuneError(
        f"export: torch.export {torch.__version__} cannot trace {backbone.source['architecture']}: {said}"
    ) from failed


# ---- formats: a writer and an opener each --------------------------------------------------------------------------


def _write_onnx(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    about: dict[str, str],
    file: Path,
    opset: int | None,
) -> None:
    found = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(names),
        output_names=["logits"],
        opset_version=opset,
        verbose=False,
    )
    assert found is not None
    found.model.metadata_props.update(about)
    found.save(str(file))


def _write_torch(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    about: dict[str, str],
    file: Path,
    opset: int | None,
) -> None:
    torch.export.save(program, file, extra_files={"about.json": json.dumps({"inputs": list(names), **about})})


def _open_onnx(file: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


def _open_torch(file: Path) -> Any:
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


WRITERS = {"onnx": _write_onnx, "torch": _write_torch}
OPENERS = {"onnx": _open_onnx, "torch": _open_torch}


def _about(trained: Trained) -> dict[str, str]:
    """Return what a file says of itself."""
    read = trained.backbone.input
    found = {
        "task": trained.recipe.task,
        "labels": json.dumps(list(trained.labels.names), ensure_ascii=False),
        "label_kind": trained.labels.kind,
        "library": trained.backbone.library,
        "architecture": trained.backbone.source["architecture"],
    }
    if isinstance(read, ImageInput):
        keys = ("size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
        found["preprocessing"] = json.dumps({key: getattr(read, key) for key in keys})
    else:
        found["max_length"] = str(read.max_length)
    return found


# ---- the check, and what is said -----------------------------------------------------------------------------------


@torch.no_grad()
def _compare(
    model: nn.Module, run: Any, samples: _Samples, traced: dict[str, Tensor], target: Path
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Return how far the file's logits are from the model's, and the shapes it was tried on.

    Raises:
        FinetuneError: too far, or it does not take another batch size or length.
    """
    worst, shapes = 0.0, []
    for rows, extra in ((range(1), 0), (range(samples.count), 0), (range(samples.count)[-3:], 3)):
        inputs = samples.batch(rows, extra=extra)
        shapes.append(tuple(next(iter(inputs.values())).shape))
        expected = forward(model, inputs)
        try:
            found = run(inputs)
        except Exception as error:  # each runtime has its own
            said = str(error).strip().splitlines()[0]
            raise FinetuneError(
                f"export: {target.name} takes inputs of {_shape(traced)}, which it was traced with, but not of "
                f"{shapes[-1]}: {said}. It was not kept."
            ) from error
        scale = max(1.0, float(expected.abs().max()))
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE * scale:
            raise FinetuneError(
                f"export: the logits of {target.name} differ from the model's by {difference:.3g} on inputs of "
                f"{shapes[-1]}, {TOLERANCE * scale:.1g} is allowed. It was not kept."
            )
        worst = max(worst, difference)
    return worst, tuple(shapes)


def _shape(inputs: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(next(iter(inputs.values())).shape)


_READ = {
    "timm": """import json

import timm.data
from PIL import Image

config = json.load(open("{folder}/config.json", encoding="utf-8"))["pretrained_cfg"]
see = timm.data.create_transform(**timm.data.resolve_data_config({{}}, pretrained_cfg=config))
inputs = {{"pixel_values": see(Image.open("IMAGE").convert("RGB"))[None]}}""",
    "image": """from PIL import Image
from transformers import AutoImageProcessor

inputs = AutoImageProcessor.from_pretrained("{folder}")(Image.open("IMAGE").convert("RGB"), return_tensors="pt")""",
    "text": """from transformers import AutoTokenizer

inputs = AutoTokenizer.from_pretrained("{folder}")({texts}, truncation=True, return_tensors="pt")""",
}
_RUN = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{file}")
(logits,) = session.run(["logits"], {{each.name: inputs[each.name].numpy() for each in session.get_inputs()}})""",
    "torch": """import torch

logits = torch.export.load("{file}").module()(**inputs)""",
}


def _usage(exported: Path, trained: Trained, folder: Path, form: str) -> str:
    """Return the code that gets logits out of the file, with the libraries of its inputs."""
    backbone = trained.backbone
    kind = "text" if isinstance(backbone.input, TextInput) else "image"
    texts = '"TEXT"' if isinstance(trained.recipe.data.columns.text, str) else '"TEXT", "ANOTHER"'
    read = _READ["timm" if backbone.library == "timm" else kind]
    return f"{read}\n\n{_RUN[form]}".format(folder=folder.as_posix(), file=exported.as_posix(), texts=texts)


def _say(exported: Exported) -> None:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in exported.shapes)
    sys.stdout.write(
        f"{exported.path}: {exported.size / 1e6:.1f} MB; its logits differ from the model's by at most "
        f"{exported.max_difference:.2g} on inputs of {shapes}\n\n{exported.usage}\n"
    )


# ---- the request ---------------------------------------------------------------------------------------------------


def check_request(form: str, opset: int | None) -> None:
    """Refuse a format that is none, or whose packages are missing, before a model is loaded."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose from {', '.join(FORMATS)}.{did_you_mean(form, FORMATS)}")
    if form != "onnx":
        if opset is not None:
            raise UserError(f"--opset {opset}: only --format onnx has opsets. Leave it out.")
        return
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format onnx: {', '.join(missing)} not installed. Install what it needs with "
            '`pip install "hf_finetune[export]"`, or take --format torch, which needs nothing more.'
        )


def _default_folder(place: str) -> Path:
    if (Path(place) / "run.json").is_file():
        return load_run(place).path / "export"
    return Path(f"{Path(place).resolve().name if Path(place).is_dir() else place.rsplit('/', 1)[-1]}-export")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks, which speak of their own making, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
