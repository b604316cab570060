"""Training rows as a stream: read in one order by every process, never held whole, found again without reading anew.

A pass goes over the shards in an order drawn from (seed, pass), `LANES` of them side by side, a row of each in turn.
Blocks of `shuffle_buffer` rows are held and batched by (seed, pass, block) as `order.epoch_batches` does it. So a batch
is a function of the seed and its number. Where a block begins is a few numbers, by which a run that resumes goes on: it
reads that block again, and decodes none of it that has been trained on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from hf_finetune.data.order import epoch_batches
from hf_finetune.data.report import DataReport
from hf_finetune.data.rows import DEFAULT_FRACTION, find_split
from hf_finetune.data.sources import FILE_BUILDERS, Source, open_source, quiet, read_files
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.splits import Splits, class_counts, decode, unmeasured_classes
from hf_finetune.data.targets import encode, find_labels, label_feature
from hf_finetune.errors import DataError, FinetuneError, HubError
from hf_finetune.fetch import from_the_hub

LANES = 8
"""Shards that are read side by side."""
MANY_SHARDS = 4_096
"""Of more, neighbours count as one: taking a shard takes time by their number."""
HELD_ROWS = 10_000
"""Rows that validation is read up to, and that a label column is searched for names."""
KEPT_MARKS = 256
"""Blocks whose beginnings are remembered: loaders read ahead of what is trained on."""
_ENDS = 65_536

Row = dict[str, Any]
"""`{"image": {"bytes", "path"}}` or `{"text"[, "text_pair"]}`, with `"label"`, `"row"`, its number, and `"name"`."""
Mark = dict[str, Any]
"""Where a block begins, as plain numbers: `step`, `pass`, `block`, and the shards that are open there."""


# ---- rows in order -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """What is read one part after the other: files or groups of rows in them, or the rows of a `Dataset`."""

    data: Dataset | IterableDataset
    names: tuple[str, ...] = ()
    """The shards' files, where each is one."""

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self.data) if isinstance(self.data, Dataset) else min(self.data.num_shards, MANY_SHARDS)

    def open(self, shard: int, row: int, state: Any) -> tuple[Iterator[Row], Callable[[], Any]]:
        """Return a shard's rows from `row` on, and what tells its state: what to give as `state` to go on there."""
        if isinstance(self.data, Dataset):
            data = self.data
            return (data[at] for at in ([shard] if row == 0 else [])), lambda: None
        part = self.data.shard(self.count, shard)
        if state:
            part.load_state_dict(state)
        return iter(part), part.state_dict

    def name(self, shard: int, row: int) -> str:
        """Return what a person finds a row by."""
        if isinstance(self.data, Dataset):
            return f"row {shard}"
        return f"row {row} of {repr(self.names[shard]) if self.names else f'shard {shard}'}"


@dataclass
class _Lane:
    shard: int
    row: int
    rows: Iterator[Row]
    state: Callable[[], Any]


class Interleaved:
    """The rows of shards in an order: of `LANES` shards one each in turn, as `(shard, row in the shard, cells)`."""

    def __init__(
        self, shards: Shards, order: Sequence[int] | np.ndarray, where: str, state: Any = None
    ) -> None:
        self.shards, self.order, self.where = shards, order, where
        self.next: int = state["next"] if state else 0
        self.lanes = deque(self._open(*each) for each in (state["open"] if state else ()))

    def state(self) -> Any:
        """Return, as plain data, what continues here."""
        return {"next": self.next, "open": [[each.shard, each.row, each.state()] for each in self.lanes]}

    def __iter__(self) -> Iterator[tuple[int, int, Row]]:
        return self

    def __next__(self) -> tuple[int, int, Row]:
        while True:
            while len(self.lanes) < LANES and self.next < len(self.order):
                self.next += 1
                self.lanes.append(self._open(int(self.order[self.next - 1]), 0, None))
            if not self.lanes:
                raise StopIteration
            lane = self.lanes.popleft()
            try:
                cells = next(lane.rows, None)
            except Exception as error:
                raise self._failed(lane.shard, lane.row, error) from error
            if cells is None:
                continue
            self.lanes.append(lane)
            lane.row += 1
            return lane.shard, lane.row - 1, cells

    def _open(self, shard: int, row: int, state: Any) -> _Lane:
        try:
            return _Lane(shard, row, *self.shards.open(shard, row, state))
        except Exception as error:
            raise self._failed(shard, row, error) from error

    def _failed(self, shard: int, row: int, error: Exception) -> FinetuneError:
        cause = error.__cause__ or error
        text = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300].rstrip(".")
        place = f"data '{self.where}': the stream broke off at {self.shards.name(shard, row)}: {text}"
        if from_the_hub(error):
            return HubError(
                f"{place}. `--resume` goes on from the run's last checkpoint once the Hub answers."
            )
        return DataError(
            f"{place}. Every row needs the same columns, in UTF-8; repair that place. Rows are counted from 0."
        )


