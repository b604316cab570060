"""Adapters: which layers they go to, what learns, and that what is saved is what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import runs
import tiny
from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError, RecipeError
from hf_finetune.explain import explain_recipe
from hf_finetune.inference import evaluate_model, load_trained, predict_inputs
from hf_finetune.models.adapter_files import load_adapter, merged, save_adapter
from hf_finetune.models.adapters import add_adapters
from hf_finetune.models.anatomy import HEAD
from hf_finetune.models.load import Backbone, forward, load_backbone, save_backbone
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.recipe import parse_recipe
from hf_finetune.setup import prepare
from hf_finetune.strategies import STRATEGIES
from hf_finetune.strategies.methods import METHODS, AdapterSpec

FAMILIES = {"resnet": "image", "vit": "image", "bert": "text"}
CASES = [(method, family) for method in METHODS for family in FAMILIES]
UNSUPPORTED = {("pissa", "resnet"), ("vera", "resnet")}
SUPPORTED = [case for case in CASES if case not in UNSUPPORTED]
EVERY_FAMILY = [
    *((f"timm {name}", "image") for name in tiny.TIMM),
    *((f"transformers {name}", "text") for name in tiny.TEXT),
    *((f"transformers vision-{name}", "image") for name in tiny.VISION),
]
HIDDEN = "transformers vision-mobilenetv2"
"""Reads attributes of its convolutions, which peft's wrapper has not."""
LABELS = Labels("single", ("a", "b", "c"))


@cache
def folder_of(name: str) -> Path:
    """Return the folder of a tiny backbone of `EVERY_FAMILY`."""
    library, _, family = name.partition(" ")
    folder = Path(runs._ROOT.name) / f"adapters-{library}-{family}"
    return (tiny.timm_folder if library == "timm" else tiny.transformers_folder)(folder, family)


def base(name: str, modality: str, *, seed: int = 0) -> Backbone:
    """Return a tiny backbone with a head for `LABELS`: of `FAMILIES`, or of `EVERY_FAMILY`."""
    place = str(folder_of(name)) if " " in name else runs.backbone(name)
    return load_backbone(BackboneSpec(id=place), LABELS, modality, seed=seed)  # type: ignore[arg-type]


def adapted(name: str, modality: str, *, total_steps: int = 8, **spec: Any) -> Backbone:
    return add_adapters(base(name, modality), AdapterSpec(**spec), seed=0, total_steps=total_steps)


def logits(backbone: Backbone, modality: str) -> torch.Tensor:
    with torch.no_grad():
        return forward(backbone.model.eval(), tiny.batch(modality))


