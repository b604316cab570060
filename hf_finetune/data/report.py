"""What was found in the data, as plain facts for `explain`, the model card and the run's record."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataReport:
    """The facts of a loaded data set; nothing here changes what is trained on."""

    source: str
    """Where the rows came from: a folder, the files, a Hub id with its revision."""
    rows: dict[str, int]
    """Split role (train, validation, test) -> rows used."""
    class_counts: dict[str, dict[str, int]]
    """Split role -> label name -> rows; empty for regression."""
    columns: dict[str, str]
    """Meaning (image, text, text_pair, label) -> column of the source."""
    fingerprint: str
    """Hash of the rows used: equal data, equal fingerprint, wherever it lies."""
    commit: str | None = None
    """Of a Hub data set: the commit that was read."""
    splits: dict[str, str] = field(default_factory=dict)
    """Split role -> the source's split or slice of it, or the file."""
    whole: dict[str, int] = field(default_factory=dict)
    """Split role -> rows it had before `max_samples` were drawn from it; only where some were left out."""
    held_out: float | None = None
    """Share of the training split that was drawn for validation; None where validation has rows of its own."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Split role -> rows dropped under `on_error: skip`."""
    skipped_rows: tuple[str, ...] = ()
    """The first dropped rows, each with its reason."""
    image_side: int | None = None
    """Median short side of the training images in pixels; None for text."""
    size: int | None = None
    """Bytes of the rows used, where that is known."""
    notes: tuple[str, ...] = ()
    """Choices made for the user: a validation split drawn, a column found by another name."""
    warnings: tuple[str, ...] = ()
    """What the user should look at: a class without a validation sample, texts that were cut."""
