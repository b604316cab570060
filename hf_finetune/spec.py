"""The base every part's specification stands on, and the units a recipe speaks in.

A spec is a frozen, keyword-only pydantic model beside the code it configures; the recipe is their composition.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer

Auto = Literal["auto"]
T = TypeVar("T")


def resolved(value: T | Auto) -> T:
    """Return a value that was `auto` at most until the recipe was resolved."""
    assert value != "auto", "resolve the recipe first"
    return value


class Spec(BaseModel):
    """A frozen specification that refuses unknown keys and implicit type changes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""


@dataclass(frozen=True)
class Duration:
    """A stretch of training: `N epochs`, `N steps` (optimizer steps) or `N%` of the run."""

    amount: float
    unit: Literal["epochs", "steps", "%"]

    def to_steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """Return the duration in optimizer steps, at least 1."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "%": total_steps / 100}[self.unit]
        return max(1, round(self.amount * per_unit))

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{self.amount:g}%"
        return f"{self.amount:g} {self.unit if self.amount != 1 else self.unit[:-1]}"


_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|%)\s*$")
DURATION_FORMS = "`N epochs`, `N steps` or `N%`"


def parse_duration(value: Any) -> Duration:
    """Read a duration; raises ValueError that names the forms allowed."""
    if isinstance(value, Duration):
        return value
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        hint = (
            f" For example '{value} epochs'."
            if isinstance(value, int) and not isinstance(value, bool)
            else ""
        )
        raise ValueError(f"a duration is written {DURATION_FORMS}.{hint}")
    amount, unit = float(match[1]), match[2]
    if amount <= 0:
        raise ValueError("a duration is longer than zero")
    if unit == "%" and amount > 100:
        raise ValueError("a duration is at most 100% of the run")
    if unit.startswith("step") and amount != int(amount):
        raise ValueError("a number of steps is whole")
    return Duration(amount, "%" if unit == "%" else "epochs" if unit.startswith("epoch") else "steps")


@dataclass(frozen=True)
class Rate:
    """A learning rate: absolute (`3e-4`) or a multiple of the base rate (`0.1x`)."""

    value: float
    relative: bool

    def multiple_of(self, base: float) -> float:
        """Return this rate as a multiple of the base rate."""
        return self.value if self.relative else self.value / base

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.relative else f"{self.value:g}"


_MULTIPLE = re.compile(r"^\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*x\s*$")


def parse_rate(value: Any) -> Rate:
    """Read a learning rate; raises ValueError that names the forms allowed."""
    if isinstance(value, Rate):
        return value
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    ):
        return Rate(float(value), relative=False)
    match = _MULTIPLE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            "a rate is a number such as 3e-4, or a multiple of the base rate such as '0.1x'; not negative"
        )
    return Rate(float(match[1]), relative=True)


@dataclass(frozen=True)
class Size:
    """A number of bytes, written with its unit: `8GB`."""

    bytes: int

    def __str__(self) -> str:
        unit = next(unit for unit in reversed(_UNITS) if self.bytes >= _UNITS[unit] or unit == "B")
        return f"{self.bytes / _UNITS[unit]:.4g}{unit}"


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)\s*$", re.IGNORECASE)


def parse_size(value: Any) -> Size:
    """Read a number of bytes; raises ValueError that names the units allowed."""
    if isinstance(value, Size):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None or not float(match[1]):
        raise ValueError(f"a size is a number above 0 and its unit ({', '.join(_UNITS)}), such as 8GB")
    return Size(int(float(match[1]) * _UNITS[match[2].upper()]))


def _plain_rate(rate: Rate) -> str | float:
    return str(rate) if rate.relative else rate.value


DurationField = Annotated[Duration, BeforeValidator(parse_duration), PlainSerializer(str)]
RateField = Annotated[Rate, BeforeValidator(parse_rate), PlainSerializer(_plain_rate)]
SizeField = Annotated[Size, BeforeValidator(parse_size), PlainSerializer(str)]
