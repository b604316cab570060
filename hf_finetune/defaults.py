"""What `auto` means: one table of published starting values by backbone family and strategy, and rules by data size.

`resolve` writes every value out, each with its reason, so the recipe saved with a run says what really ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_finetune.errors import RecipeError
from hf_finetune.models.anatomy import HEAD, Anatomy, Family
from hf_finetune.models.spec import HeadInit
from hf_finetune.recipe import Recipe
from hf_finetune.spec import Duration, Rate
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.lp_ft import PROBE
from hf_finetune.strategies.phase import BatchNorm, Solver


@dataclass(frozen=True)
class Start:
    """Starting values of one strategy on one family, for AdamW at batch 32."""

    lr: float
    """Base rate: that of the head wherever head and backbone differ."""
    weight_decay: float
    backbone: float = 1.0
    """Rate of the backbone as a multiple of the base rate."""
    layer_decay: float | None = None
    warmup_percent: float = 10.0
    head: HeadInit = "zero"
    """How a new output layer starts."""


_SOURCES = {
    "scratch": "the usual AdamW rates of training from random weights (timm, DeiT)",
    "full": "BiT, MAE and run_glue fine-tuning rates, at the small end for small data",
    "frozen": "linear probes on frozen features (MAE, DINOv2 sweeps), for AdamW",
    "discriminative": "ULMFiT and fastai: new layers at head rates, pretrained layers at fine-tuning rates",
    "layer_decay": "ELECTRA (text 0.8), MAE (ViT-B 0.65); gentler on the few stages of a CNN",
    "gradual": "ULMFiT: head rates above, fine-tuning rates below",
    "lp_ft": "Kumar 2022: a converged head, then all layers at a small rate",
    "surgical": "as discriminative: one block at fine-tuning rates",
    "bitfit": "biases need 10 to 100 times the rate of full fine-tuning (BitFit, VTAB-1k re-runs)",
    "norms": "normalisation layers need 10 to 100 times the rate of full fine-tuning (LN-Tune, VTAB-1k re-runs)",
    "lora": "LoRA on ViT (VTAB-1k re-runs) and on text encoders (LoRA, AdaLoRA), ten times full fine-tuning's rate",
    "lora_plus": "as lora for the head; the ratio of the two matrices' rates is the paper's (LoRA+)",
    "vectors": "IA3: a few scales for each layer, at five times LoRA's rate",
    "rotations": "OFT, BOFT: rotations of the pretrained weights, at LoRA's rate",
    "phases": "as discriminative: written phases start from the head's rate",
}

STARTS: dict[str, dict[Family, Start]] = {
    "scratch": {
        "cnn": Start(1e-3, 0.05),
        "vit": Start(5e-4, 0.05),
        "text": Start(3e-4, 0.01),
    },
    "full": {
        "cnn": Start(1e-4, 0.05),
        "vit": Start(5e-5, 0.05),
        "text": Start(5e-5, 0.01, head="small"),
    },
    "frozen": {
        "cnn": Start(1e-2, 0.0, warmup_percent=0),
        "vit": Start(1e-3, 0.0, warmup_percent=0),
        "text": Start(1e-3, 0.0, warmup_percent=0),
    },
    "discriminative": {
        "cnn": Start(3e-3, 0.05, backbone=0.02),
        "vit": Start(1e-3, 0.05, backbone=0.05),
        "text": Start(5e-4, 0.01, backbone=0.1),
    },
    "layer_decay": {
        "cnn": Start(2e-4, 0.05, layer_decay=0.8),
        "vit": Start(5e-4, 0.05, layer_decay=0.75),
        "text": Start(1e-4, 0.01, layer_decay=0.8),
    },
    "gradual": {
        "cnn": Start(3e-3, 0.05, backbone=0.02),
        "vit": Start(1e-3, 0.05, backbone=0.05),
        "text": Start(5e-4, 0.01, backbone=0.1),
    },
    "lp_ft": {
        "cnn": Start(1e-2, 0.0, backbone=0.005),
        "vit": Start(1e-3, 0.0, backbone=0.05),
        "text": Start(1e-3, 0.0, backbone=0.05),
    },
    "surgical": {
        "cnn": Start(3e-3, 0.05, backbone=0.02),
        "vit": Start(1e-3, 0.05, backbone=0.05),
        "text": Start(5e-4, 0.01, backbone=0.1),
    },
    "bitfit": {
        "cnn": Start(3e-3, 0.0),
        "vit": Start(3e-3, 0.0),
        "text": Start(1e-3, 0.0),
    },
    "norms": {
        "cnn": Start(3e-3, 0.0),
        "vit": Start(1e-3, 0.0),
        "text": Start(1e-3, 0.0),
    },
    "lora": {
        "cnn": Start(3e-3, 1e-4, backbone=0.3),
        "vit": Start(1e-3, 1e-4),
        "text": Start(5e-4, 0.01, head="small"),
    },
    "lora_plus": {
        "cnn": Start(3e-3, 1e-4, backbone=0.1),
        "vit": Start(1e-3, 1e-4, backbone=0.2),
        "text": Start(5e-4, 0.01, backbone=0.2, head="small"),
    },
    "vectors": {
        "cnn": Start(3e-3, 0.0, backbone=2),
        "vit": Start(1e-3, 0.0, backbone=5),
        "text": Start(1e-3, 0.0, backbone=5),
    },
    "rotations": {
        "cnn": Start(3e-3, 0.0),
        "vit": Start(1e-3, 0.0),
        "text": Start(5e-4, 0.0, head="small"),
    },
    "phases": {
        "cnn": Start(3e-3, 0.05, backbone=0.02),
        "vit": Start(1e-3, 0.05, backbone=0.05),
        "text": Start(5e-4, 0.01, backbone=0.1),
    },
}

# How an optimizer's useful rate relates to AdamW's: BiT's SGD rates, Lion's paper (arXiv 2302.06675), LAMB's paper.
LR_FACTORS = {"adamw": 1.0, "adam": 1.0, "nadam": 1.0, "nadamw": 1.0, "radam": 1.0, "adan": 3.0, "lamb": 10.0,
              "lion": 0.2, "sgd": 30.0, "nesterov": 30.0}  # fmt: skip

# The rates of pretrained layers hold for networks of these widths (features the output layer sees): MobileNetV2,
# ViT-B, BERT-base. Adam's useful rate falls as one over the width (muP, arXiv 2203.03466), which also is how published
# rates differ between base and large models.
REFERENCE_WIDTHS: dict[Family, int] = {"cnn": 1280, "vit": 768, "text": 768}
WIDTH_FACTORS = (0.25, 10.0)
"""Smallest and largest correction for the width."""
_ZERO = "the first loss is ln(classes), and the first steps do not distort the layers below (BiT, LP-FT)"
_ALL_AT_ONE_RATE = frozenset({"scratch", "full", "layer_decay"})

# Under this many training samples BatchNorm statistics stay as pretrained: fine-tuning sees too few, too small batches.
BATCH_NORM_TRAINS_FROM = 20_000
BATCH_NORM_MIN_BATCH = 32


@dataclass(frozen=True)
class Choice:
    """One `auto` value, resolved."""

    key: str
    value: Any
    why: str


def resolve(
    recipe: Recipe,
    *,
    anatomy: Anatomy,
    train_samples: int,
    micro_batch_size: int,
    total_steps: int,
    solver: tuple[Solver | None, str] = (None, ""),
) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with optimizer, strategy, schedule and EMA written out, and why each value was chosen.

    `solver` is what `solver: auto` means for this backbone and data, and why.

    Raises:
        RecipeError: no starting rate is published here for the chosen optimizer.
    """
    strategy, optimizer, schedule = recipe.strategy, recipe.optimizer, recipe.schedule
    key, family = _starting_point(strategy), anatomy.family
    start, source = STARTS[key][family], f"{family}, {key}: {_SOURCES[key]}"
    width_factor, why_width = _width_factor(anatomy)
    if key in _ALL_AT_ONE_RATE:
        start = replace(start, lr=start.lr * width_factor)
        source += why_width
    elif start.backbone < 1:
        start = replace(start, backbone=_round(min(1.0, start.backbone * width_factor)))
        source += why_width
    choices: list[Choice] = []

    def choose(place: str, current: Any, value: Any, why: str) -> Any:
        if current != "auto":
            return current
        choices.append(Choice(place, value, why))
        return value

    backbone = recipe.backbone
    why = "a head that starts at zero learns too slowly at this rate" if start.head == "small" else _ZERO
    head = choose("backbone.head_init", backbone.head_init, start.head, why)
    name = choose("optimizer.name", optimizer.name, "adamw", "the default of modern fine-tuning recipes")
    if optimizer.lr == "auto" and name not in LR_FACTORS:
        raise RecipeError(
            f"{recipe.where('optimizer.lr')}: auto has no starting rate for '{name}' "
            f"(only for {', '.join(sorted(LR_FACTORS))}). Set optimizer.lr."
        )
    factor = LR_FACTORS.get(name, 1.0)
    lr = choose(
        "optimizer.lr",
        optimizer.lr,
        _round(start.lr * factor),
        source + (f"; times {factor:g} for {name}" if factor != 1 else ""),
    )
    decay = choose("optimizer.weight_decay", optimizer.weight_decay, start.weight_decay, source)
    optimizer = optimizer.model_copy(update={"name": name, "lr": lr, "weight_decay": decay})

    strategy, strategy_choices = _resolve_strategy(
        strategy, start, source, train_samples, micro_batch_size, solver
    )
    choices += strategy_choices

    scope = choose(
        "schedule.scope", schedule.scope, strategy.schedule_scope, f"what {strategy.name} asks for"
    )
    warmup_value = Duration(start.warmup_percent, "%") if start.warmup_percent and schedule.warms_up else None
    why = source if schedule.warms_up else f"{schedule.name} rises by itself"
    if warmup_value is None and schedule.warms_up:
        why = "a head that starts at zero on fixed features needs none"
    warmup = choose("schedule.warmup", schedule.warmup, warmup_value, why)
    schedule = schedule.model_copy(update={"scope": scope, "warmup": warmup})

    training = recipe.training
    if training.ema is not None:
        value = min(0.9999, max(0.9, 1 - 10 / total_steps))
        why = f"1 - 10/{total_steps} steps, within [0.9, 0.9999]"
        ema_decay = choose("training.ema.decay", training.ema.decay, _round(value), why)
        training = training.model_copy(update={"ema": training.ema.model_copy(update={"decay": ema_decay})})
    resolved = recipe.model_copy(
        update={
            "backbone": backbone.model_copy(update={"head_init": head}),
            "optimizer": optimizer,
            "strategy": strategy,
            "schedule": schedule,
            "training": training,
        }
    )
    return resolved, choices


