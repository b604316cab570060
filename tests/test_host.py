"""What a process asks of the machine: memory it keeps, cores it uses, imports without pauses."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hf_finetune import host

CLEAN = {
    name: value for name, value in os.environ.items() if name not in (*host._USERS_OWN, "OMP_NUM_THREADS")
}
FAULTS = """
import resource, sys
import numpy as np
from hf_finetune import host
kept = host.keep_freed_memory() if "keep" in sys.argv else False
np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(8 << 20)  # 64 MB, freed at once
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


WORKER = """
import numpy as np, psutil, torch
from hf_finetune import host
from hf_finetune.data.loaders import loader_over

class Data:
    tokenizer = None
    def __getitem__(self, key):
        return {"inputs": {"pixel_values": torch.zeros(1)}, "label": torch.tensor(0), "weight": 1.0, "index": key}

print(host.keep_freed_memory())
np.ones(64 << 20)  # 512 MB, freed at once, as activations are
batches = iter(loader_over(Data(), [[0]] * 20, workers=1))
next(batches)
own = psutil.Process()
print(own.memory_info().rss, *[child.memory_info().rss for child in own.children()])
"""


def _python(code: str, *arguments: str, env: dict[str, str] = CLEAN) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = _python(FAULTS, "keep")
    if kept == "False":
        pytest.skip("not glibc")
    _, before = _python(FAULTS)
    assert int(faults) < 20_000, "one allocation's pages at most"
    if int(before) > 300_000:  # 20 times 16,384 pages; fewer where the system gives huge pages
        assert int(faults) < int(before) / 10


def test_a_data_worker_holds_nothing_of_what_its_process_has_freed() -> None:
    kept, own, *workers = _python(WORKER)
    if kept == "False":
        pytest.skip("not glibc")
    assert len(workers) == 1
    assert int(own) - int(workers[0]) > 600e6  # libraries that it does not touch are a third of a GB less


@pytest.mark.parametrize("name", host._USERS_OWN)
def test_an_allocator_chosen_by_the_user_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1")
    assert not host.keep_freed_memory()


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize("given", [False, True], ids=["no number given", "a number given"])
def test_a_launcher_s_single_thread_is_not_taken_for_a_choice(
    launcher: str, given: bool, tmp_path: Path
) -> None:
    """The launchers set OMP_NUM_THREADS=1 in our environment; whether anybody asked for it shows in theirs."""
    script = tmp_path / launcher  # stands for the launcher: what counts is its name, environment and child
    child = "from hf_finetune import host; print(host.threads_to_use())"
    script.write_text(
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'OMP_NUM_THREADS': '1'}}, check=True)\n"
    )
    env = CLEAN | ({"OMP_NUM_THREADS": "1"} if given else {})
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    cores = min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity() or [0]))
    assert done.stdout.strip() == ("None" if given else str(cores))


@pytest.mark.slow
def test_accelerate_launch_uses_all_cores(tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch\nfrom hf_finetune.setup import process_state\nprocess_state()\nprint('threads', torch.get_num_threads())\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", str(script)]
    done = subprocess.run(launch, env=CLEAN, capture_output=True, text=True, timeout=300, check=True)
    cores = min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity() or [0]))
    assert f"threads {cores}" in done.stdout


def test_the_end_of_the_process_is_orderly_and_quick() -> None:
    code = (
        "import atexit, sys, threading, time; from hf_finetune import host\n"
        "atexit.register(print, 'first registered')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread done'))).start()\n"
        "print('said')\n"
        "class Lingers:\n    def __del__(self): print('freed')\n"
        "kept = Lingers()\n"
        "host.leave(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["said", "thread done", "first registered"]
    assert (done.returncode, done.stderr) == (7, "")


def test_imports_collect_no_garbage_and_leave_the_collector_on() -> None:
    assert gc.isenabled()
    with host.quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