class Stream:
    """Training rows that are read as they are needed; `len()` is the samples of an epoch."""

    def __init__(
        self,
        shards: Shards,
        to_row: Callable[[str, int, Row], tuple[Row, str]],
        where: str,
        *,
        samples: int,
        buffer: int,
        seed: int,
        skip: bool,
        skipped: dict[str, int],
    ) -> None:
        self.shards, self.where, self.samples, self.buffer, self.seed = shards, where, samples, buffer, seed
        self.set_aside: dict[int, int] = {}
        """Shard -> its first rows that belong to validation."""
        self.read = 0
        """Rows read so far in this process."""
        self._to_row, self._skip, self._skipped = to_row, skip, skipped
        self._marks: list[Mark] = [
            {"step": 0, "pass": 0, "block": 0, "skipped": 0, "reader": None},
        ]

    def __len__(self) -> int:
        return self.samples

    def batches(self, batch_size: int, step: int = 0) -> Iterator[tuple[int, list[Row]]]:
        """Yield (pass, rows) of each global batch from number `step` on, without an end.

        Raises:
            DataError: a row cannot be used, or a pass holds none.
            HubError: the Hub stopped answering.
        """
        mark = self.mark_at(step)
        number, block, at = mark["pass"], mark["block"], mark["step"]
        reader = self._reader(number, mark["reader"])
        size = batch_size * math.ceil(self.buffer / batch_size)
        self._count_skipped(mark["skipped"], number)
        while True:
            self._remember(
                {
                    "step": at,
                    "pass": number,
                    "block": block,
                    "skipped": self._skipped.get("train", 0),
                    "reader": reader.state(),
                }
            )
            rows = list(islice(self._usable(reader, number), size))
            texts = [[row[name] for name in ("text", "text_pair") if name in row] for row in rows]
            # characters stand in for tokens: what others train on is not tokenised here
            lengths = [sum(map(len, each)) for each in texts] if rows and "text" in rows[0] else None
            planned = epoch_batches(len(rows), batch_size, self.seed, (number, block), lengths)
            for places in planned[max(0, step - at) :]:
                yield number, [rows[place] for place in places]
            at, block = at + len(planned), block + 1
            if len(rows) < size:
                if block == 1 and not rows:
                    raise DataError(f"data '{self.where}': the stream of train holds no row to learn from.")
                number, block = number + 1, 0
                reader = self._reader(number, None)

    def take(self, count: int) -> list[Row]:
        """Return the first `count` rows of the seed's first order, of all there are if these are fewer."""
        return list(islice(self._usable(self._reader(0, None), 1), count))

    def hold_back(self, count: int) -> list[Row]:
        """Return `count` rows for validation, from the beginnings of shards drawn with the seed; no pass has them."""
        order = np.random.default_rng((self.seed, 1)).permutation(self.shards.count)
        reader, rows = Interleaved(self.shards, order, self.where), list[Row]()
        while len(rows) < count and (found := next(reader, None)) is not None:
            shard, at, _ = found
            rows += self._rows(*found, number=1)
            self.set_aside[shard] = at + 1
        return rows

    def mark_at(self, step: int) -> Mark:
        """Return where the block of a batch begins."""
        return max((mark for mark in self._marks if mark["step"] <= step), key=lambda mark: mark["step"])

    def resume(self, mark: Mark) -> None:
        """Let batches from `mark` on be found without reading those before."""
        self._remember(mark)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return what a person finds rows by, from their numbers."""
        return [self.shards.name(*divmod(row, 1 << 32)) for row in sorted(rows)]

    def _reader(self, number: int, state: Any) -> Interleaved:
        order = np.random.default_rng((self.seed, number, 2)).permutation(self.shards.count)
        return Interleaved(self.shards, order, self.where, state)

    def _usable(self, reader: Interleaved, number: int) -> Iterator[Row]:
        for shard, at, cells in reader:
            self.read += 1
            if at >= self.set_aside.get(shard, 0):
                yield from self._rows(shard, at, cells, number)

    def _rows(self, shard: int, at: int, cells: Row, number: int) -> list[Row]:
        name = self.shards.name(shard, at)
        row, problem = self._to_row(name, shard << 32 | at, cells)
        if not problem:
            return [row]
        if not self._skip:
            raise DataError(
                f"data '{self.where}', train: {row.get('name', name)} (rows are counted from 0) cannot be used: "
                f"{problem}. Repair or remove it, or set `data.on_error: skip` to leave such rows out."
            )
        if number == 0:
            self._count_skipped(self._skipped.get("train", 0) + 1, 0)
        return []

    def _count_skipped(self, count: int, number: int) -> None:
        if count and number == 0:
            self._skipped["train"] = count

    def _remember(self, mark: Mark) -> None:
        later = [each for each in self._marks[1:] if each["step"] != mark["step"]]
        later = sorted([*later, mark] if mark["step"] else later, key=lambda each: each["step"])
        self._marks = [self._marks[0], *later[-KEPT_MARKS:]]


# ---- splits ------------------------------------------------------------------------------------------------


def load_streams(spec: DataSpec, *, seed: int, task: Task = "auto", samples: int | None = None) -> Splits:
    """Open a data spec with `streaming: true`; validation is read and held, up to `HELD_ROWS` rows.

    Raises DataError as `load_splits` does, and where the length of train is not known.
    """
    source = open_source(spec)
    notes, warnings = [*source.notes], list[str]()
    shards, asked = _open_split(source, spec, spec.train)
    head = _head(shards, 1, source)
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
        found = train.hold_back(min(HELD_ROWS, max(1, round(total * fraction))))
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
    parts_said = "" if isinstance(shards.data, Dataset) else f" from {shards.count:,} shards"
    notes.append(f"train is a stream: {said}{parts_said}, {spec.shuffle_buffer:,} held at a time")
    report = DataReport(
        source=source.name,
        commit=source.commit,
        rows={role: len(rows) for role, rows in splits.items()},
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
    files = _files(data)
    if isinstance(data, IterableDataset) and data.num_shards < LANES:
        data = data.reshard()  # row groups of parquet files
    names = [str(file).rpartition("/")[2] for file in files]
    same = isinstance(data, IterableDataset) and len(names) == data.num_shards <= MANY_SHARDS
    return Shards(data, tuple(names) if same else ()), name or asked


def _files(data: Dataset | IterableDataset) -> list[str]:
    """Return the files a split is read from, as far as they are known."""
    if isinstance(data, Dataset):
        return [file["filename"] for file in data.cache_files]
    inner = data._ex_iterable
    while not hasattr(inner, "kwargs"):
        inner = inner.ex_iterable
    files = inner.kwargs.get("base_files") or inner.kwargs.get("files") or []
    return list(dict.fromkeys(str(file[0] if isinstance(file, tuple) else file) for file in files))


def _known_rows(shards: Shards, split: str) -> int | None:
    """Return how many rows a split's own metadata say it has."""
    if isinstance(shards.data, Dataset):
        return len(shards.data)
    info = (shards.data.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return int(info.num_examples)
    files = [Path(file) for file in _files(shards.data)]
    if files and all(file.suffix == ".parquet" and file.is_file() for file in files):
        return sum(pq.read_metadata(file).num_rows for file in files)
    return None


def _head(shards: Shards, count: int, source: Source) -> Dataset:
    """Return the first rows as they are, to look at."""
    order = range(min(shards.count, max(LANES, count)))
    with quiet():
        rows = [cells for _, _, cells in islice(Interleaved(shards, order, source.name), count)]
    if not rows:
        raise DataError(f"data '{source.name}': the stream of train holds no row to learn from.")
    return Dataset.from_list(rows, features=shards.data.features)


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