def _width_factor(anatomy: Anatomy) -> tuple[float, str]:
    """Return what a rate of pretrained layers is multiplied by for this network's width, and why."""
    widths = [p.shape[1] for p in anatomy.parameters if p.group == HEAD and len(p.shape) > 1]
    if not widths:
        return 1.0, ""
    reference, (least, most) = REFERENCE_WIDTHS[anatomy.family], WIDTH_FACTORS
    factor = _round(min(most, max(least, reference / widths[-1])))
    if factor == 1:
        return 1.0, ""
    return factor, f"; times {factor:.3g} for {widths[-1]} features instead of {reference}"


def _starting_point(strategy: StrategySpec) -> str:
    """Return the key of `STARTS` that a strategy stands for."""
    backbone_lr = getattr(strategy, "backbone_lr", None)
    if strategy.name == "discriminative" and isinstance(backbone_lr, Rate) and backbone_lr.value == 0:
        return "frozen"  # which is what the run does
    if (adapter := strategy.to_adapter()) and strategy.name != "phases":
        return adapter.table_row.start
    return "layer_decay" if getattr(strategy, "layer_decay", None) is not None else strategy.name


def _resolve_strategy(
    strategy: StrategySpec,
    start: Start,
    source: str,
    train_samples: int,
    micro_batch_size: int,
    solver: tuple[Solver | None, str],
) -> tuple[StrategySpec, list[Choice]]:
    """Return the strategy with its rates and `batch_norm` written out, and the choices made."""
    batch_norm, why_batch_norm = _batch_norm(train_samples, micro_batch_size)
    values: dict[str, tuple[Any, str]] = {
        "backbone_lr": (Rate(start.backbone, relative=True), source),
        "adapter_lr": (Rate(start.backbone, relative=True), source),
        "full_lr": (Rate(start.backbone, relative=True), source),
        "layer_decay": (start.layer_decay, source),
        "batch_norm": (batch_norm, why_batch_norm),
    }
    for rater in ("layer_decay", "decay"):
        if getattr(strategy, rater, None) is not None:
            values["backbone_lr"] = (None, f"{rater} rates the backbone")
    if getattr(strategy, "solver", None) == "auto":
        values["solver"] = solver
    if values.get("solver", (getattr(strategy, "solver", None), ""))[0]:
        values["probe"] = (
            Duration(1, "steps"),
            "a solver takes one step, and the run is shorter by what gradient steps take",
        )
    else:
        values["probe"] = (PROBE, "long enough to converge, and most of the run is left")
    updates: dict[str, Any] = {}
    choices = []
    for field, (value, why) in values.items():
        if getattr(strategy, field, None) == "auto":
            updates[field] = value
            choices.append(Choice(f"strategy.{field}", "null" if value is None else str(value), why))
    if adapter := strategy.to_adapter():
        written = adapter.without_auto()
        where = "strategy.adapter" if strategy.name == "phases" else "strategy"
        for key in ("r", "alpha"):
            if getattr(adapter, key) == "auto" and written[key] is not None:
                why = f"the usual one for {adapter.method}" if key == "r" else "as the rank: a scale of 1"
                choices.append(Choice(f"{where}.{key}", written[key], why))
        updates |= {"adapter": adapter.model_copy(update=written)} if strategy.name == "phases" else written
    phases = getattr(strategy, "phases", None)
    if phases is not None and any(phase.batch_norm == "auto" for phase in phases):
        updates["phases"] = [
            p.model_copy(update={"batch_norm": batch_norm}) if p.batch_norm == "auto" else p for p in phases
        ]
        choices.append(Choice("strategy.phases.batch_norm", batch_norm, why_batch_norm))
    return strategy.model_copy(update=updates), choices


def _batch_norm(train_samples: int, micro_batch_size: int) -> tuple[BatchNorm, str]:
    if train_samples < BATCH_NORM_TRAINS_FROM:
        return (
            "frozen",
            f"{train_samples} training samples, under {BATCH_NORM_TRAINS_FROM}: keep the pretrained statistics",
        )
    if micro_batch_size < BATCH_NORM_MIN_BATCH:
        return (
            "frozen",
            f"{micro_batch_size} samples per forward, under {BATCH_NORM_MIN_BATCH}: batch statistics too noisy",
        )
    return (
        "train",
        f"{train_samples} training samples and {micro_batch_size} per forward: enough for new statistics",
    )


def _round(value: float) -> float:
    return float(f"{value:.4g}")
