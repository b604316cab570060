"""What a recipe says about the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.spec import Auto, Size, SizeField, Spec

LabelKind = Literal["single", "multi", "regression"]
AugmentOn = Literal["auto", "workers", "accelerator"]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class ColumnsSpec(Spec):
    """Which columns of the table hold what."""

    image: str = "image"
    """The images: files, paths, or what `datasets` decodes."""
    text: str | Annotated[list[str], Field(min_length=1, max_length=2)] = "text"
    """One column, or a list of two for sentence pairs."""
    label: str = "label"
    """Class names or numbers; a list of them for multi-label, a number for regression."""


class DataSpec(Spec):
    """The examples to learn from and to be measured on."""

    path: str | Annotated[list[str], Field(min_length=1)] = "shipped/digits"
    """Hub id, image folder, csv/tsv/json/jsonl/parquet file(s), a folder from `save_to_disk`, or `shipped/…`."""
    config: str | None = None
    """Configuration name of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    train: str = "train"
    """Split name, slice (`train[:90%]`) or file name."""
    validation: Auto | Fraction | str = "auto"
    """Split name or slice, a fraction of train, or auto: the set's own validation split, else 0.2 of train."""
    test: str | None = None
    """Split name, slice or file name; measured by `evaluate … split=test` only."""
    streaming: bool = False
    """Read train as a stream that is never loaded or downloaded whole; validation is read up to 10,000 rows."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 1000
    """Rows of a stream that are held and shuffled at a time, beside the shuffled order of its files."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Training rows of a stream whose own metadata do not say; without it `training.steps` sets the length."""
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """Label names of a stream in the model's order; null = the set's own, else those of its first 10,000 rows."""
    columns: ColumnsSpec = ColumnsSpec()
    """What the columns are called."""
    labels: LabelKind = "single"
    """One class per row, any number of classes per row, or a value."""
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """`balanced` weighs a class by the inverse of its frequency in train; a mapping gives weights by label name."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Per split, drawn with the seed; for trying things out."""
    max_length: Annotated[int, Field(ge=2)] | Auto = "auto"
    """Tokens kept of a text; auto = what the backbone takes, at most 512."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a row that cannot be used: name it and stop, or skip and count it."""
    cache: Literal["decoded"] | None = None
    """`decoded` keeps every image on disk as pixels, as far as all its views are the same, for this run and later
    ones. What is measured is the same to the bit; of images much larger than `random_resized_crop` needs, training
    sees crops of a smaller copy."""
    cache_budget: SizeField = Size(50 * 10**9)
    """Disk space that the decoded images of one split may take."""
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Processes that load data, per training process; auto = none for text, for images by the cores free."""
    augment_on: AugmentOn = "auto"
    """Where images are augmented once they have the model's size: one by one in the workers, or as uint8 batches on the
    accelerator; the same views within rounding. auto = the accelerator, where that is a GPU with few cores for each
    process."""
