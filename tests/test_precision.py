"""Which number format a run computes in, and what stays fp32 in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import runs
from hf_finetune import precision
from hf_finetune.errors import RecipeError
from hf_finetune.hub.reload import exact_logits
from hf_finetune.models.forward import forward, sample_inputs
from hf_finetune.models.load import Backbone
from hf_finetune.setup import prepare

CPU = torch.device("cpu")
MODELS = ["resnet", "vit", "bert", "vision-vit"]


def _backbone(name: str, **changes: object) -> Backbone:
    return prepare(runs.recipe(name, strategy="full", **changes), world_size=1, device=CPU).backbone


def _note_dtypes(seen: list, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    seen.append((inputs[0].dtype, output.dtype))


def _head(model: nn.Module) -> nn.Module:
    (layer,) = [module for module in model.modules() if len(module._forward_pre_hooks)]
    return layer


@pytest.mark.parametrize("name", MODELS)
def test_output_layer_computes_in_fp32_and_learns(name: str) -> None:
    backbone = _backbone(name)
    for model in (backbone.model, copy.deepcopy(backbone.model)):  # an average of the weights is a copy
        seen: list[tuple[torch.dtype, torch.dtype]] = []
        head = _head(model)
        head.register_forward_hook(partial(_note_dtypes, seen))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(model, sample_inputs(backbone, 2, CPU))
            assert torch.is_autocast_enabled("cpu"), "autocast goes on behind the layer"
        logits.sum().backward()
        assert logits.dtype == torch.float32
        assert seen == [(torch.float32, torch.float32)]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters())


def test_a_failure_inside_the_output_layer_leaves_autocast_as_it_was() -> None:
    backbone = _backbone("resnet")
    head = _head(backbone.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            head(torch.zeros(1, 3))
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capable", "gain", "alone", "expected", "why"),
    [
        (False, 9.0, True, "fp32", "no fast 16-bit format on this cpu"),
        (True, 2.0, True, "bf16", "this CPU has bf16 instructions; with this network bf16 ran at 2x fp32's speed"),
        (True, 0.5, True, "fp32", "this CPU has bf16 instructions, but with this network bf16 ran at 0.5x fp32's speed"),
        (True, 0.5, False, "bf16", "this CPU has bf16 instructions"),
    ],
)  # fmt: skip
def test_auto_is_what_this_network_is_fast_in(
    capable: bool, gain: float, alone: bool, expected: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: capable)
    monkeypatch.setattr(precision, "bf16_gain", lambda backbone, device: gain)
    found = precision.resolve_precision("auto", CPU, "recipe.yaml", None, alone=alone)  # type: ignore[arg-type]
    assert found == (expected, why)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_trying_both_formats_leaves_the_network_as_it_was(name: str) -> None:
    backbone = _backbone(name)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    random = torch.get_rng_state()
    assert precision.bf16_gain(backbone, CPU) > 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(RecipeError, match=r"tf32 is a format of NVIDIA GPUs from Ampere on\. Use fp32"):
        _backbone("resnet", training={"steps": 1, "precision": "tf32"})


@pytest.fixture
def _flags() -> Iterator[None]:
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.usefixtures("_flags")
def test_fp32_means_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("resnet")
    inputs = sample_inputs(backbone, 2, CPU)
    monkeypatch.setattr(precision, "Accelerator", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for asked, matmul, convolutions in (
        ("bf16", "high", True),
        ("fp32", "highest", False),
        ("tf32", "high", True),
    ):
        precision.accelerator_in(asked)  # type: ignore[arg-type]
        exact_logits(
            backbone.model, inputs
        )  # in fp32 whatever training computes in; it puts back what it found
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert found == (matmul, convolutions)


def test_a_run_in_bf16_ends_near_one_in_fp32(tmp_path: Path) -> None:
    losses = {}
    for each in ("fp32", "bf16"):
        training = {"steps": 4, "batch_size": 8, "precision": each, "reload_check": False}
        run = runs.run("resnet", tmp_path / each, strategy="full", training=training)
        losses[each] = [row["loss"] for row in run.rows if row.get("split") == "train"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]
