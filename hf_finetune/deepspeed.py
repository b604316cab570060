"""What accelerate's DeepSpeed config asks for, read without the package: FSDP2 does what its ZeRO stages do.

DeepSpeed's engine flattens the parameters that learn when it starts, so that phases could wake no others, and writes
its state as pickles. A ZeRO stage says how processes hold the model. What a recipe says as well, both must say alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import parse_flag_from_env

from hf_finetune.errors import UserError
from hf_finetune.spec import Duration

FLAG = "ACCELERATE_USE_DEEPSPEED"
_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_NUMBERS = {
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
}
_OFFLOADS = {
    "offload_optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
_PRECISION = "ACCELERATE_MIXED_PRECISION"

_STAGES = {
    0: "each process holds the whole model (DDP)",
    1: "FSDP2 shares out weights and gradients beside the optimizer's state, as for stage 2",
    2: "FSDP2 shares out weights too, and keeps them gathered from the forward to the end of the backward pass",
    3: "FSDP2 shares out weights, gradients and the optimizer's state",
}
_READ = frozenset(
    ["zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "train_batch_size",
     "train_micro_batch_size_per_gpu", *_NUMBERS]
)  # fmt: skip
# How DeepSpeed's engine sends, logs and saves: no result depends on it.
_OF_THE_ENGINE = frozenset(
    ["aio", "checkpoint", "disable_allgather", "dump_state", "gradient_predivide_factor", "memory_breakdown",
     "prescale_gradients", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
     "zero_force_ds_cpu_optimizer"]
)  # fmt: skip
_OF_ITS_ZERO = frozenset(
    ["allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "elastic_checkpoint",
     "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1", "load_from_fp32_weights",
     "max_live_parameters", "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold",
     "overlap_comm", "param_persistence_threshold", "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter",
     "round_robin_gradients", "sub_group_size", "use_multi_rank_bucket_allreduce"]
)  # fmt: skip
_DONE_BY = {
    "activation_checkpointing": "Remove it; the recipe's `training.gradient_checkpointing` does it",
    **dict.fromkeys(
        ("tensorboard", "wandb", "comet", "csv_monitor"), "Remove it; the recipe's `trackers` log a run"
    ),
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OF_A_SCHEDULER = {
    "warmup_max_lr": "optimizer.lr",
    "warmup_num_steps": "schedule.warmup",
    "total_num_steps": "training.steps",
    "cos_min_ratio": "schedule.floor",
}


class Wish(NamedTuple):
    """A setting that a recipe's key decides."""

    setting: str
    given: Any
    key: str
    value: Any
    """What the key would be."""


