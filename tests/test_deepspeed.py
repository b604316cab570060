"""A DeepSpeed config is read without DeepSpeed: what it asks for is done by FSDP2, agrees with the recipe, or is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

import runs
from hf_finetune.errors import UserError
from hf_finetune.parallel import holding, reshards
from hf_finetune.precision import accelerator_in
from hf_finetune.setup import Setup, prepare, process_state

# As transformers' documentation has it: the recipe decides what is "auto".
AUTO: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": {"device": "none"},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 2000, "wall_clock_breakdown": False,
    "tensorboard": {"enabled": False},
}  # fmt: skip


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what sets the environment as `accelerate launch` does: a file's settings, and fields."""

    def environment(file: dict[str, Any] | str | None = None, /, **fields: str) -> Path:
        path = tmp_path / "ds.json"
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        if file is not None:
            path.write_text(file if isinstance(file, str) else json.dumps(file), encoding="utf-8")
            fields["DEEPSPEED_CONFIG_FILE"] = str(path)
        for name, value in fields.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        return path

    return environment


def prepared(processes: int = 2, **changes: Any) -> Setup:
    recipe = runs.recipe("vit", strategy="full", **changes)
    return prepare(recipe, world_size=processes, device=torch.device("cpu"))


@pytest.mark.parametrize(("stage", "held"), [(0, "ddp"), (1, "fsdp2"), (2, "fsdp2"), (3, "fsdp2")])
def test_a_stage_says_how_processes_hold_the_model(stage: int, held: str, ask: Any) -> None:
    ask(DEEPSPEED_ZERO_STAGE=str(stage))
    assert (holding(2), holding(1)) == (held, "whole")
    assert reshards() is (stage == 3)
    ask({"zero_optimization": {"stage": stage}}, DEEPSPEED_ZERO_STAGE="3" if stage < 3 else "0")
    assert holding(2) == held, "the file counts"


def test_a_run_says_what_is_done_instead(ask: Any) -> None:
    path = ask(AUTO)
    start = f"accelerate's DeepSpeed config ({path}) asks for ZeRO stage 3; DeepSpeed is not used: "
    assert start + "FSDP2 shares out weights, gradients and the optimizer's state" in prepared().notes
    assert start + "one process holds the whole model" in prepared(1).notes


def test_libraries_see_none_of_it(ask: Any) -> None:
    """Else accelerate wants the package, and quarters every loss."""
    ask(AUTO, GRADIENT_ACCUMULATION_STEPS="4")
    process_state()
    accelerator = accelerator_in("fp32")
    assert isinstance(accelerator, Accelerator)
    assert accelerator.distributed_type is not DistributedType.DEEPSPEED
    assert accelerator.gradient_accumulation_steps == 1


AGREES: dict[str, dict[str, Any]] = {
    "accelerate's defaults": {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0},
    "batches": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    "batches, by what a GPU takes": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    "an optimizer": {
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True},
        }
    },
    "a schedule": {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 0, "total_num_steps": 4}}},
}  # fmt: skip


@pytest.mark.parametrize("case", AGREES)
def test_what_both_say_alike_passes(case: str, ask: Any) -> None:
    ask(AUTO | AGREES[case])
    notes = prepared(training={"micro_batch_size": 2}).notes
    assert len([note for note in notes if "DeepSpeed" in note]) == 1


def test_how_a_batch_is_split_is_the_recipe_s(ask: Any) -> None:
    path = ask(AUTO, GRADIENT_ACCUMULATION_STEPS="4")
    assert prepared(training={"micro_batch_size": 2}).notes[-1] == (
        f"accelerate's DeepSpeed config ({path}): gradient_accumulation_steps is 4; training.micro_batch_size says how a "
        "batch is split, here 2 x 2, and the result is the same"
    )


DIFFERS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "clipping": (
        {"gradient_clipping": 0.5},
        {},
        "gradient_clipping: 0.5, but training.clip_norm is 1.0 … change the recipe: training.clip_norm=0.5.",
    ),
    "no clipping": ({"gradient_clipping": 0.0}, {}, "recipe: training.clip_norm=null."),
    "clipping by a field": ({}, {"GRADIENT_CLIPPING": "2.0"}, "gradient_clipping: 2, but training.clip_norm is 1.0"),
    "bf16": ({"bf16": {"enabled": True}}, {}, "bf16.enabled: true, but training.precision is fp32"),
    "fp16": ({"fp16": {"enabled": True}}, {}, "fp16.enabled: true, but training.precision is fp32"),
    "mixed precision": ({}, {"MIXED_PRECISION": "bf16"}, "mixed_precision: bf16, but training.precision is fp32"),
    "the batch": ({"train_batch_size": 64}, {}, "train_batch_size: 64, but training.batch_size is 8"),
    "a micro-batch": (
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        {},
        "train_micro_batch_size_per_gpu: 4, x gradient_accumulation_steps 2 x 2 processes, but training.batch_size is "
        "8 … training.batch_size=16.",
    ),
    "the optimizer": ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type: Lion, but optimizer.name is adamw"),
    "its rate": (
        {"optimizer": {"params": {"lr": 5e-5, "betas": [0.8, 0.999]}}},
        {},
        "optimizer.params.lr: 5e-05, but optimizer.lr is 0.01\n  optimizer.params.betas: [0.8, 0.999], but "
        "optimizer.options.betas is [0.9, 0.999] … optimizer.lr=5e-05, optimizer.options.betas=[0.8, 0.999].",
    ),
    "the schedule": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}},
        {},
        "scheduler.type: WarmupDecayLR, but schedule.name is cosine\n  scheduler.params.warmup_num_steps: 10, but "
        "schedule.warmup is null … schedule.name=linear, schedule.warmup=10 steps.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERS)
