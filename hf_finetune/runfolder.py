"""The run folder: what a run writes as it goes, and how it is read again.

`recipe.yaml` what was asked, `metrics.jsonl` one row per log event, `run.json` how it stands, `model/` the
best weights. Every write leaves the folder readable, whatever happens next: rows are appended whole, the rest
is replaced atomically.
"""

from __future__ import annotations

import difflib
import errno
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hf_finetune.durable import replace_text
from hf_finetune.errors import FinetuneError, UserError

Row = dict[str, Any]
"""One line of metrics.jsonl: `step`, `epoch`, `phase`, `phase_index`, `split` (train | validation | test),
`seconds` and `loss`; training rows add `lr` (group -> rate) and `samples_per_second`, the others `metrics`
(name -> value)."""

RECIPE, METRICS, STATUS, MODEL, CHECKPOINTS = (
    "recipe.yaml",
    "metrics.jsonl",
    "run.json",
    "model",
    "checkpoints",
)
PREDICTIONS = "predictions.json"
PACKAGES = (
    "hf-finetune", "torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "peft",
    "evaluate", "safetensors", "huggingface_hub", "tokenizers", "scikit-learn", "numpy", "pydantic", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run in progress, written by the main process."""

    path: Path

    @classmethod
    def create(cls, output: str | None, recipe_name: str, backbone_name: str) -> RunFolder:
        """Make and claim the folder `output`, or `runs/<recipe>-<backbone>-<time>` when that is None.

        Raises:
            UserError: `output` is a file, or holds a run already.
            FinetuneError: the folder cannot be written.
        """
        with writing(Path(output or "runs")):
            path = _new_folder(recipe_name, backbone_name) if output is None else _given_folder(Path(output))
            status = {"status": "running", "started": datetime.now().astimezone().isoformat("T", "seconds")}
            try:
                # Exclusive creation claims the folder: of two runs started at once, one is refused.
                with (path / STATUS).open("x", encoding="utf-8") as file:
                    json.dump(status, file)
            except FileExistsError:
                raise UserError(_holds_a_run(path)) from None
        return cls(path)

    def log(self, row: Row) -> None:
        """Append one row to metrics.jsonl; numbers that are not finite become null."""
        with writing(self.path), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_json_text(row) + "\n")

    def sync_metrics(self) -> int:
        """Bring the rows written so far to the disk for good, and return how many they are."""
        path = self.path / METRICS
        with writing(self.path):
            if not path.exists():
                return 0
            with path.open("rb") as file:
                os.fsync(file.fileno())
                return sum(1 for _ in file)

    def cut_metrics(self, rows: int) -> int:
        """Keep the first `rows` rows, and return how many were there; a last one that is cut short counts as none."""
        path = self.path / METRICS
        with writing(self.path):
            if not path.exists():
                return 0
            with path.open("rb") as file:
                kept = [line for line, _ in zip(file, range(rows), strict=False) if line.endswith(b"\n")]
            os.truncate(path, sum(map(len, kept)))
            return len(kept)

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe, atomically and durably."""
        self._replace(RECIPE, text)

    def write_status(self, **fields: Any) -> None:
        """Merge `fields` into run.json, atomically and durably."""
        self._replace(STATUS, _json_text(read_status(self.path) | fields, indent=2) + "\n")

    def write_predictions(self, true: Sequence[Any], predicted: Sequence[Any]) -> None:
        """Keep the best model's answers on the validation set, so that runs can be compared row by row.

        Labels are class indices (a list of them per row for multi-label data).
        """
        assert len(true) == len(predicted), f"{len(true)} true labels and {len(predicted)} predictions"
        self._replace(
            PREDICTIONS, _json_text({"split": "validation", "true": true, "predicted": predicted}) + "\n"
        )

    def _replace(self, name: str, text: str) -> None:
        with writing(self.path):
            replace_text(self.path / name, text)


@dataclass(frozen=True)
class Run:
    """A run read from its folder, finished or not."""

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def model_folder(self) -> Path:
        """The best weights in their own library's format."""
        return self.path / MODEL

    @property
    def best(self) -> dict[str, Any] | None:
        """`{metric, value, step, epoch}` of the best evaluation, None before the first."""
        return self.status.get("best") or None

    def predictions(self) -> tuple[list[Any], list[Any]] | None:
        """Return the true and predicted labels of the validation rows, None when the run kept none."""
        try:
            kept = json.loads((self.path / PREDICTIONS).read_text(encoding="utf-8"))
            return kept["true"], kept["predicted"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def load_run(path: str | Path) -> Run:
    """Read the run in the folder `path`.

    Raises:
        UserError: there is no such folder, or it holds no run; names what is missing and the nearest runs.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such run folder.{_nearest_runs(path)}")
    if not path.is_dir():
        raise UserError(f"{path}: a file was given where a run's folder is expected.{_nearest_runs(path)}")
    missing = [name for name in (STATUS, RECIPE) if not (path / name).is_file()]
    if missing:
        raise UserError(f"{path}: not a run folder, {' and '.join(missing)} missing.{_nearest_runs(path)}")
    return Run(path, read_status(path), read_metrics(path))


def newest_run(recipe_name: str, backbone_name: str) -> Path | None:
    """Return the newest folder under `runs/` of this recipe and backbone whose run is not done."""
    stem = f"{_slug(recipe_name)}-{_slug(backbone_name)}-"
    begun = [
        path.parent for path in Path("runs").glob(f"{stem}*/{STATUS}") if (path.parent / RECIPE).is_file()
    ]
    unfinished = [path for path in begun if _status_or_empty(path).get("status") != "done"]
    return max(unfinished, key=lambda path: (path / STATUS).stat().st_mtime, default=None)


def read_status(path: str | Path) -> dict[str, Any]:
    """Return run.json of the run folder `path`.

    Raises:
        UserError: it is missing or damaged.
    """
    file = Path(path) / STATUS
    try:
        status = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged, not JSON ({error}).") from None
    if not isinstance(status, dict):
        raise UserError(f"{file}: damaged, a mapping is expected and {type(status).__name__} found.")
    return status


def read_metrics(path: str | Path) -> list[Row]:
    """Return the rows of metrics.jsonl in the run folder `path`, none before the first is written.

    A last line cut short, by a crash or by reading while the run writes, is left out.

    Raises:
        UserError: a line before the last is damaged.
    """
    file = Path(path) / METRICS
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError:
            if any(rest.strip() for rest in lines[number:]):
                where = f"{file}:{number}"
                raise UserError(
                    f"{where}: damaged, this line is not JSON. Remove it to read the rest."
                ) from None
    return rows


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a run, importing none of them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return `cpu` (model), `cores` we may use, `memory_gb` and `gpus` (names, once torch is loaded)."""
    return {"cpu": _cpu_model(), "cores": _cores(), "memory_gb": _memory_gb(), "gpus": _gpus()}


def _cpu_model() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _status_or_empty(path: Path) -> dict[str, Any]:
    """Return run.json, empty when it is damaged."""
    try:
        return read_status(path)
    except UserError:
        return {}


def _given_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path} is a file; a run needs a folder. Give another path.")
    if (path / STATUS).exists():
        raise UserError(_holds_a_run(path))
    if left := [name for name in (CHECKPOINTS, METRICS, MODEL) if (path / name).exists()]:
        raise UserError(
            f"output: {path} holds {' and '.join(left)} of a run, but no {STATUS}. Give another folder, or "
            f"remove this one first: rm -r {path}"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _new_folder(recipe_name: str, backbone_name: str) -> Path:
    stem = f"{_slug(recipe_name)}-{_slug(backbone_name)}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if Path("runs").is_file():
                raise
            number += 1


def _slug(name: str) -> str:
    """The last part of a path or Hub id, fit for a folder name."""
    return (
        re.sub(r"[^\w.-]+", "-", name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]).strip("-.")
        or "run"
    )


def _holds_a_run(path: Path) -> str:
    status = _status_or_empty(path)
    state = f" ({status['status']}, started {status.get('started', '?')})" if "status" in status else ""
    remedy = f"Continue it with --resume, give another folder, or remove this one first: rm -r {path}"
    return f"output: {path} already holds a run{state}. {remedy}"


def _nearest_runs(path: Path) -> str:
    """A sentence that names up to three run folders nearby, the most alike first."""
    places = dict.fromkeys(place.resolve() for place in (path.parent, path, Path("runs")) if place.is_dir())
    runs = [folder for place in places for folder in sorted(place.iterdir()) if (folder / STATUS).is_file()]
    if not runs:
        return " `runs/` is where runs are kept unless `output` says otherwise; there is none nearby."

    def likeness(folder: Path) -> float:
        return difflib.SequenceMatcher(None, folder.name, path.name).ratio()

    nearest = sorted(dict.fromkeys(runs), key=likeness, reverse=True)[:3]
    return f" Nearest runs: {', '.join(os.path.relpath(run) for run in nearest)}."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path`: turns what the operating system says about a failure into a sentence.

    Raises:
        FinetuneError: instead of an OSError, with what to do.
    """
    try:
        yield
    except OSError as error:
        elsewhere = "Give a folder elsewhere as `output`."
        reason = {
            errno.ENOSPC: f"the disk is full. Free some space, or: {elsewhere}",
            errno.EDQUOT: f"your disk quota is used up. Free some space, or: {elsewhere}",
            errno.EROFS: f"the disk is read-only. {elsewhere}",
            errno.EACCES: f"you may not write there. {elsewhere}",
            errno.EPERM: f"you may not write there. {elsewhere}",
            errno.ENOTDIR: f"a part of this path is a file. {elsewhere}",
            errno.EEXIST: f"a file of this name is in the way. {elsewhere}",
            errno.ENOENT: "the run folder is gone. Was it removed while the run was going on?",
        }.get(error.errno or 0, f"{error.strerror or error}.")
        raise FinetuneError(f"cannot write {error.filename or path}: {reason}") from None


def os_error(error: Exception, path: Path) -> OSError:
    """Return the OSError that safetensors tells of in words only: `… (os error 28)`."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{path.name}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _json_text(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: NaN and infinity as null, paths as text, tensors and arrays as numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value
