"""What a loaded backbone is: the network, its anatomy, what it reads, and how it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_finetune.models.anatomy import Anatomy

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.models.adapter import Adapter

Library = Literal["timm", "transformers"]
Modality = Literal["image", "text"]
FEATURES = "features."
"""What the names of a frozen prefix's stored outputs begin with, among a model's inputs."""


@dataclass(frozen=True)
class ImageInput:
    """How the checkpoint wants its images; every value comes from the checkpoint."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Per channel, of pixels in 0..1."""
    std: tuple[float, ...]
    crop_pct: float
    """The image is resized to `size / crop_pct`, then `size` is cropped from it."""
    crop_mode: str
    """`center` and `border` keep the aspect ratio; `squash` resizes both sides to the target."""
    interpolation: str
    """`nearest`, `bilinear`, `bicubic`, `lanczos`, `box` or `hamming`."""


@dataclass(frozen=True)
class TextInput:
    """How the checkpoint wants its texts."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens the backbone takes at most, special tokens included."""


@dataclass(frozen=True)
class LoadReport:
    """What the checkpoint filled. Names are those of the model's tensors: parameters and buffers."""

    loaded: int
    """Number of tensors filled from the checkpoint."""
    missing: tuple[str, ...]
    """In the backbone, not in the checkpoint."""
    mismatched: tuple[str, ...]
    """In the backbone, in the checkpoint with another shape."""
    new: tuple[str, ...]
    """Newly initialised on purpose: in the head, or everything when training from scratch."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not in the model."""
    share: float
    """Share of the backbone's parameters that were filled, by number of elements, the head left out."""
    source: str
    """Where the weights came from."""
    note: str | None = None
    """What a run should say of how it was found: that the Hub's cache stood in for the Hub."""
    kept_head: bool = False
    """The checkpoint's own output layer goes on: it was trained on the same labels."""


@dataclass(frozen=True)
class Backbone:
    """A network with an output layer for the data's labels, and everything known about it."""

    model: nn.Module
    library: Library
    anatomy: Anatomy
    input: ImageInput | TextInput
    report: LoadReport
    source: dict[str, Any]
    """id, revision, commit (when known), folder (None when built from the registry), architecture; of one that was
    quantised, how (`quantize`)."""
    processor: Any = None
    """The image processor of a transformers checkpoint, saved along with the model."""
    adapter: Adapter | None = None
    """The adapters inside the model, if it has any."""

    @property
    def modality(self) -> Modality:
        """What it reads."""
        return "image" if isinstance(self.input, ImageInput) else "text"
