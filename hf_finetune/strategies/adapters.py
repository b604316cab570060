"""Adapters and the head: LoRA and its relatives (peft)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.spec import Auto, DurationField, Rate, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.methods import AdapterOptions, AdapterSpec, check_keys
from hf_finetune.strategies.phase import BatchNorm, Phase


class Adapters(StrategySpec, AdapterOptions):
    """Small additions to the layers of the blocks, and the head; the pretrained weights stay as they are."""

    name: Literal[
        "lora",
        "dora",
        "rslora",
        "pissa",
        "adalora",
        "ia3",
        "vera",
        "oft",
        "boft",
        "loha",
        "lokr",
        "ln_tuning",
    ]
    probe: DurationField | None = None
    """How long the head trains alone first; null = not at all."""
    adapter_lr: RateField | Auto = "auto"
    """Rate of the adapters; the head runs at the base rate."""
    batch_norm: BatchNorm = "frozen"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; statistics that move are kept with the adapter."""

    @model_validator(mode="after")
    def _keys_apply(self) -> Adapters:
        check_keys(self, self.to_adapter().method)
        return self

    def to_adapter(self) -> AdapterSpec:
        return self._adapter_of(self.name)

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        rate = resolved(self.adapter_lr)
        main = Phase(
            train=["adapters", HEAD], backbone_lr=rate, rates=self._rates(rate), batch_norm=self.batch_norm
        )
        return [main] if self.probe is None else [Phase(train=HEAD, for_=self.probe), main]

    def _adapter_of(self, method: str) -> AdapterSpec:
        # Their own validation has passed: nothing is checked twice.
        return AdapterSpec.model_construct(
            method=method, **{key: getattr(self, key) for key in AdapterOptions.model_fields}
        )

    def _rates(self, rate: Rate) -> dict[str, Rate]:
        return {}


class LoraPlus(Adapters):
    """LoRA whose second matrix learns faster than the first; the head has a rate of its own (arXiv 2402.12354)."""

    name: Literal["lora_plus"] = "lora_plus"  # type: ignore[assignment]
    ratio: Annotated[float, Field(ge=1)] = 16.0
    """The second matrix (B) runs at this multiple of the first one's rate (`adapter_lr`)."""

    def _rates(self, rate: Rate) -> dict[str, Rate]:
        return {r"\.lora_B\.": Rate(rate.value * self.ratio, rate.relative)}


class Peft(Adapters):
    """Adapters of any method of peft, named by `method`, with its own `options`."""

    name: Literal["peft"] = "peft"  # type: ignore[assignment]
    method: str = "lora"
    """A strategy's name such as `lora`, or any method of peft (`hra`, `miss`, `randlora`, …)."""

    def to_adapter(self) -> AdapterSpec:
        return self._adapter_of(self.method)
