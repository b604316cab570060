"""Strategies: which layers learn when, as data. Adding one is a file here and a line in `STRATEGIES`."""

from __future__ import annotations

from hf_finetune.strategies.adapters import Adapters, LoraPlus, Peft
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.bitfit import BitFit
from hf_finetune.strategies.discriminative import Discriminative
from hf_finetune.strategies.explicit import Explicit
from hf_finetune.strategies.frozen import Frozen
from hf_finetune.strategies.full import Full
from hf_finetune.strategies.gradual import Gradual
from hf_finetune.strategies.lp_ft import LpFt
from hf_finetune.strategies.methods import METHODS
from hf_finetune.strategies.norms import Norms
from hf_finetune.strategies.scratch import Scratch
from hf_finetune.strategies.surgical import Surgical

STRATEGIES: dict[str, type[StrategySpec]] = {
    "scratch": Scratch,
    "full": Full,
    "frozen": Frozen,
    "discriminative": Discriminative,
    "gradual": Gradual,
    "lp_ft": LpFt,
    "surgical": Surgical,
    "bitfit": BitFit,
    "norms": Norms,
    **dict.fromkeys(METHODS, Adapters),
    "lora_plus": LoraPlus,
    "peft": Peft,
    "phases": Explicit,
}
