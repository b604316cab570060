"""What several test modules share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import Hub

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# what tests write as csv would otherwise pile up in the user's cache
_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ.setdefault("HF_FINETUNE_CACHE", _CACHE.name)  # processes that tests start share it

_SHARED = Path(os.environ.get("HF_FINETUNE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


LONG = ("resume", "circle", "reload", "processes", "recipes_run", "transfer")
"""Files that take longest. They go first, so that the processes have short ones to share at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files for `--dist loadfile`; the order within them stays."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


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


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """Let runs leave an empty curves.png: to draw it takes longer than all else they do here."""
    with pytest.MonkeyPatch.context() as patch:
        if "hf_finetune.record" in sys.modules:  # else nothing that was collected trains
            patch.setattr(
                "hf_finetune.record.save_curves", lambda rows, best, path, *, title: path.write_bytes(b"")
            )
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw their curves."""
    from hf_finetune.report.curves import save_curves

    monkeypatch.setattr("hf_finetune.record.save_curves", save_curves)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub on loopback, empty, for this test alone."""
    from hub_server import Hub

    with Hub() as served:
        yield served


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let huggingface_hub in this very process know `hub` as the Hub, with an empty cache and no token."""
    from huggingface_hub import close_session, constants, hf_api

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    close_session()
