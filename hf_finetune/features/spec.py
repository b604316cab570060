"""The `cache` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.spec import Size, SizeField, Spec


class CacheSpec(Spec):
    """What frozen layers compute is kept on disk, so that it is computed once."""

    views: Annotated[int, Field(ge=1)] | None = None
    """With random augmentation, how many views of each training sample are computed; epoch e trains on view e mod
    views. null = every epoch shows views of its own, which are computed anew."""
    budget: SizeField = Size(8 * 10**9)
    """Disk space that the features of one phase may take."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format on disk; null = as computed, or fp16 where only that fits the budget."""
