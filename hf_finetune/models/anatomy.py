"""The anatomy of a backbone: its layer groups from input to output, and what each parameter is.

Plain data without tensors, so that strategies can be written, checked and tested without a network in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Family = Literal["cnn", "vit", "text"]

HEAD = "head"


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor by its qualified name."""

    name: str
    shape: tuple[int, ...]
    group: str
    """Name of the layer group it belongs to."""
    is_bias: bool
    in_norm: bool
    """Weight or bias of a normalisation layer, by module type (BatchNorm and GroupNorm included)."""
    decays: bool
    """Whether weight decay applies: not to biases, normalisation layers, nor what the architecture exempts."""
    in_batch_norm: bool = False
    """Weight or bias of a layer that keeps running statistics of its batches."""
    is_new: bool = False
    """Newly initialised: the checkpoint does not hold it."""
    is_adapter: bool = False
    """Added to a pretrained layer by an adapter method; its group is that layer's."""
    is_output: bool = False
    """Weight or bias of the layer whose outputs are the logits."""
    is_fixed: bool = False
    """Never trained: quantised weights, or a constant that a library keeps as a parameter."""

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Anatomy:
    """A backbone as an ordered list of layer groups: stem, block.0 … block.N-1, head."""

    family: Family
    groups: tuple[str, ...]
    """Names from input to output; the last is `head`."""
    parameters: tuple[Parameter, ...]

    @property
    def trainable(self) -> Iterator[Parameter]:
        """The parameters that a phase can train."""
        return (parameter for parameter in self.parameters if not parameter.is_fixed)

    def names_in(self, groups: set[str] | frozenset[str]) -> frozenset[str]:
        """Return the names of the trainable parameters of these layer groups."""
        return frozenset(p.name for p in self.trainable if p.group in groups)

    def depth_from_top(self, group: str) -> int:
        """Return how many layer groups lie above: 0 for the head."""
        return len(self.groups) - 1 - self.groups.index(group)
