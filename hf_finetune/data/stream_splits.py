"""From a data spec with `streaming: true` to splits: train as a stream, validation read and held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from hf_finetune.data import checks
from hf_finetune.data.columns import Modality, Task, find_columns, find_modality
from hf_finetune.data.fingerprint import digest, fingerprint
from hf_finetune.data.labels import Labels
from hf_finetune.data.report import DataReport
from hf_finetune.data.rows import DEFAULT_FRACTION, find_split
from hf_finetune.data.sources import FILE_BUILDERS, Source, open_source, read_files
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import Splits, class_counts, decode, unmeasured_classes
from hf_finetune.data.streams import LANES, MANY_SHARDS, Interleaved, Row, Shards, Stream
from hf_finetune.data.targets import encode, find_labels, label_feature
from hf_finetune.errors import DataError, HubError, first_line
from hf_finetune.fetch import from_the_hub

HELD_ROWS = 10_000
"""Rows that validation is read up to, and that a label column is searched for names."""
LOOKED_AT = 32
"""Rows by which images are told from texts, and columns found."""
_ENDS = 65_536
"""Bytes of a file's beginning and end that its fingerprint counts, beside its size."""


def load_streams(spec: DataSpec, *, seed: int, task: Task = "auto", samples: int | None = None) -> Splits:
    """Open a data spec with `streaming: true`; validation is read and held, up to `HELD_ROWS` rows.

    `samples` is how many samples the run takes, where that is known: the epoch of a stream of unknown length.

    Raises DataError as `load_splits` does, and where the length of train is not known.
    """
    source = open_source(spec)
    notes, warnings = [*source.notes], list[str]()
    shards, asked = _open_split(source, spec, spec.train)
    head = _head(shards, source)
    modality = find_modality(task, head, spec.columns)
    columns = find_columns(head, spec.columns, modality, notes, where=source.name)
    labels, how = _labels(spec, shards, head, columns["label"], source)
    notes += [how] if how else []
    known = _known_rows(shards, asked)
    total = known or spec.rows
    if total is None and samples is None:
        raise DataError(
            f"data '{source.name}': a stream whose files do not say how many rows they hold has no epochs. Set "
            "`training.steps`, or the number in `data.rows`."
        )
    skipped: dict[str, int] = {}

    def stream(parts: Shards, split: str, length: int) -> Stream:
        cells = partial(_to_row, spec=spec, labels=labels, columns=columns, modality=modality, source=source)
        return Stream(
            parts,
            partial(cells, feature=_features(parts, head)[columns["label"]], check=split != "train"),
            f"{source.name}",
            samples=length,
            buffer=spec.shuffle_buffer,
            seed=seed,
            skip=spec.on_error == "skip",
            skipped=skipped if split == "train" else {},
        )

    train = stream(shards, "train", total or samples or 1)
    splits, where = {}, {"train": asked}
    own = find_split(source, "validation")
    fraction = spec.validation if isinstance(spec.validation, float) else DEFAULT_FRACTION
    if isinstance(spec.validation, str) and (
        spec.validation != "auto" or (own and own != find_split(source, spec.train))
    ):
        name = own if spec.validation == "auto" else spec.validation
        parts, where["validation"] = _open_split(source, spec, str(name))
        held = stream(parts, "validation", 1)
        found = held.take(HELD_ROWS + 1)
        if len(found) > HELD_ROWS:
            found = found[:HELD_ROWS]
            notes.append(
                f"validation is {HELD_ROWS:,} rows of '{name}', drawn with the seed: more are not held"
            )
        held_out = None
    elif total is None:
        raise DataError(
            f"data.validation: {spec.validation} of train cannot be set aside from a stream of unknown length. Name "
            f"a split or file for validation (there is {', '.join(source.splits)}), or set the number of rows in "
            "`data.rows`."
        )
    else:
        held_out = fraction
        count = min(HELD_ROWS, max(1, round(total * fraction)))
        found = train.hold_back(count)
        if len(found) < count:
            says = "their files" if known else "data.rows"
            raise DataError(
                f"data '{source.name}': train has {len(found):,} rows that can be used, no more than are set aside for "
                f"validation, {fraction:g} of the {total:,} that {says} say. "
                f"{'Look at the rows' if known else 'Correct data.rows'}, or lower data.validation."
            )
        where["validation"] = asked
        notes.append(
            f"{len(found):,} rows of train are set aside for validation: the beginnings of files that are drawn with "
            "the seed"
            if isinstance(shards.data, IterableDataset)
            else f"{len(found):,} rows of train are set aside for validation, drawn with the seed"
        )
        train.samples = max(1, total - len(found))
    if not found:
        raise DataError(f"data '{source.name}': no row of validation can be used.")
    splits["validation"] = hold(found, labels, where["validation"])
    if not train.take(1):
        raise DataError(f"data '{source.name}': the stream of train holds no row to learn from.")
    counts = class_counts(splits["validation"], labels)
    if unmeasured := [name for name, count in zip(labels.names, counts, strict=False) if not count]:
        warnings.append(unmeasured_classes(unmeasured))
    said = (
        f"{train.samples:,} rows" if total else "rows of unknown number, so that an epoch is the whole run,"
    )
    number = len(_files(shards.data)) if shards.names else 0
    files = f" from {number:,} file{'s'[: number > 1]}" if number else ""
    notes.append(f"train is a stream: {said}{files}, {spec.shuffle_buffer:,} held at a time")
    report = DataReport(
        source=source.name,
        commit=source.commit,
        rows=({"train": train.samples} if total else {}) | {role: len(rows) for role, rows in splits.items()},
        class_counts={role: dict(zip(labels.names, counts, strict=False)) for role in splits},
        columns=columns,
        fingerprint=digest(
            repr((labels, columns, total)).encode(),
            _content(shards, source),
            *(fingerprint(rows).encode() for rows in splits.values()),
        ),
        splits=where,
        held_out=held_out,
        skipped=skipped,
        image_side=None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    return Splits(
        train=train,
        validation=splits["validation"],
        test=None,
        labels=labels,
        modality=modality,
        report=report,
        train_counts=(),
    )


def hold(rows: Sequence[Row], labels: Labels, split: str) -> Dataset:
    """Return rows of a stream as a split that is held, as `Splits` describes one."""
    features: dict[str, Any] = {"text": Value("string"), "text_pair": Value("string")}
    features |= {"image": Image(decode=False), "label": label_feature(labels), "row": Value("int64")}
    used = Features({name: feature for name, feature in features.items() if name in rows[0]})
    held = Dataset.from_dict({name: [row[name] for row in rows] for name in used}, features=used)
    return held.with_transform(partial(decode, split=split))


# ---- opening -----------------------------------------------------------------------------------------------


def _open_split(source: Source, spec: DataSpec, asked: str) -> tuple[Shards, str]:
    """Return the shards of a split or file by name, and the split's own name."""
    name = find_split(source, asked)
    data = source.splits[name] if name else None
    if data is None:
        for place in ((source.folder or Path()) / asked, Path(asked).expanduser()):
            if place.suffix.lower() in FILE_BUILDERS and place.is_file():
                data = read_files([place], streaming=True)
                break
        else:
            raise DataError(
                f"data '{source.name}': there is no split or file '{asked}'. Splits there are: "
                f"{', '.join(source.splits)}."
            )
    features = data.features or {}
    for column, feature in features.items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
    if isinstance(data, IterableDataset) and data.num_shards < LANES:
        try:
            data = data.reshard()  # row groups of parquet files
        except Exception as error:
            _parquet_rows(data)  # raises for the file that is broken
            what = f"data '{source.name}': its files cannot be opened: {first_line(error).rstrip('.')}"
            if from_the_hub(error):
                raise HubError(f"{what}. Run again once the Hub answers.") from error
            raise DataError(f"{what}. Repair or remove the broken one.") from error
    return Shards(data, _names(data)), name or asked


def _parts(data: IterableDataset) -> tuple[list[str], list[Any]]:
    """Return the file that each shard is read from, as far as it is known, and which row groups of it; None for all."""
    inner = data._ex_iterable
    while not hasattr(inner, "kwargs"):
        inner = inner.ex_iterable
    files = inner.kwargs.get("base_files") or inner.kwargs.get("files") or []
    groups = inner.kwargs.get("row_groups_list") or [None] * len(files)
    return [str(file[0] if isinstance(file, tuple) else file) for file in files], groups


def _names(data: Dataset | IterableDataset) -> tuple[str, ...]:
    """Return what a person calls each shard by; nothing where a shard is no one file or part of one."""
    if isinstance(data, Dataset):
        return ()
    files, groups = _parts(data)
    if len(files) != data.num_shards or data.num_shards > MANY_SHARDS:
        return ()
    shares = Counter(files)
    return tuple(
        (f"row group {group[0]} of " if shares[file] > 1 else "") + repr(file.rpartition("/")[2])
        for file, group in zip(files, groups, strict=True)
    )


def _files(data: Dataset | IterableDataset) -> list[str]:
    """Return the files a split is read from, as far as they are known."""
    if isinstance(data, Dataset):
        return [file["filename"] for file in data.cache_files]
    return list(dict.fromkeys(_parts(data)[0]))


def _parquet_rows(data: IterableDataset) -> int | None:
    """Return the rows of parquet files of this machine, None of others. Raises DataError for a broken one."""
    files, rows = [Path(file) for file in _files(data)], 0
    if not files or not all(file.suffix == ".parquet" and file.is_file() for file in files):
        return None
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except Exception as error:
            raise DataError(
                f"data '{file}': it cannot be read as parquet: {first_line(error).rstrip('.')}. "
                "Repair or remove this file."
            ) from error
    return rows


def _known_rows(shards: Shards, split: str) -> int | None:
    """Return how many rows a split's own metadata say it has."""
    if isinstance(shards.data, Dataset):
        return len(shards.data)
    info = (shards.data.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return int(info.num_examples)
    return _parquet_rows(shards.data)


def _head(shards: Shards, source: Source) -> Dataset:
    """Return the first rows as they are, to look at."""
    reader = Interleaved(shards, range(min(shards.count, LOOKED_AT)), source.name)
    rows = [cells for _, _, cells in islice(reader, LOOKED_AT)]
    if not rows:
        raise DataError(f"data '{source.name}': the stream of train holds no row to learn from.")
    try:
        return Dataset.from_list(rows, features=shards.data.features)
    except Exception as error:
        raise DataError(
            f"data '{source.name}': the first {len(rows)} rows of train do not go together: {error}. Every row needs "
            "the same columns, of one type each."
        ) from error


def _features(shards: Shards, head: Dataset) -> Mapping[str, Any]:
    return shards.data.features or head.features


def _labels(
    spec: DataSpec, shards: Shards, head: Dataset, column: str, source: Source
) -> tuple[Labels, str | None]:
    """Return the labels, and a note where they were found by reading."""
    feature = head.features[column]
    inner = getattr(feature, "feature", feature)
    if spec.labels == "regression":
        return Labels("regression", (column,)), None
    if spec.classes is not None:
        return Labels(spec.labels, tuple(spec.classes)), None
    if isinstance(inner, ClassLabel):
        return Labels(spec.labels, tuple(inner.names)), None
    if isinstance(shards.data, Dataset):
        labels, how = find_labels(shards.data[column], feature, spec.labels, column), None
    else:
        order = np.random.default_rng(0).permutation(shards.count)
        reader = Interleaved(shards, order, source.name)
        cells = [cells[column] for _, _, cells in islice(reader, HELD_ROWS)]
        labels = find_labels(cells, feature, spec.labels, column)
        how = (
            f"the labels are the {labels.outputs} found in {len(cells):,} rows; name them in data.classes where "
            "others come later"
        )
    if labels.outputs < (2 if spec.labels == "single" else 1):
        only = f"only '{labels.names[0]}'" if labels.names else "no label"
        raise DataError(
            f"data '{source.name}': the first rows of train hold {only}; "
            "there is nothing to tell apart. Name all labels in data.classes, or check data.columns.label."
        )
    return labels, how


def _to_row(
    name: str,
    number: int,
    cells: Row,
    *,
    spec: DataSpec,
    labels: Labels,
    columns: Mapping[str, str],
    modality: Modality,
    source: Source,
    feature: Any,
    check: bool,
) -> tuple[Row, str]:
    """Return a row as the model's sets take it, and what is wrong with it."""
    row: Row = {"row": number, "name": name}
    missing = next((column for column in columns.values() if column not in cells), None)
    if missing is not None:
        return row, f"it has no column '{missing}'"
    if modality == "image":
        cell = cells[columns["image"]]
        if isinstance(cell, str):
            cell = {"bytes": None, "path": str((source.folder or Path()) / cell)}
        elif not isinstance(cell, dict):
            cell = {"bytes": cell, "path": None}
        row["image"] = cell
        if cell["bytes"] is None and cell["path"]:
            row["name"] = f"'{cell['path']}'"
        if check or spec.on_error == "skip":  # what only decoding shows stops the run
            found = checks.check_image(cell, full=check and spec.on_error == "skip")
            if isinstance(found, str):
                return row, found
    else:
        for meaning in (each for each in ("text", "text_pair") if each in columns):
            cell = cells[columns[meaning]]
            if cell is None or not str(cell).strip():
                return row, "no text" if cell is None else "empty text"
            row[meaning] = str(cell)
    column = columns["label"]
    target, problem = encode(cells[column], feature, labels, labels.label2id(), column)
    if problem.startswith("label '"):
        problem += "; name all labels in data.classes"
    return {**row, "label": target}, problem


def _content(shards: Shards, source: Source) -> bytes:
    """Return what identifies a stream's content: its commit and files, or its files by name, size and both ends."""
    if source.commit:
        return repr((source.commit, sorted(_files(shards.data)))).encode()
    if isinstance(shards.data, Dataset) and not shards.data.cache_files:
        column = next((n for n, f in shards.data.features.items() if isinstance(f, Image)), None)
        rows = shards.data if column in (None, "image") else shards.data.rename_column(column, "image")
        return fingerprint(rows).encode()
    parts = []
    for file in sorted(map(Path, _files(shards.data))):
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(_ENDS)
            opened.seek(max(0, size - _ENDS))
            parts.append(digest(file.name.encode(), str(size).encode(), first, opened.read()))
    return digest(*(part.encode() for part in parts)).encode()
