"""Backbones in 8 and 4 bits: what learns on them, what is saved, and that it is what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import runs
import tiny
from hf_finetune.checkpoint import find_checkpoint
from hf_finetune.data.labels import Labels
from hf_finetune.errors import Interrupted, ModelError
from hf_finetune.explain import explain_recipe
from hf_finetune.inference import evaluate_model, load_trained
from hf_finetune.models.adapter_files import load_adapter, save_adapter
from hf_finetune.models.adapters import add_adapters
from hf_finetune.models.load import Backbone, forward, load_backbone
from hf_finetune.models.quantize import check_device
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.runfolder import load_run
from hf_finetune.strategies.methods import METHODS, AdapterSpec
from hf_finetune.train import finetune

pytest.importorskip("bitsandbytes")

LABELS = Labels("single", ("a", "b", "c"))
MODALITY = {"bert": "text", "vit": "image"}
KINDS = ("4bit", "8bit")


def base(family: str, kind: str | None, *, seed: int = 0) -> Backbone:
    spec = BackboneSpec(id=runs.backbone(family), quantize=kind)  # type: ignore[arg-type]
    return load_backbone(spec, LABELS, MODALITY[family], seed=seed)  # type: ignore[arg-type]


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return forward(model.eval(), tiny.batch(MODALITY[family]))


def quantised(family: str, kind: str) -> dict[str, Any]:
    return {"id": runs.backbone(family), "quantize": kind}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODALITY)
def test_the_blocks_are_quantised_and_nothing_else(family: str, kind: str) -> None:
    plain, backbone = base(family, None), base(family, kind)
    whole = {p.name: p for p in plain.anatomy.parameters}
    for parameter in backbone.anatomy.parameters:
        there = backbone.model.get_parameter(parameter.name)
        assert parameter.shape == whole[parameter.name].shape, "explain and the shares count what is meant"
        assert parameter.is_fixed == (not there.is_floating_point())
        inside = parameter.group.startswith("block.") and len(parameter.shape) > 1
        assert parameter.is_fixed == inside, parameter.name
        if not parameter.is_fixed:
            assert torch.equal(there, plain.model.get_parameter(parameter.name))
            assert there.dtype == torch.float32
    facts = backbone.source["quantize"]
    assert facts["layers"] == sum(p.is_fixed for p in backbone.anatomy.parameters)
    assert facts["bytes"][1] < 0.55 * facts["bytes"][0]
    apart = (logits(backbone.model, family) - logits(plain.model, family)).abs().max()
    assert apart == 0, "a head of zeros"
    again = base(family, kind, seed=5)
    assert runs.same(backbone.model.state_dict(), again.model.state_dict()), "the same bits each time"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_trained(method: str, kind: str, tmp_path: Path) -> None:
    if kind not in METHODS[method].on:
        pytest.skip("refused by a check of the recipe")
    torch.manual_seed(0)  # of the head below and of dropout: how far rounding carries depends on them
    backbone = add_adapters(base("bert", kind), AdapterSpec(method=method), seed=0, total_steps=8)
    adapter = backbone.adapter
    assert adapter is not None
    learning = {p.name for p in backbone.anatomy.trainable if p.is_adapter or p.group == "head"}
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(name in learning)
            if name == "classifier.weight":
                parameter.normal_()
    start = logits(backbone.model, "bert")
    optimizer = torch.optim.AdamW([p for p in backbone.model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        found = forward(backbone.model.train(), tiny.batch("text"))
        (torch.nn.functional.cross_entropy(found, torch.arange(3)) + adapter.penalty()).backward()
        optimizer.step()
        adapter.after_step(step + 1)
        optimizer.zero_grad()
    trained = logits(backbone.model, "bert")
    assert not torch.allclose(trained, start, atol=1e-3)
    save_adapter(backbone, tmp_path, LABELS)
    again = load_adapter(base("bert", kind, seed=9), tmp_path)
    assert torch.allclose(logits(again.model, "bert"), trained, rtol=1e-6, atol=1e-6)
    on_whole = load_adapter(base("bert", None, seed=9), tmp_path)
    assert (logits(on_whole.model, "bert") - trained).abs().max() < 0.1, "it fits the base model in full, too"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_peft_alone_give_the_same_logits(kind: str, tmp_path: Path) -> None:
    run = runs.run("bert", tmp_path / "run", strategy="lora", backbone=quantised("bert", kind))
    facts = run.status["backbone"]["quantize"]
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(
        runs.backbone("bert"),
        num_labels=2,
        quantization_config=transformers.BitsAndBytesConfig(**facts["config"]),
    )
    model = peft.PeftModel.from_pretrained(whole, str(run.model_folder))
    card = (run.model_folder / "README.md").read_text(encoding="utf-8")
    assert f"base model in {kind}" in card
    assert f"quantization_config=BitsAndBytesConfig(load_in_{kind}=True" in card
    ours = load_trained(str(run.path)).backbone.model
    assert torch.allclose(logits(model, "bert"), logits(ours, "bert"), rtol=1e-6, atol=1e-6)
    assert logits(ours, "bert").abs().max() > 0


RUNS = [
    ("bert", "4bit", {"strategy": "lora", "training": {"ema": {"decay": 0.5}}}),
    ("bert", "8bit", {"strategy": "lora", "training": {"precision": "bf16"}}),
    ("vit", "8bit", {"strategy": {"name": "ia3", "probe": "50%"}}),
    ("vit", "4bit", {"strategy": "lora_plus", "training": {"precision": "bf16", "gradient_checkpointing": True}}),
    ("vit", "4bit", {"strategy": "frozen"}),
    ("bert", "4bit", {"strategy": "bitfit"}),
    ("vit", "4bit", {"strategy": {"name": "dora", "merge": True}}),
    ("bert", "4bit", {"strategy": {"name": "adalora", "merge": True}}),
    ("bert", "4bit", {"strategy": {"name": "lora", "targets": "attention", "merge": True}}),
    ("vit", "4bit", {"strategy": {"adapter": "lora", "phases": [{"train": ["head", "norms"], "for": "50%"},
                                                                {"train": ["adapters", "head"]}]}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    RUNS,
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else value,
)
def test_what_was_measured_is_what_is_kept(family: str, kind: str, changes: Any, tmp_path: Path) -> None:
    run = runs.run(family, tmp_path / "run", backbone=quantised(family, kind), **changes)
    assert run.status["status"] == "done"
    assert run.best is not None
    assert run.best["loss"] != pytest.approx(0.6931, abs=1e-4), "it learned"
    result = evaluate_model(str(run.path), [])
    assert result.loss == pytest.approx(run.best["loss"], abs=1e-5)
    strategy = changes["strategy"]
    merge = isinstance(strategy, dict) and strategy.get("merge")
    if merge or strategy in ("frozen", "bitfit"):
        whole = load_trained(str(run.path)).backbone
        assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
        assert not whole.report.missing


def test_a_run_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(name: str) -> Any:
        return runs.recipe(
            "bert", tmp_path / name, strategy="lora", backbone=quantised("bert", "4bit"),
            training={"steps": 6}, monitor={"evaluate": "2 steps", "metric": "loss"},
        )  # fmt: skip

    whole = finetune(recipe("whole"), quiet=True)
    for stop_at in (2, 5):
        with monkeypatch.context() as patch:
            counted = iter(range(1 if stop_at == 2 else 3, 9))
            patch.setattr(
                "hf_finetune.train.asked_to_stop",
                lambda *_, stop_at=stop_at, counted=counted: "stop" if next(counted) == stop_at else None,
            )
            with pytest.raises(Interrupted):
                finetune(recipe("torn"), quiet=True, resume=True)
        state = find_checkpoint(tmp_path / "torn" / "checkpoints")[0]
        assert state is not None
        assert {t.dtype for t in state.tensors("model").values()} <= {torch.float32, torch.int64}
        assert not any("base_layer.weight" in name for name in state.tensors("model"))
    torn = finetune(recipe("torn"), quiet=True, resume=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))
    assert [row["loss"] for row in whole.rows] == [row["loss"] for row in load_run(torn.path).rows]


def test_explain_says_what_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_recipe(runs.recipe("vit", strategy="lora", backbone=quantised("vit", "4bit")), tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 linear layers of the blocks in 4bit: the weights take 0.05374 MB instead of 0.1293 MB" in shown
    assert "blocks.*.attn.qkv linear 96 x 32 2" in shown


# What cannot be


def test_a_backbone_without_linear_layers_in_its_blocks(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        runs.run("resnet", tmp_path / "run", strategy="lora", backbone=quantised("resnet", "4bit"))
    assert str(caught.value) == (
        "backbone.quantize: resnet10t has no pretrained linear layers in its blocks, and others are not quantised. "
        "Remove backbone.quantize, or take a transformer."
    )
    assert not (tmp_path / "run").exists()


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else there(name)
    )
    with pytest.raises(ModelError) as caught:
        runs.run("vit", tmp_path / "run", strategy="lora", backbone=quantised("vit", "8bit"))
    assert str(caught.value) == (
        "backbone.quantize: 8bit needs bitsandbytes, which is not installed. Install it with "
        "`pip install 'hf_finetune[quantize]'`, or remove backbone.quantize."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_hardware_that_cannot(kind: Any) -> None:
    with pytest.raises(
        ModelError, match=rf"cannot compute in {kind} on meta with torch .* Remove backbone.quantize"
    ):
        check_device(kind, torch.device("meta"))
    check_device(kind, torch.device("cpu"))