@dataclass(frozen=True)
class DeepSpeed:
    """A DeepSpeed config: as accelerate's own fields, or a JSON file."""

    config: Mapping[str, Any]
    where: str
    stage: int

    def agree(self, recipe: Mapping[str, Any], processes: int, micro_batch_size: int) -> list[str]:
        """Return notes on what is done in DeepSpeed's place.

        Args:
            recipe: the resolved one as plain data, with the defaults of its optimizer among `optimizer.options`.
            processes: of the run.
            micro_batch_size: samples of one process's forward pass.

        Raises:
            UserError: a setting that changes the result is not what the recipe says.
        """
        differing = [wish for wish in self._wishes(processes) if _at(recipe, wish.key) != wish.value]
        if differing:
            lines = [
                f"  {wish.setting}: {_plain(wish.given)}, but {wish.key} is {_plain(_at(recipe, wish.key))}"
                for wish in differing
            ]
            keys = ", ".join(dict.fromkeys(f"{wish.key}={_plain(wish.value)}" for wish in differing))
            raise UserError(
                "\n".join([f"{self.where} and the recipe differ, and the recipe says how to train:", *lines])
                + f'\nTake these out of the config or set them to "auto" there, or change the recipe: {keys}.'
            )
        done = _STAGES[self.stage] if processes > 1 else "one process holds the whole model"
        notes = [f"{self.where} asks for ZeRO stage {self.stage}; DeepSpeed is not used: {done}"]
        steps = recipe["training"]["batch_size"] // processes // micro_batch_size
        split = {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": steps}
        for name, value in split.items():
            asked = self.config.get(name)
            if _is_number(asked) and asked != value and not (name in _NUMBERS and asked == 1):
                notes.append(
                    f"{self.where}: {name} is {asked}; training.micro_batch_size says how a batch is split, here "
                    f"{steps} x {micro_batch_size}, and the result is the same"
                )
                break
        return notes

    def _wishes(self, processes: int) -> Iterator[Wish]:
        config = self.config
        micro, batch = config.get("train_micro_batch_size_per_gpu"), config.get("train_batch_size")
        steps = config.get("gradient_accumulation_steps", 1)  # as accelerate fills it in
        if _is_number(batch):
            yield Wish("train_batch_size", batch, "training.batch_size", batch)
        elif _is_number(micro) and _is_number(steps):
            given = f"{micro}, x gradient_accumulation_steps {steps} x {processes} processes"
            yield Wish(
                "train_micro_batch_size_per_gpu", given, "training.batch_size", micro * steps * processes
            )
        if _is_number(norm := config.get("gradient_clipping")):
            yield Wish("gradient_clipping", norm, "training.clip_norm", norm or None)
        for name in ("bf16", "fp16"):
            if _is_true(config.get(name, {}).get("enabled")):
                yield Wish(f"{name}.enabled", True, "training.precision", name)
        if (mixed := config.get("mixed_precision", "no")) != "no":
            yield Wish("mixed_precision", mixed, "training.precision", mixed)
        yield from self._wishes_of_optimizer(config.get("optimizer", {}))
        yield from self._wishes_of_scheduler(config.get("scheduler", {}))

    def _wishes_of_optimizer(self, block: Mapping[str, Any]) -> Iterator[Wish]:
        params = block.get("params", {})
        if kind := str(block.get("type") or ""):
            # DeepSpeed's Adam decays weights as AdamW does, unless it is told not to.
            is_adamw = kind.lower() == "adam" and params.get("adam_w_mode", True)
            yield Wish("optimizer.type", kind, "optimizer.name", "adamw" if is_adamw else kind.lower())
        for name, value in params.items():
            if value != "auto" and name not in {"adam_w_mode", "torch_adam", "fused"}:
                own = name in {"lr", "weight_decay", "momentum"}
                key = f"optimizer.{name}" if own else f"optimizer.options.{name}"
                yield Wish(f"optimizer.params.{name}", value, key, value)

    def _wishes_of_scheduler(self, block: Mapping[str, Any]) -> Iterator[Wish]:
        if kind := str(block.get("type") or ""):
            if kind not in _SCHEDULES:
                raise UserError(
                    f"{self.where}: `scheduler.type: {kind}` is not supported. Known are {', '.join(_SCHEDULES)}. "
                    "Remove `scheduler`; the recipe's `schedule` says it."
                )
            yield Wish("scheduler.type", kind, "schedule.name", _SCHEDULES[kind])
        for name, value in block.get("params", {}).items():
            if name in _OF_A_SCHEDULER and value != "auto":
                said = value
                if name == "warmup_num_steps" and _is_number(value):
                    said = str(Duration(value, "steps")) if value else None
                yield Wish(f"scheduler.params.{name}", value, _OF_A_SCHEDULER[name], said)
            elif not _is_off(value) and (name, value) != ("warmup_type", "linear"):
                raise UserError(
                    f'{self.where}: `scheduler.params.{name}: {value}` is not supported. Set it to "auto"; the '
                    "recipe's `schedule` says it."
                )


def asked() -> DeepSpeed | None:
    """Return what the environment of `accelerate launch` asks of DeepSpeed, None where it asks for none of it.

    Raises:
        UserError: the config cannot be read, or asks for what is not supported.
    """
    if not parse_flag_from_env(FLAG):
        return None
    names = (_FILE, _STAGE, _PRECISION, *_NUMBERS.values(), *_OFFLOADS.values())
    return _read(tuple((name, os.environ.get(name)) for name in names))


@cache  # a run goes on when the file is gone
def _read(environment: tuple[tuple[str, str | None], ...]) -> DeepSpeed:
    given = dict(environment)
    file = given[_FILE] if given[_FILE] not in (None, "", "none") else None
    where = "accelerate's DeepSpeed config" + (f" ({file})" if file else "")
    config: dict[str, Any] = _parsed(file, where) if file else {"zero_optimization": {"stage": "auto"}}
    for name, variable in _NUMBERS.items():
        if (value := given[variable]) not in (None, "auto") and config.get(name, "auto") == "auto":
            config[name] = _number(value, name, where)
    config["mixed_precision"] = given[_PRECISION] or "no"
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage == "auto":
        stage = int(_number(given[_STAGE] or "2", "zero_stage", where))
    if not isinstance(zero, dict) or stage not in tuple(_STAGES):
        raise UserError(
            f"{where}: `zero_optimization.stage` is {_plain(stage)}. Allowed are 0, 1, 2 and 3: set one of them."
        )
    for name, variable in _OFFLOADS.items():
        block = zero.get(name) or {}
        device = block.get("device", "auto") if isinstance(block, dict) else block
        device = (given[variable] or "none") if device == "auto" else device
        if device != "none":
            raise UserError(
                f"{where}: `{name}` to {device} is not supported. Set its device to none; more processes hold less "
                "each."
            )
    _check_known(config, zero, where)
    return DeepSpeed(config, where, stage)


def _parsed(file: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where} cannot be read: {what}. Give the path of a JSON file.") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object. Give the path of a file with one.")
    for name in ("bf16", "fp16", "optimizer", "scheduler"):
        if not isinstance(found.get(name, {}), dict) or not isinstance(
            found.get(name, {}).get("params", {}), dict
        ):
            raise UserError(f"{where}: `{name}` is {_plain(found[name])}. Give an object, or remove it.")
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", *_NUMBERS):
        if not _is_number(value := found.get(name, 0)) and value != "auto":
            raise UserError(f'{where}: `{name}` is {json.dumps(value)}. Give a number, or "auto".')
    return found


def _check_known(config: Mapping[str, Any], zero: Mapping[str, Any], where: str) -> None:
    """Refuse what is asked for and not known: left out it could change the result without a word."""
    foreign = {
        name: v for name, v in config.items() if name not in _READ | _OF_THE_ENGINE | {"mixed_precision"}
    }
    for name, value in zero.items():
        if name not in {"stage", *_OFFLOADS, *_OF_ITS_ZERO} and not name.startswith("stage3_"):
            foreign[f"zero_optimization.{name}"] = value
    for name, value in foreign.items():
        if not _is_off(value):
            todo = _DONE_BY.get(name, "Remove it, or set it to false")
            raise UserError(f"{where}: `{name}` is not supported. {todo}.")


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return list(found) if isinstance(found, tuple) else found


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: `{name}` is '{text}'. Give a number.") from None
    return int(value) if value.is_integer() else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_true(value: Any) -> bool:
    return str(value).lower() in {"true", "1"}


def _is_off(value: Any) -> bool:
    switched_off = isinstance(value, dict) and "enabled" in value and not _is_true(value["enabled"])
    return switched_off or not value or value == "auto"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