def test_what_the_recipe_says_otherwise_is_refused(case: str, ask: Any) -> None:
    file, fields, text = DIFFERS[case]
    path = ask(AUTO | file, **fields)
    with pytest.raises(UserError) as caught:
        prepared()
    found = str(caught.value)
    assert found.startswith(f"accelerate's DeepSpeed config ({path}) and the recipe differ")
    assert 'Take these out of the config or set them to "auto" there, or change the recipe: ' in found
    for part in text.split(" … "):
        assert part in found


ZERO = AUTO["zero_optimization"]
REFUSED: dict[str, tuple[Any, dict[str, str], str]] = {
    "offload": (
        {"zero_optimization": ZERO | {"offload_optimizer": {"device": "cpu"}}},
        {},
        "`offload_optimizer` to cpu is not supported. Set its device to none; more processes hold less each.",
    ),
    "offload by a field": (
        None,
        {"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
        "`offload_param` to nvme is not supported. Set its device to none",
    ),
    "old offload": (
        {"zero_optimization": ZERO | {"cpu_offload": True}},
        {},
        "`zero_optimization.cpu_offload` is not supported. Remove it, or set it to false.",
    ),
    "no stage": ({"bf16": {}}, {}, "`zero_optimization.stage` is null. Allowed are 0, 1, 2 and 3"),
    "stage 4": (None, {"DEEPSPEED_ZERO_STAGE": "4"}, "`zero_optimization.stage` is 4. Allowed are 0, 1, 2 and 3"),
    "a stage in words": (None, {"DEEPSPEED_ZERO_STAGE": "two"}, "`zero_stage` is 'two'. Give a number."),
    "quantised": (
        {"zero_optimization": ZERO | {"zero_quantized_weights": True}},
        {},
        "`zero_optimization.zero_quantized_weights` is not supported. Remove it",
    ),
    "something else": (
        {"compression_training": {"weight_quantization": {}}},
        {},
        "`compression_training` is not supported. Remove it",
    ),
    "activations": (
        {"activation_checkpointing": {"partition_activations": True}},
        {},
        "`activation_checkpointing` is not supported. Remove it; the recipe's `training.gradient_checkpointing` does it.",
    ),
    "a tracker": ({"wandb": {"enabled": True}}, {}, "`wandb` is not supported. Remove it; the recipe's `trackers`"),
    "another schedule": (
        {"scheduler": {"type": "OneCycle"}},
        {},
        "`scheduler.type: OneCycle` is not supported. Known are WarmupLR, WarmupDecayLR, WarmupCosineLR. Remove "
        "`scheduler`; the recipe's `schedule` says it.",
    ),
    "a schedule's own": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "log"}}},
        {},
        "`scheduler.params.warmup_type: log` is not supported. Set it to \"auto\"",
    ),
    "a list": ("[1]", {}, "is not a JSON object. Give the path of a file with one."),
    "a word for a block": ({"bf16": True}, {}, "`bf16` is true. Give an object, or remove it."),
    "a number in quotes": ({"gradient_clipping": "0.5"}, {}, '`gradient_clipping` is "0.5". Give a number, or "auto".'),
    "not JSON": ("stage: 3", {}, "cannot be read: Expecting value: line 1 column 1 (char 0). Give the path of a JSON file."),
    "no file": (None, {"DEEPSPEED_CONFIG_FILE": "none.json"}, "(none.json) cannot be read: No such file or directory. Give"),
    "FSDP beside it": (None, {"USE_FSDP": "true"}, "asks for FSDP and for DeepSpeed. Ask for one of them."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused(case: str, ask: Any) -> None:
    file, fields, text = REFUSED[case]
    ask(AUTO | file if isinstance(file, dict) and case != "no stage" else file, **fields)
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        prepared()
    assert str(caught.value).startswith("accelerate's ")