def learn(
    backbone: Backbone, modality: str, *, steps: int = 8, names: set[str] | None = None
) -> torch.Tensor:
    """Train adapters and head (or `names`) for a few steps, statistics of BatchNorm included; return the logits."""
    assert backbone.adapter is not None
    names = names or {p.name for p in backbone.anatomy.trainable if p.is_adapter or p.group == HEAD}
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW([p for p in backbone.model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    for step in range(steps):
        found = forward(backbone.model.train(), tiny.batch(modality))
        loss = nn.functional.cross_entropy(found, torch.arange(3)) + backbone.adapter.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        backbone.adapter.after_step(step + 1)
    return logits(backbone, modality)


# Which layers


@pytest.mark.parametrize(("name", "modality"), [row for row in EVERY_FAMILY if row[0] != HIDDEN])
def test_lora_reaches_the_blocks_of_every_family_and_every_adapter_learns(name: str, modality: str) -> None:
    plain = logits(base(name, modality), modality)
    backbone = adapted(name, modality, method="lora")
    assert backbone.adapter is not None
    assert torch.allclose(logits(backbone, modality), plain, atol=1e-6), "LoRA starts as what the model was"
    with torch.no_grad():  # so that gradients reach what lies behind a head of zeros
        for p in backbone.anatomy.parameters:
            if p.group == HEAD and len(p.shape) > 1:
                backbone.model.get_parameter(p.name).normal_(std=0.1)
    before = {
        p.name: backbone.model.get_parameter(p.name).detach().clone() for p in backbone.anatomy.trainable
    }
    learn(backbone, modality, steps=2)
    after = dict(backbone.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {p.name for p in backbone.anatomy.parameters if p.is_adapter}
    # softmax does not see what a query or key projection alone adds to all scores
    assert {name for name in adapters - moved if "lora_B" in name} == set()
    assert moved <= {p.name for p in backbone.anatomy.parameters if p.is_adapter or p.group == HEAD}
    assert not any(target.group in ("stem", HEAD) for target in backbone.adapter.targets)


TARGETS = [
    ("timm vit", "image", "all", 8), ("timm vit", "image", "attention", 4), ("timm vit", "image", "mlp", 4),
    ("timm vit", "image", r"qkv|fc2", 4), ("timm vit", "image", r"blocks\.1\.", 4),
    ("timm swin", "image", "attention", 10), ("timm resnet", "image", "all", 12),
    ("timm swin", "image", "all-linear", 23), ("transformers bert", "text", "all", 12),
    ("transformers bert", "text", "attention", 8), ("transformers bert", "text", "mlp", 4),
    ("transformers distilbert", "text", "attention", 8), ("transformers deberta", "text", "mlp", 4),
    ("transformers modernbert", "text", "mlp", 4), ("transformers vision-vit", "image", "attention", 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "modality", "targets", "count"), TARGETS)
def test_targets(name: str, modality: str, targets: str, count: int) -> None:
    adapter = adapted(name, modality, method="lora", targets=targets).adapter
    assert adapter is not None
    assert len(adapter.targets) == count, [target.name for target in adapter.targets]


def test_layers_that_peft_would_break_are_left_out() -> None:
    left_out = adapted("timm mobilenetv2", "image", method="lora").adapter.left_out  # type: ignore[union-attr]
    assert set(left_out.values()) == {"depthwise: an adapter would be larger than the layer"}

    class Odd(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    backbone = base("timm resnet", "image")
    model: Any = backbone.model
    model.layer1[0].conv1 = nn.Conv2d(16, 8, 3, padding=2, dilation=2, bias=False)
    model.layer2[0].conv1 = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=4, bias=False)
    model.layer3[0].conv1 = Odd(16, 24, 3, padding=1, stride=2, bias=False)
    left_out = add_adapters(backbone, AdapterSpec(method="lora", r=6), seed=0, total_steps=4).adapter.left_out  # type: ignore[union-attr]
    assert left_out == {
        "layer1.0.conv1": "dilated, which peft's adapters are not",
        "layer2.0.conv1": "4 groups, rank 6",
        "layer3.0.conv1": "a layer with a forward of its own, which peft would bypass",
    }


def test_an_architecture_that_looks_into_its_layers_cannot_have_adapters() -> None:
    with pytest.raises(ModelError, match="reads its dilation, which peft hides") as caught:
        adapted(HIDDEN, "image", method="lora")
    assert str(caught.value).endswith("(timm's, transformers'), or other `targets`.")


def test_a_layer_whose_weight_is_read_but_not_called_is_left_out() -> None:
    model = timm.create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2
    )
    folder = Path(runs._ROOT.name) / "beit"
    timm.models.save_for_hf(
        model, folder, safe_serialization=True,
        model_args={"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
    )  # fmt: skip
    backbone = load_backbone(BackboneSpec(id=str(folder)), LABELS, "image", seed=0)
    adapter = add_adapters(backbone, AdapterSpec(method="lora"), seed=0, total_steps=4).adapter
    assert adapter is not None
    assert adapter.left_out == {
        f"blocks.{n}.attn.qkv": "its weight is read without calling the layer" for n in range(2)
    }


# What is saved


@pytest.mark.parametrize(("method", "family"), SUPPORTED)
def test_what_is_saved_is_what_was_trained(method: str, family: str, tmp_path: Path) -> None:
    modality = FAMILIES[family]
    plain = logits(base(family, modality), modality)
    backbone = adapted(family, modality, method=method)
    start = logits(backbone, modality)
    assert torch.allclose(start, plain, atol=1e-5), "every method starts as what the model was"
    trained = learn(backbone, modality)
    assert not torch.allclose(trained, start, atol=1e-3)
    save_adapter(backbone, tmp_path / "adapter", LABELS)
    again = load_adapter(base(family, modality, seed=9), tmp_path / "adapter")
    assert torch.allclose(logits(again, modality), trained, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(backbone, modality), trained), "saving changes nothing"
    save_backbone(merged(backbone), tmp_path / "merged", LABELS)
    whole = load_backbone(BackboneSpec(id=str(tmp_path / "merged")), LABELS, modality, seed=9)  # type: ignore[arg-type]
    assert not whole.report.new
    assert not whole.report.missing
    assert torch.allclose(logits(whole, modality), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(backbone, modality), trained), "merging changes nothing"


FRESH = {
    "timm": (
        "resnet",
        "base = timm.create_model(f'local-dir:{base}', pretrained=True, num_classes=3)\n"
        "model = PeftModel.from_pretrained(base, adapter).eval()\nfound = model(inputs['pixel_values'])",
    ),
    "timm vit": (
        "vit",
        "base = timm.create_model(f'local-dir:{base}', pretrained=True, num_classes=3)\n"
        "model = PeftModel.from_pretrained(base, adapter).eval()\nfound = model(inputs['pixel_values'])",
    ),
    "PeftModel": (
        "bert",
        "base = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)\n"
        "model = PeftModel.from_pretrained(base, adapter).eval()\nfound = model(**inputs).logits",
    ),
    "AutoPeftModel": (
        "bert",
        "model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=3).eval()\n"
        "found = model(**inputs).logits",
    ),
}  # fmt: skip


ALONE = """
import json, sys
import timm, torch, transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel

off = {}
for case, (base, adapter, code) in json.load(sys.stdin).items():
    inputs, expected = torch.load(adapter + "/expected.pt")
    with torch.no_grad():
        exec(code)
    off[case] = (found - expected).abs().max().item()
assert "hf_finetune" not in sys.modules
print(json.dumps(off))
"""


@pytest.fixture(scope="module")
def by_peft_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return by how much logits differ in a process that knows the libraries alone."""
    job = {}
    for case, (family, code) in FRESH.items():
        modality, folder = FAMILIES[family], tmp_path_factory.mktemp("adapter")
        backbone = adapted(family, modality, method="lora")
        everything = {
            p.name for p in backbone.anatomy.trainable if p.is_adapter or p.group in (HEAD, "block.1")
        }
        expected = learn(
            backbone, modality, names=everything
        )  # one block in full, BatchNorm statistics everywhere
        save_adapter(backbone, folder, LABELS)
        torch.save((tiny.batch(modality), expected), folder / "expected.pt")
        job[case] = (runs.backbone(family), str(folder), code)
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps(job), capture_output=True, text=True,
        cwd=tmp_path_factory.mktemp("alone"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", FRESH)
def test_peft_alone_loads_it(case: str, by_peft_alone: dict[str, float]) -> None:
    assert by_peft_alone[case] <= 1e-6


def test_the_file_holds_what_moved_and_no_more(tmp_path: Path) -> None:
    backbone = adapted("vit", "image", method="lora")
    learn(backbone, "image")
    save_adapter(backbone, tmp_path, LABELS)
    others = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name}
    assert others == {
        f"base_model.model.{layer}.{kind}" for layer in ("norm", "head") for kind in ("weight", "bias")
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    assert config["base_model_name_or_path"] == runs.backbone("vit")


def test_pissa_is_saved_for_the_base_model_as_it_was(tmp_path: Path) -> None:
    backbone = adapted("vit", "image", method="pissa", r=4, rank_pattern={"qkv": 2})
    learn(backbone, "image")
    save_adapter(backbone, tmp_path, LABELS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {"qkv": 4})
    assert config["init_lora_weights"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("base_layer" in name for name in tensors)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    backbone = adapted("vit", "image", method="lora")
    save_adapter(backbone, tmp_path, LABELS)
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_adapter(base("resnet", "image"), tmp_path)


# Runs


@pytest.mark.parametrize(("method", "family"), SUPPORTED)
def test_a_run_of_every_method(method: str, family: str, tmp_path: Path) -> None:
    run = runs.run(family, tmp_path / "run", strategy=method)
    assert (run.status["status"], run.status["why"]) == ("done", "all steps done")
    assert run.status["adapter"]["method"] == method
    assert run.status["parameters"]["trainable"] < run.status["parameters"]["total"]
    result = evaluate_model(str(run.path), [])
    assert result.loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]
    assert evaluate_model(str(run.model_folder), []).loss == pytest.approx(result.loss, abs=1e-7)
    assert "auto" not in run.recipe_path.read_text().replace("validation: auto", "").replace(
        "max_length: auto", ""
    )


ERRORS = {
    ("pissa", "resnet"): "pissa adapts no convolutions). Methods that can: lora, dora, rslora, lora_plus, "
    "adalora, ia3, oft, boft, loha, lokr.",
    ("vera", "resnet"): "vera adapts no convolutions). Methods that can: lora, dora, rslora, lora_plus, "
    "adalora, ia3, oft, boft, loha, lokr.",
}


@pytest.mark.parametrize(("method", "family"), sorted(UNSUPPORTED))
def test_a_method_that_cannot_says_which_can(method: str, family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        runs.run(family, tmp_path / "run", strategy=method)
    assert str(caught.value) == (
        f"strategy: {method} can adapt none of the 12 layers that targets 'all' finds in resnet10t "
        f"({ERRORS[method, family]}"
    )
    assert not (tmp_path / "run").exists(), "refused before anything was made"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"name": "peft", "method": "lorra"}, "has no adapters 'lorra'. Did you mean 'lora'?"),
    "option": (
        {"name": "lora", "options": {"lora_alhpa": 3}},
        "LORA has no option 'lora_alhpa'. Did you mean 'lora_alpha'?",
    ),
    "ours": ({"name": "lora", "options": {"target_modules": ["x"]}}, "LORA has no option 'target_modules'"),
    "regex": ({"name": "lora", "targets": "nothing"}, "'nothing' finds no layer in the blocks of"),
    "value": ({"name": "lora", "options": {"init_lora_weights": "wild"}}, "peft"),
    "no adapter": ({"phases": [{"train": ["adapters", "head"]}]}, "Add `adapter: lora` beside `phases`."),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    section, text = WRONG[case]
    with pytest.raises((RecipeError, ModelError)) as caught:
        runs.run("vit", tmp_path / "run", strategy=section)
    assert text in str(caught.value)


def test_keys_that_a_method_has_not_are_refused() -> None:
    for section in (
        {"name": "ia3", "r": 4},
        {"name": "vera", "alpha": 4.0},
        {"name": "lora", "targets": "("},
    ):
        with pytest.raises(RecipeError):
            parse_recipe({"strategy": section})
    for name in {*METHODS, "peft"}:
        assert parse_recipe({"strategy": name}).strategy.to_adapter() is not None, name
    assert set(METHODS) <= set(STRATEGIES)


def test_any_method_of_peft(tmp_path: Path) -> None:
    run = runs.run(
        "vit",
        tmp_path / "run",
        strategy={"name": "peft", "method": "hra", "r": 4, "options": {"apply_GS": True}},
    )
    assert run.status["adapter"]["peft_type"] == "HRA"
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]


def test_head_first_then_adapters_then_a_block(tmp_path: Path) -> None:
    phases = [
        {"train": "head", "for": "2 steps"},
        {"train": ["adapters", "head"], "for": "2 steps"},
        {"train": "last:2", "lr": "0.5x", "batch_norm": "train"},
    ]
    run = runs.run("resnet", tmp_path / "run", strategy={"phases": phases, "adapter": {"method": "lora", "r": 4}},
                   training={"steps": 6})  # fmt: skip
    assert run.status["phases"] == ["head", "adapters + head", "last:2"]
    carried = set(load_file(run.model_folder / "adapter_model.safetensors"))
    assert "base_model.model.layer4.0.conv1.base_layer.weight" in carried
    assert "base_model.model.layer4.0.bn1.running_mean" in carried
    assert "base_model.model.layer1.0.conv1.base_layer.weight" not in carried
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]


def test_probe_trains_the_head_alone_first(tmp_path: Path) -> None:
    setup = prepare(
        runs.recipe("vit", strategy={"name": "dora", "probe": "50%"}),
        world_size=1,
        device=torch.device("cpu"),
    )
    assert [plan.name for plan in setup.plans] == ["head", "adapters + head"]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_runs_are_plain_models(family: str, tmp_path: Path) -> None:
    run = runs.run(
        family, tmp_path / "run", strategy={"name": "lora", "merge": True}, training={"ema": {"decay": 0.5}}
    )
    assert not (run.model_folder / "adapter_config.json").exists()
    assert (
        load_trained(str(run.path)).backbone.model.state_dict().keys()
        == runs.start(run).model.state_dict().keys()
    )
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_average_of_weights_is_saved_too(family: str, tmp_path: Path) -> None:
    run = runs.run(
        family,
        tmp_path / "run",
        strategy={"name": "adalora", "r": 2},
        training={"ema": {"decay": 0.5}, "steps": 8},
    )
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]


def test_adalora_moves_its_ranks(tmp_path: Path) -> None:
    run = runs.run("bert", tmp_path / "run", strategy={"name": "adalora", "r": 4}, training={"steps": 20})
    config = json.loads((run.model_folder / "adapter_config.json").read_text())
    ranks = [sum(mask) for mask in config["rank_pattern"].values()]
    assert config["init_r"] == 6
    assert sum(ranks) == 12 * 4
    assert len(set(ranks)) > 1, "the budget is spent, unequally"
    tensors = load_file(run.model_folder / "adapter_model.safetensors")
    assert sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")) == 12 * 4


def test_adalora_keeps_its_vectors_orthogonal() -> None:
    backbone = adapted("vit", "image", method="adalora")
    penalty = backbone.adapter.penalty()  # type: ignore[union-attr]
    own = [p for n, p in backbone.model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in own]
    distance = torch.stack([torch.linalg.norm(gram - torch.eye(len(gram))) for gram in grams]).mean()
    assert torch.allclose(torch.as_tensor(penalty), 0.5 * distance)
    assert adapted("vit", "image", method="lora").adapter.penalty() == 0.0  # type: ignore[union-attr]


def test_lora_plus_rates_its_second_matrix_and_leaves_the_head_alone() -> None:
    recipe = runs.recipe(
        "vit", strategy={"name": "lora_plus", "adapter_lr": 1e-3, "ratio": 16}, optimizer={"lr": 5e-3}
    )
    setup = prepare(recipe, world_size=1, device=torch.device("cpu"))
    rates = {name: 5e-3 * multiple for name, multiple in setup.plans[0].multiples.items()}
    for parameter in setup.backbone.anatomy.trainable:
        if parameter.group == HEAD:
            assert rates[parameter.name] == pytest.approx(5e-3)
        elif parameter.is_adapter:
            assert rates[parameter.name] == pytest.approx(16e-3 if "lora_B" in parameter.name else 1e-3)
    assert len({group.multiples for group in setup.groups}) == 3


def test_ranks_and_alphas_by_pattern() -> None:
    spec = {"rank_pattern": {"qkv": 2, r"blocks\.1\.mlp\..*": 5}, "alpha_pattern": {"proj": 3.0}}
    layers = dict(adapted("vit", "image", method="lora", r=4, **spec).model.named_modules())
    ranks = {
        name: layers[f"blocks.{name}"].r["default"] for name in ("0.attn.qkv", "0.attn.proj", "1.mlp.fc1")
    }
    assert ranks == {"0.attn.qkv": 2, "0.attn.proj": 4, "1.mlp.fc1": 5}
    assert layers["blocks.0.attn.proj"].scaling["default"] == 0.75


def test_decay_is_for_matrices() -> None:
    for method in ("ia3", "dora", "vera", "adalora"):
        anatomy = adapted("vit", "image", method=method).anatomy
        decays = {
            p.name.split(".")[4].removesuffix("_vector"): p.decays for p in anatomy.parameters if p.is_adapter
        }
        assert not any(decays.get(name) for name in ("ia3_l", "lora_magnitude", "vera_lambda_b", "lora_E")), (
            decays
        )
        fixed = {p.name.rpartition(".")[0].rpartition(".")[2] for p in anatomy.parameters if p.is_fixed}
        assert fixed == ({"ranknum"} if method == "adalora" else set())


# What is said


def test_explain_lists_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_recipe(runs.recipe("vit", strategy={"name": "lora", "r": 4}), tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Adapters: lora in 8 layers, 4.1 k parameters" in shown
    assert "blocks.*.attn.qkv linear 96 x 32 2" in shown
    explain_recipe(
        parse_recipe(
            {"strategy": "lora", "backbone": str(folder_of("timm mobilenetv2")), "data": runs.images()}
        ),
        tmp_path,
    )
    assert (
        "left out, depthwise: an adapter would be larger than the layer: blocks.*.*.conv_dw"
        in capsys.readouterr().out
    )


def test_the_card_says_it_is_an_adapter(tmp_path: Path) -> None:
    run = runs.run("bert", tmp_path / "run", strategy="lora")
    card = (run.model_folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "config=config" in card, "the labels; tests/test_card.py runs the code"


def test_predict_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.run("bert", tmp_path / "run", strategy="lora")
    (answer,) = predict_inputs(str(run.path), ["the good film"], form="jsonl")
    assert answer["label"] in ("neg", "pos")


def test_adapters_on_an_adapter_are_saved_merged(tmp_path: Path) -> None:
    first = runs.run("vit", tmp_path / "first", strategy="lora")
    changes = {"backbone": {"id": str(first.model_folder)}}
    with pytest.raises(RecipeError, match=r"is an adapter itself(.|\n)*`strategy.merge: true`"):
        runs.run("vit", tmp_path / "second", strategy="lora", **changes)
    second = runs.run("vit", tmp_path / "second", strategy={"name": "lora", "merge": True}, **changes)
    assert second.status["backbone"]["kept_head"]
    assert (second.model_folder / "model.safetensors").is_file()


# Gradient checkpointing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_gradient_checkpointing_changes_memory_not_results(
    family: str, strategy: str, tmp_path: Path
) -> None:
    name = "bert-dry" if family == "bert" else family
    both = [
        runs.run(name, tmp_path / str(on), strategy=strategy, training={"gradient_checkpointing": on})
        for on in (False, True)
    ]
    one, other = (runs.weights(run) for run in both)
    assert runs.same(one, other, tolerance=1e-6)
    assert both[0].best["loss"] != pytest.approx(0.6931, abs=1e-4)  # type: ignore[index]


def test_what_cannot_checkpoint_gradients_is_refused(tmp_path: Path) -> None:
    backbone = str(folder_of("transformers vision-resnet"))
    changes = {"strategy": "lora", "backbone": backbone, "training": {"gradient_checkpointing": True}}
    with pytest.raises(ModelError, match="does not support it"):
        prepare(runs.recipe("resnet", **changes), world_size=1, device=torch.device("cpu"))


def test_peft_is_new_enough() -> None:
    assert tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 18)


# The page


def test_the_page_says_what_is_tested() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip("` "): [cell.strip() for cell in cells[3:-1]] for cells in
            (line.split("|") for line in lines if line.startswith("| `"))}  # fmt: skip
    assert set(rows) == set(METHODS)
    for method, (resnet, mobilenet, vit, bert) in rows.items():
        said = {"resnet": resnet != "no", "vit": vit != "no", "bert": bert != "no"}
        assert said == {family: (method, family) not in UNSUPPORTED for family in FAMILIES}, method
        assert (mobilenet == "no") == (resnet == "no"), method


@pytest.mark.slow
def test_the_table_is_what_the_code_says() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "scripts/adapter_table.py", "--check"], cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
