"""Two processes end where one does, with DDP and with FSDP2: gloo on the CPU, through scripts/train.py and `finetune`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import nursery
import runs
from hf_finetune.checkpoint import find_checkpoint
from hf_finetune.errors import RecipeError, UserError
from hf_finetune.inference import evaluate_model
from hf_finetune.parallel import holding
from hf_finetune.recipe import dump_recipe, load_recipe
from hf_finetune.runfolder import Run, load_run
from hf_finetune.setup import prepare

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
SEVERAL = Path(__file__).with_name("several.py")
ODD = 9
"""Rows to learn from: in batches of 8 the last one has a single sample, for two processes."""

# Adam turns the rounding of a gradient that is zero by nature (a key's bias) into steps; SGD shows what the loop does.
SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01}}
FULL = {"strategy": "full", "schedule": {"name": "cosine", "warmup": "1 steps"}} | SGD
# name -> (backbone, changes); each runs in one process and in two
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit gradual": ("vit", {"strategy": {"name": "gradual", "every": "2 steps"}, "training": {"steps": 8}}),
    "cnn full": ("resnet", FULL),
    "cnn frozen, micro-batches": ("resnet", {"strategy": "frozen", "training": {"micro_batch_size": 2}}),
    "text, by length": ("bert-dry", FULL),
    "mixup": ("vit", FULL | {"augment": ["mixup", "horizontal_flip"]}),
    "augmented on the device": (
        "vit",
        FULL | {"augment": ["random_crop", "rand_augment", "random_erasing"], "data": {"augment_on": "accelerator"}},
    ),
    "cutmix, odd share": ("vit", FULL | {"augment": ["cutmix"], "training": {"batch_size": 6}}),
    "ema": ("vit", FULL | {"training": {"ema": {"decay": 0.5}}}),
    "a stream": ("vit", FULL | {"augment": ["mixup"], "data": {"streaming": True, "shuffle_buffer": 8}}),
    "class weights": ("vit", FULL | {"data": {"class_weights": "balanced"}}),
    "lp_ft": ("resnet", {"strategy": {"name": "lp_ft", "full_lr": "0.1x", "probe": "2 steps"}, "training": {"steps": 5}}),
    "a solved head, then all": ("bert-dry", {"strategy": {"name": "lp_ft", "full_lr": "0.1x"}} | SGD),
    "ridge": ("resnet", {"strategy": {"name": "frozen", "solver": "ridge"}}),
    "an unused mask token": ("vision-dinov2", FULL),
}  # fmt: skip
# Batch statistics are each process's own, so these are not compared with one process.
LIVE = {
    "live batch norm": ("resnet", FULL | {"strategy": {"name": "full", "batch_norm": "train"}}),
    # No evaluation lies between: when the statistics freeze, each process holds those of its own share.
    "batch norm freezes": (
        "resnet",
        SGD
        | {
            "strategy": {
                "phases": [{"train": "all", "batch_norm": "train", "for": "1 steps"}, {"train": "head"}]
            }
        },
    ),
}

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Each phase shows other layers to the optimizer; a share may have no rows (a class token has one), or be of an average.
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "vit gradual": (
        "vit",
        {"strategy": {"name": "gradual", "every": "2 steps"}, "training": {"steps": 8, "micro_batch_size": 2}} | SGD,
    ),
    "vit ema": ("vit", FULL | {"training": {"ema": {"decay": 0.5}}}),
    "cnn lp_ft": ("resnet", {"strategy": {"name": "lp_ft", "full_lr": "0.1x", "probe": "2 steps"}, "training": {"steps": 5}} | SGD),
    "text lora": ("bert-dry", {"strategy": "lora", "training": {"reload_check": True}} | SGD),
    "vit dora": ("vit", {"strategy": "dora"} | SGD),
    "straight": ("bert-dry", {
        "strategy": "full", "schedule": {"name": "constant", "warmup": None}, "monitor": {"evaluate": "3 steps"},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01}, "training": {"steps": 6, "ema": {"decay": 0.5}},
    }),
}  # fmt: skip

# The same by DeepSpeed's config, as `accelerate launch` hands it on; two micro-batches each, as the recipe says.
ZERO: dict[str, dict[str, str]] = {
    name: {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    }
    for name, stage in (("zero-2", "2"), ("zero-3", "3"))
}
SHARED |= {
    "zero-2": ("vit", FULL | {"training": {"micro_batch_size": 2}}),
    "zero-3": (
        "bert-dry",
        {"strategy": {"phases": [{"train": "last:2"}]}, "training": {"micro_batch_size": 2}} | SGD,
    ),
}

# A run of half the steps goes on, held in another way: (held before, held now, what refuses it without --allow-changes).
CHANGES: dict[str, tuple[str, dict[str, str], str]] = {
    "fsdp2": ("fsdp2", {}, ""),
    "zero-3": ("fsdp2", ZERO["zero-3"], ""),
    "zero-2": ("fsdp2", ZERO["zero-2"], ""),
    "ddp": ("fsdp2", {"ACCELERATE_USE_FSDP": "false"}, "parallel: was fsdp2, is ddp"),
    "one, fsdp2": ("one", {}, "processes: was 1, is 2\nparallel: was whole, is fsdp2"),
    "one, ddp": ("one", {"ACCELERATE_USE_FSDP": "false"}, "processes: was 1, is 2\nparallel: was whole, is ddp"),
}  # fmt: skip

# What two processes do once the arms are through.
RESUMES = """
import json, os, shutil, sys
from pathlib import Path
from unittest.mock import patch
from accelerate import PartialState
from hf_finetune.errors import UserError
from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
half = load_recipe(folder / "straight.yaml", [f"output={folder / 'fsdp2'}", "training.steps=3"])
finetune(half, quiet=True)
if PartialState().is_main_process:
    for name, (before, _, _) in changes.items():
        shutil.copytree(folder / before, folder / f"goes on {name}")
    shutil.copytree(folder / "fsdp2", folder / "alone")
