"""Export: a model as one file, which other runtimes get the same logits from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from hf_finetune import export
from hf_finetune.cli import main
from hf_finetune.errors import FinetuneError, UserError
from hf_finetune.export import Exported
from hf_finetune.inference import load_trained
from hf_finetune.runfolder import Run

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.NEEDED), reason="needs the extra `export`"
)
LORA = {"strategy": {"name": "lora", "r": 2}}
# name -> (backbone, changes, inputs)
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "timm cnn": ("resnet", {"strategy": "full"}, ["pixel_values"]),
    "timm vit": ("vit", {"strategy": "full"}, ["pixel_values"]),
    "timm adapter": ("resnet", LORA, ["pixel_values"]),
    "text": ("bert", {"strategy": "full"}, ["attention_mask", "input_ids", "token_type_ids"]),
    "text adapter": ("bert", LORA, ["attention_mask", "input_ids", "token_type_ids"]),
    "image": ("vision-vit", {"strategy": "full"}, ["pixel_values"]),
}


def export_model(place: str, **given: Any) -> Exported:
    return export.export_model(place, load_trained(place), **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the run of a case, trained once."""
    done: dict[str, Run] = {}

    def run(case: str) -> Run:
        if case not in done:
            name, changes, _ = CASES[case]
            training = {"steps": 3, "reload_check": False}
            done[case] = runs.run(name, tmp_path_factory.mktemp("run") / "run", training=training, **changes)
        return done[case]

    return run


def check_files(found: Exported, run: Run, form: str) -> None:
    names = {"onnx": "onnx/model.onnx", "torch": "model.pt2"}
    assert found.path == run.path / "export" / names[form]
    assert found.size >= found.path.stat().st_size > 0
    assert found.max_difference <= export.TOLERANCE
    assert (run.path / "export" / "config.json").is_file()
    assert not list((run.path / "export").rglob(".new*"))
    assert len({shape[0] for shape in found.shapes}) == 3


def use(found: Exported, run: Run, tmp_path: Path) -> np.ndarray:
    """Run the code that export prints, and return the logits."""
    picture = next(Path(runs.images()).rglob("*.png"))
    code = found.usage.replace("IMAGE", str(picture)).replace("TEXT", "the good film")
    names: dict[str, Any] = {}
    exec(code, names)
    return np.asarray(
        names["logits"].detach() if isinstance(names["logits"], torch.Tensor) else names["logits"]
    )


def slow_but(*quick: str) -> list[Any]:
    """Return all cases, all but these marked slow: tracing takes seconds."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("case", slow_but("timm cnn", "text adapter"))
def test_torch(case: str, trained: Any, tmp_path: Path) -> None:
    run = trained(case)
    found = export_model(str(run.path), form="torch")
    check_files(found, run, "torch")
    assert use(found, run, tmp_path).shape == (1, 2 if case.startswith("text") else 3)
    about: dict[str, str] = {"about.json": ""}
    torch.export.load(found.path, extra_files=about)
    assert json.loads(json.loads(about["about.json"])["labels"]) == run.status["labels"]


@needs_onnx
@pytest.mark.parametrize("case", slow_but("timm cnn"))
def test_onnx(case: str, trained: Any, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    run = trained(case)
    found = export_model(str(run.path), form="onnx")
    check_files(found, run, "onnx")
    session = onnxruntime.InferenceSession(str(found.path))
    assert sorted(each.name for each in session.get_inputs()) == CASES[case][2]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    about = {each.key: each.value for each in onnx.load(found.path).metadata_props}
    assert json.loads(about["labels"]) == run.status["labels"]
    assert about["task"] == run.status["task"]
    torch_file = export_model(str(run.path), form="torch")
    assert use(found, run, tmp_path) == pytest.approx(use(torch_file, run, tmp_path), abs=1e-4)


def test_a_model_folder_and_another_place(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("timm cnn")
    main(["export", str(run.model_folder), "--format", "torch", "--output", str(tmp_path / "there")])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/there/model.pt2: ")
    assert "its logits differ from the model's by at most" in said
    assert "torch.export.load" in said


def test_a_file_that_computes_something_else_is_not_kept(
    trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def damaged(program: Any, names: Any, about: Any, file: Path, opset: Any) -> None:
        program.state_dict["model.fc.bias"] = torch.nn.Parameter(program.state_dict["model.fc.bias"] + 1e-3)
        export._write_torch(program, names, about, file, opset)

    run = trained("timm cnn")
    monkeypatch.setitem(export.WRITERS, "torch", damaged)
    with pytest.raises(SystemExit) as left:
        main(["export", str(run.path), "--format", "torch", "--output", str(tmp_path / "out")])
    assert left.value.code == 1
    assert "the logits of model.pt2 differ from the model's by 0.001" in capsys.readouterr().err
    assert not [each for each in (tmp_path / "out").rglob("*") if each.is_file()]


def test_a_fixed_batch_size_is_noticed(trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fixed(model: Any, inputs: dict[str, Any], backbone: Any) -> Any:
        return torch.export.export(export._Images(model).eval(), (), inputs)

    monkeypatch.setattr(export, "_trace", fixed)
    with pytest.raises(
        FinetuneError, match=r"takes inputs of \(2, 3, 32, 32\), which it was traced with, but not"
    ):
        export_model(str(trained("timm cnn").path), form="torch", output=str(tmp_path / "out"))


def test_gone_data_and_other_samples(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    source = trained("timm cnn").model_folder
    folder.mkdir()
    for file in source.iterdir():
        text = file.read_bytes()
        if file.name == "recipe.yaml":
            text = text.replace(runs.images().encode(), b"/nowhere/at/all")
        (folder / file.name).write_bytes(text)
    with pytest.raises(UserError, match=r"the data which the recipe of .* names; give it with data="):
        export_model(str(folder), form="torch")
    given = [f"data={runs.images()}", "split=train"]
    assert export_model(str(folder), form="torch", output=str(tmp_path / "out"), options=given).path.is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"form": "onx"}, "--format onx: choose from onnx, torch. Did you mean 'onnx'?"),
        ({"form": "torch", "opset": 18}, "only --format onnx has opsets"),
        ({"form": "torch", "options": ["date=x"]}, "'date=x': give data=… and split=…. Did you mean 'data'?"),
    ],
)
def test_wrong_requests(given: dict[str, Any], said: str, trained: Any) -> None:
    with pytest.raises(UserError) as caught:
        export_model(str(trained("timm cnn").path), **given)
    assert said in str(caught.value)


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "NEEDED", ("onnx", "no_such_runtime"))
    with pytest.raises(SystemExit) as left:
        main(["export", "anything"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "no_such_runtime" in said
    assert 'pip install "hf_finetune[export]"' in said
