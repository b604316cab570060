"""What several test modules share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# what tests write as csv would otherwise pile up in the user's cache
_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ.setdefault("HF_FINETUNE_CACHE", _CACHE.name)  # processes that tests start share it

_SHARED = Path(os.environ.get("HF_FINETUNE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a data set or backbone that lies beside the repository; skip the test where there
    is none.
    """

    def find(name: str) -> Path:
        if not (_SHARED / name).is_dir():
            pytest.skip(f"needs {name} in {_SHARED} (HF_FINETUNE_SHARED_DATA names another folder)")
        return _SHARED / name

    return find