PartialState().wait_for_everyone()
for name, (_, environment, refused) in changes.items():
    recipe = load_recipe(folder / "straight.yaml", [f"output={folder / f'goes on {name}'}"])
    with patch.dict(os.environ, environment):
        if refused:
            try:
                finetune(recipe, quiet=True, resume=True)
            except UserError as error:
                (folder / f"refused {name}-{PartialState().process_index}").write_text(str(error))
        finetune(recipe, quiet=True, resume=True, allow_changes=bool(refused))
"""


def written(folder: Path, name: str, family: str, changes: dict[str, Any], processes: int) -> Path:
    data = (
        {"data": {"path": runs.images(ODD, 5)} | changes.get("data", {})}
        if not family.startswith("bert")
        else {}
    )
    recipe = runs.recipe(family, folder / f"{name}-{processes}", **(changes | data))
    path = folder / f"{name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


@cache
def together() -> Path:
    """Run all arms but the first in two processes, one launch."""
    folder = Path(runs._ROOT.name) / "two"
    folder.mkdir(exist_ok=True)
    for name, (family, changes) in (ARMS | LIVE).items():
        if name != "vit gradual":
            written(folder, name, family, changes, 2)
    codes, printed = nursery.run(SEVERAL, str(folder), log=folder / "log", processes=2)
    assert codes == [0, 0], printed[-3000:]
    return folder


@cache
def shared() -> Path:
    """Run the arms of FSDP2 in two processes, one launch."""
    folder = Path(runs._ROOT.name) / "shared"
    folder.mkdir(exist_ok=True)
    for name, (family, changes) in SHARED.items():
        path = written(folder, name, family, changes, 2)
        if name in ZERO:
            path.with_suffix(".json").write_text(json.dumps(ZERO[name]), encoding="utf-8")
    resumes = folder / "resumes.py"
    resumes.write_text(RESUMES, encoding="utf-8")
    runs.finetune(
        load_recipe(folder / "straight.yaml", [f"output={folder / 'one'}", "training.steps=3"]), quiet=True
    )
    for script, *arguments in ((SEVERAL, str(folder)), (resumes, str(folder), json.dumps(CHANGES))):
        codes, printed = nursery.run(script, *arguments, log=folder / "log", processes=2, **FSDP2)
        assert codes == [0, 0], printed[-3000:]
    errors = [error.read_text() for error in folder.glob("*.error")]
    assert not errors, errors[0]
    return folder


@cache
def by_script() -> tuple[Path, str]:
    """Run the first arm in two processes that torchrun starts, through scripts/train.py."""
    folder = Path(runs._ROOT.name) / "script"
    folder.mkdir(exist_ok=True)
    path = written(folder, "vit gradual", *ARMS["vit gradual"], 2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(TRAIN),
    ]
    command += ["--recipe", str(path), "training.clip_norm=0.5", "training.reload_check=true"]
    done = subprocess.run(
        [*command, "--output", str(folder / "vit gradual-2")], env=os.environ | nursery.ENVIRONMENT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def two(name: str) -> Run:
    folder = by_script()[0] if name == "vit gradual" else together()
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    return load_run(folder / f"{name}-2")


def felt(run: Run) -> dict[str, torch.Tensor]:
    """Return a run's weights but for the biases of keys, which no output feels.

    A query's scores all move by the same, which softmax takes away. Their gradient is zero but for its rounding, out of
    which Adam makes steps as large as the rate.
    """
    found = runs.weights(run)
    for name, tensor in found.items():
        if name.endswith("attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
        if name.endswith("attention.self.key.bias"):
            tensor.zero_()
    return found


@pytest.mark.parametrize("name", ARMS)
def test_two_processes_end_where_one_does(name: str, tmp_path: Path) -> None:
    double = two(name)
    recipe = load_recipe(
        double.path / "recipe.yaml", [f"output={tmp_path / 'one'}", "training.reload_check=false"]
    )
    single = runs.finetune(recipe, quiet=True)
    assert (double.status["processes"], double.status["parallel"]) == (2, "ddp")
    assert runs.same(felt(single), felt(double), tolerance=1e-5)
    for one, other in zip(single.rows, double.rows, strict=True):
        assert (one["step"], one["split"], one.get("lr")) == (other["step"], other["split"], other.get("lr"))
        # a head fitted to the minimum on few samples gives logits in the tens, and losses with them
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5, rel=1e-4 if "solved" in name else None)
    # no sample is counted twice
    assert [row["metrics"] for row in runs.evaluations(double)] == [
        row["metrics"] for row in runs.evaluations(single)
    ]


@pytest.mark.parametrize("name", ["cnn full", "cnn frozen, micro-batches"])
def test_frozen_is_bit_equal_under_ddp(name: str) -> None:
    run = two(name)
    buffers = {n for n, _ in runs.start(run).model.named_buffers()}
    assert not runs.moved(run) & buffers
    if "frozen" in name:
        assert runs.moved(run) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", SHARED)
def test_shared_out_as_in_one_process(name: str, tmp_path: Path) -> None:
    double = load_run(shared() / f"{name}-2")
    recipe = load_recipe(
        double.path / "recipe.yaml", [f"output={tmp_path / 'one'}", "training.reload_check=false"]
    )
    single = runs.finetune(recipe, quiet=True)
    assert (double.status["processes"], double.status["parallel"]) == (2, "fsdp2")
    assert runs.same(felt(single), felt(double), tolerance=1e-6)
    for one, other in zip(single.rows, double.rows, strict=True):
        assert (one["step"], one["split"], one.get("lr")) == (other["step"], other["split"], other.get("lr"))
        assert other["loss"] == pytest.approx(
            one["loss"], rel=1e-6, abs=2e-7
        )  # two roundings of a logit near 1
    if name not in {"text lora", "vit dora"}:
        assert runs.moved(double) == runs.moved(single)  # the rest is bit-equal
    assert single.status["features"] == double.status["features"]


@pytest.mark.parametrize("name", ZERO)
def test_a_deepspeed_config_runs_on_fsdp2(name: str) -> None:
    run = load_run(shared() / f"{name}-2")
    assert (
        f"accelerate's DeepSpeed config asks for ZeRO stage {name[-1]}; DeepSpeed is not used: FSDP2"
        in str(run.status["notes"])
    )
    checkpoint, _ = find_checkpoint(run.path / "checkpoints")
    assert checkpoint is not None
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".json", ".safetensors"}


def test_what_was_shared_out_loads_in_its_own_library() -> None:
    run = load_run(shared() / "text lora-2")
    assert run.status["reload"]["compared"]
    assert (run.model_folder / "adapter_model.safetensors").is_file()


def test_each_process_saves_its_share() -> None:
    checkpoint, rejected = find_checkpoint(shared() / "straight-2" / "checkpoints")
    assert checkpoint is not None
    assert not rejected
    listed = json.loads((checkpoint.path / "manifest.json").read_text())["files"]
    files = [f"{part}-0000{n}-of-00002.safetensors" for part in ("ema", "model", "optimizer") for n in (1, 2)]
    assert set(files) <= set(listed)
    for part in ("model", "optimizer"):
        sizes = [listed[name]["size"] for name in files if name.startswith(part)]
        whole = 4 * sum(t.numel() for t in checkpoint.tensors(part).values())
        assert max(sizes) < 0.6 * whole, "about half of it"
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_held_in_another_way(name: str) -> None:
    folder, refused = shared(), CHANGES[name][2]
    straight, resumed = load_run(folder / "straight-2"), load_run(folder / f"goes on {name}")
    if refused:
        for process in range(2):
            lines = (folder / f"refused {name}-{process}").read_text().splitlines()[1:-1]
            assert lines == [f"  {line}" for line in refused.splitlines()]
        assert runs.same(felt(straight), felt(resumed), tolerance=1e-6)
        return
    assert runs.same(runs.weights(straight), runs.weights(resumed))
    assert [row["loss"] for row in runs.evaluations(straight)] == [
        row["loss"] for row in runs.evaluations(resumed)
    ]


def test_one_process_goes_on_with_the_shares_of_two() -> None:
    folder = shared()
    recipe = load_recipe(folder / "straight.yaml", [f"output={folder / 'alone'}"])
    with pytest.raises(UserError, match=r"(?s)processes: was 2, is 1\n.*parallel: was fsdp2, is whole"):
        runs.finetune(recipe, quiet=True, resume=True)
    alone = runs.finetune(recipe, quiet=True, resume=True, allow_changes=True)
    assert runs.same(felt(alone), felt(load_run(folder / "straight-2")), tolerance=1e-6)


REFUSED = {
    "FSDP_VERSION=1": "FSDP version 1 is not supported. Set `fsdp_version: 2`",
    "FSDP_OFFLOAD_PARAMS=true": "`fsdp_offload_params` is not supported",
    "FSDP_ACTIVATION_CHECKPOINTING=true": "set it to false, and `training.gradient_checkpointing=true`",
    "FSDP_IGNORED_MODULES=head": "`fsdp_ignored_modules` is not supported",
    "ACCELERATE_USE_MEGATRON_LM=true": "Megatron-LM is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG=true": "`parallelism_config` is not supported",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_accelerate_may_not_ask_for(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (FSDP2 | dict([setting.split("=")])).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"(?i){re.escape(REFUSED[setting])}"):
        holding(2)


UNSHAREABLE: dict[str, tuple[dict[str, Any], str]] = {
    "muon": (
        {"strategy": "full", "optimizer": {"name": "muon", "lr": 0.1}},
        "'muon' does not make the same steps",
    ),
    "adalora": ({"strategy": "adalora"}, "adalora moves ranks between whole matrices"),
    "quantised": (
        {"strategy": "lora", "quantize": "8bit"},
        "quantised weights cannot be shared out by FSDP2",
    ),
}


@pytest.mark.parametrize("case", UNSHAREABLE)
def test_what_cannot_be_shared_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    changes, text = UNSHAREABLE[case]
    backbone = {"backbone": {"id": runs.backbone("vit"), "quantize": changes.pop("quantize", None)}}
    with pytest.raises(RecipeError, match=text):
        prepare(runs.recipe("vit", **(changes | backbone)), world_size=2, device=torch.device("cpu"))


def test_the_main_process_compares_what_was_written() -> None:
    assert two("vit gradual").status["reload"]["compared"]


@pytest.mark.parametrize("name", LIVE)
def test_what_is_kept_is_what_both_processes_measured(name: str) -> None:
    """With live batch statistics each process has its own; both measure with the ones that are kept."""
    run = two(name)
    assert "bn1.running_mean" in runs.moved(run)
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]


def test_one_process_speaks_for_both() -> None:
    _, printed = by_script()
    assert printed.count("done: best accuracy") == 1
    assert printed.count("* best") == 1
    assert "phase 2 of 4 from step 2: last:2 learns" in printed


def test_a_user_s_mistake_is_printed_once(tmp_path: Path) -> None:
    recipe = runs.recipe("vit", strategy={"phases": [{"train": "last:99"}]})
    (tmp_path / "wrong.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    arguments = ["--recipe", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "run")]
    codes, printed = nursery.run(TRAIN, *arguments, log=tmp_path / "log", processes=2)
    assert all(codes)
    assert printed.count("'last:99' asks for 99 layer groups") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_the_batch_must_be_shared_equally() -> None:
    for training, text in (({"batch_size": 9}, "9 samples per optimizer step cannot be shared equally by 2"),
                           ({"batch_size": 8, "micro_batch_size": 8}, "8 does not divide the 4 samples each")):  # fmt: skip
        recipe = runs.recipe("vit", strategy="frozen", training=training)
        with pytest.raises(RecipeError, match=text):
            prepare(recipe, world_size=2, device=torch.device("cpu"))
