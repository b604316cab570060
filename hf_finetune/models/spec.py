"""What a recipe says about the backbone."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hf_finetune.spec import Spec

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
"""Weights files of torch that are not safetensors."""
HeadInit = Literal["auto", "zero", "small", "library"]
Quantize = Literal["8bit", "4bit"]


class BackboneSpec(Spec):
    """The pretrained network to adapt."""

    id: str = Field("shipped/tiny-resnet", min_length=1)
    """Hub id (`timm/…`, or any transformers repository), local folder in Hub layout, or `shipped/…`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    pretrained: bool = True
    """False starts from random weights."""
    options: dict[str, Any] = {}
    """Passed to the model's constructor (`drop_path_rate`, `attn_implementation`, …)."""
    head_init: HeadInit = "auto"
    """`zero` starts the new output layer at zero, so the first loss is ln(classes); `small` at a standard deviation of
    0.02; `library` as the library does. auto = small where the head of a text model learns at the small rate of what
    lies below it (`full`, `lora` and its like), zero elsewhere."""
    quantize: Quantize | None = None
    """Keep the linear layers of the blocks in `8bit` or `4bit`, for adapters to learn on (bitsandbytes:
    `pip install 'hf_finetune[quantize]'`); null = in full."""
    min_loaded: float = Field(0.9, ge=0, le=1)
    """Smallest share of the backbone's parameters the checkpoint must fill."""
    keep_head: bool = True
    """Keep an output layer that was trained on the same labels in the same order; false starts a new one."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a Hub repository; `revision` then is the whole commit that was read."""
    allow_pickle: str | None = None
    """A weights file that is not safetensors, by its exact name (`pytorch_model.bin`); no code in it is run."""
