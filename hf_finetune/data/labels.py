"""What a data set's labels are: their kind and the name of every output of the model."""

from __future__ import annotations

from dataclasses import dataclass

from hf_finetune.data.spec import LabelKind


@dataclass(frozen=True)
class Labels:
    """The labels of a data set in the order of the model's outputs."""

    kind: LabelKind
    names: tuple[str, ...]
    """Class names; for regression the one label column's name."""

    @property
    def outputs(self) -> int:
        """Number of outputs the model needs."""
        return len(self.names)

    def id2label(self) -> dict[int, str]:
        """Return output index -> name, as a Hub config stores it."""
        return dict(enumerate(self.names))

    def label2id(self) -> dict[str, int]:
        """Return name -> output index, as a Hub config stores it."""
        return {name: index for index, name in enumerate(self.names)}
