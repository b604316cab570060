"""A compiled training step trains as the plain one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from hf_finetune import compilation
from hf_finetune.compilation import compiled, resolve_compile
from hf_finetune.errors import TrainingError

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm cnn, layer by layer": (
        "resnet",
        {"strategy": {"name": "gradual", "every": "2 steps"}, "cache": "off"},
    ),
    "timm vit, adapters": ("vit", {"strategy": "lora"}),
    "text encoder": ("bert", {"strategy": "full"}),
}


def _losses(name: str, output: Path, **changes: Any) -> list[float]:
    changes = changes | {"training": {"steps": 6, "reload_check": False} | changes.get("training", {})}
    return [row["loss"] for row in runs.run(name, output, **changes).rows if row.get("split") == "train"]


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_plain_steps_agree(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traces as any backend, without a C++ compiler
    traced = []
    monkeypatch.setattr("hf_finetune.train.compiled", lambda model: traced.append(model) or compiled(model))
    name, changes = CASES[case]
    plain = _losses(name, tmp_path / "plain", **changes, training={"compile": "off"})
    assert not traced
    assert _losses(name, tmp_path / "compiled", **changes, training={"compile": "on"}) == pytest.approx(
        plain, rel=1e-5
    )
    assert len(traced) == (3 if "gradual" in str(changes) else 1), "each phase anew"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_torch_s_own_compiler_trains_the_same(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    name = {"bert": "bert-dry"}.get(name, name)  # compiled code draws dropout from a generator of its own
    plain = _losses(name, tmp_path / "plain", **changes, training={"compile": "off"})
    assert _losses(name, tmp_path / "compiled", **changes, training={"compile": "on"}) == pytest.approx(
        plain, rel=1e-4
    )


def test_a_step_that_cannot_be_compiled_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(compilation, "BACKEND", broken)
    with pytest.raises(TrainingError, match=r"could not be compiled .*\. Set training\.compile: off"):
        _losses("resnet", tmp_path / "run", strategy="full", training={"compile": "on"})


@pytest.mark.parametrize(
    ("asked", "device", "steps", "phases", "expected"),
    [
        ("on", "cpu", 1, 1, "on"),
        ("off", "cuda", 10**6, 1, "off"),
        ("auto", "cpu", 10**6, 1, "off"),
        ("auto", "cuda", 999, 1, "off"),
        ("auto", "cuda", 1000, 1, "on"),
        ("auto", "cuda", 4000, 5, "off"),
    ],
)
def test_auto_compiles_long_phases_on_a_gpu(
    asked: Any, device: str, steps: int, phases: int, expected: str
) -> None:
    assert resolve_compile(asked, torch.device(device), steps, phases)[0] == expected
