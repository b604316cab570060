"""The `cache` section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from hf_finetune.spec import Auto, Spec

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]?B)\s*$")


def parse_size(value: Any) -> int:
    """Read a number of bytes, such as `8GB`; raises ValueError that names the forms allowed."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None or not float(match[1]):
        raise ValueError(f"a size is written with its unit: {', '.join(_UNITS)}, for example 8GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(count: int) -> str:
    """Return a number of bytes with its unit, as `parse_size` reads it."""
    unit = next(unit for unit, size in reversed(_UNITS.items()) if count >= size or unit == "B")
    return f"{count / _UNITS[unit]:.4g}{unit}"


def _exact(count: int) -> str | int:
    text = size_text(count)
    return text if parse_size(text) == count else count


SizeField = Annotated[int, BeforeValidator(parse_size), PlainSerializer(_exact)]


class CacheSpec(Spec):
    """What a frozen prefix of the network computes is kept on disk, so that it is computed once."""

    views: Annotated[int, Field(ge=1)] | None = None
    """Random views of each training sample that are computed; epoch e trains on view e mod views. null = with random
    augmentation every epoch is computed anew, for it shows other views."""
    budget: SizeField = 8 * 10**9
    """Disk space that the features of one run may take."""
    dtype: Literal["fp32", "fp16", "bf16"] | Auto = "auto"
    """Number format on disk; auto = as computed, or fp16 where only that fits the budget."""
