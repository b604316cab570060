"""Which columns: what the rows are (images or texts) and where image, text and label are read from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, Dataset, Image, Value

from hf_finetune.data.sources import IMAGE_SUFFIXES
from hf_finetune.data.spec import ColumnsSpec
from hf_finetune.errors import DataError, did_you_mean

Modality = Literal["image", "text"]
Task = Literal["auto", "image-classification", "text-classification"]

ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "photo", "file_name", "filename", "image_path", "file", "path"),
    "text": ("text", "sentence", "review", "content", "comment", "tweet", "document", "body", "message"),
    "label": ("label", "labels", "target", "class", "category", "sentiment", "score", "fine_label"),
}
"""Names tried in this order where the recipe leaves a column at its default and none is there."""


def column_values(rows: Dataset, column: str) -> list[Any]:
    """Return one column as plain Python values, without decoding it or touching the others."""
    return gather(rows, rows.data.column(column))


def gather(rows: Dataset, values: Any) -> list[Any]:
    """Return, of an arrow array made from a whole column, the values of the rows that are selected."""
    plain: list[Any] = values.to_pylist()
    if rows._indices is None:
        return plain
    # the library gathers selected rows ten times slower
    return [plain[at] for at in rows._indices.column(0).to_pylist()]


def image_cells(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the images undecoded, as `{"bytes", "path"}`, a few at a time: together they may not fit in memory."""
    plain = rows.with_format(None).select_columns(["image"])
    for start in range(0, len(plain), 256):
        yield from (cell or {"bytes": None, "path": None} for cell in plain[start : start + 256]["image"])


def find_modality(task: Task, rows: Dataset, spec: ColumnsSpec) -> Modality:
    """Return what the rows are: by the task, else image for an image feature or a column of image paths."""
    if task != "auto":
        return "image" if task == "image-classification" else "text"
    if any(_is_image(feature) for feature in rows.features.values()):
        return "image"
    names = [spec.image] if spec.image != ColumnsSpec().image else ALIASES["image"]
    return "image" if any(_holds_paths(rows, name) for name in names if name in rows.column_names) else "text"


def find_columns(
    rows: Dataset,
    spec: ColumnsSpec,
    modality: Modality,
    notes: list[str],
    *,
    where: str,
    labelled: bool = True,
) -> dict[str, str]:
    """Return meaning (image, text, text_pair, label) -> column; `notes` gets those found by another name.

    A column left at its default is also found by its usual other names, or as the only one of its type.
    Raises DataError with the nearest name and the columns there are.
    """
    texts = [spec.text] if isinstance(spec.text, str) else spec.text
    asked = (
        {"image": spec.image}
        if modality == "image"
        else dict(zip(("text", "text_pair"), texts, strict=False))
    )
    if labelled:
        asked["label"] = spec.label
    found = {}
    for meaning, name in asked.items():
        key = "text" if meaning == "text_pair" else meaning
        guess = name
        if name not in rows.column_names and getattr(ColumnsSpec(), key) == name:
            guess = _guess(rows, meaning, [*asked.values()]) or name
        if guess not in rows.column_names:
            raise DataError(
                f"data '{where}': there is no column '{name}' to read the {key} from."
                f"{did_you_mean(name, rows.column_names)} The columns are {', '.join(rows.column_names)}. "
                f"Name the right one in data.columns.{key}.{_other_modality(rows, spec, modality, key)}"
            )
        if guess != name:
            notes.append(f"the {key} is read from the column '{guess}'; data.columns.{key} names another")
        found[meaning] = guess
    return found


def _guess(rows: Dataset, meaning: str, taken: list[str]) -> str | None:
    by_name = [alias for alias in ALIASES[meaning] if alias in rows.column_names]
    fits = {
        "image": _is_image,
        "text": lambda feature: isinstance(feature, Value) and "string" in feature.dtype,
        "label": lambda feature: isinstance(feature, ClassLabel),
    }[meaning]
    labels = ALIASES["label"] if meaning == "text" else ()
    by_type = [
        name for name, feature in rows.features.items() if fits(feature) and name not in (*taken, *labels)
    ]
    return by_name[0] if by_name else by_type[0] if len(by_type) == 1 else None


def _other_modality(rows: Dataset, spec: ColumnsSpec, modality: Modality, key: str) -> str:
    other = find_modality("auto", rows, spec)
    return f" The data looks like {other}s: is `task` right?" if key != "label" and other != modality else ""


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image)


def _holds_paths(rows: Dataset, name: str) -> bool:
    if (
        not isinstance(rows.features[name], Value)
        or "string" not in rows.features[name].dtype
        or not len(rows)
    ):
        return False
    return Path(str(rows.with_format(None)[0][name])).suffix.lower() in IMAGE_SUFFIXES
