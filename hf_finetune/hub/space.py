"""A demo of a pushed model: the three files of a Gradio Space."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from hf_finetune.errors import UserError
from hf_finetune.hub.spec import REPO_ID
from hf_finetune.recipe import load_recipe
from hf_finetune.runfolder import Run

_APP = Template('''\
"""Try $model."""

import gradio as gr
$imports

MODEL = "$model"
$load


def predict($inputs):
    answers = classify($given, top_k=$outputs, function_to_apply="$activation")
    return $answer


demo = gr.Interface(predict, $widgets, $output, title="$title")

if __name__ == "__main__":
    demo.launch()
''')

_PIPELINE = 'classify = pipeline("$task", model=MODEL)'

_ADAPTER = """\
BASE = "$base"

config = AutoConfig.from_pretrained(MODEL)  # the base model's, with these labels
base = $auto.from_pretrained(BASE$revision, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, MODEL).get_base_model().eval()
classify = pipeline("$task", model=model, $beside=$auto_beside.from_pretrained(MODEL))"""

_TIMM_ADAPTER = """\
LABELS = $labels

base = timm.create_model("hf-hub:$base$at", pretrained=True, num_classes=$outputs$options)
model = PeftModel.from_pretrained(base, MODEL).eval()
read = timm.data.create_transform(**timm.data.resolve_model_data_config(base))


@torch.inference_mode()
def classify(image, top_k, function_to_apply):
    logits = model(read(image.convert("RGB"))[None])[0]
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}[function_to_apply]
    return [{"label": label, "score": score} for label, score in zip(LABELS, scores.tolist())]"""

_ACTIVATION = {"single": "softmax", "multi": "sigmoid", "regression": "none"}


def space_files(run: Run, folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Return app.py, requirements.txt and README.md of a Space that answers with the model in `repo_id`.

    Args:
        folder: the model that is pushed there.

    Raises:
        UserError: it is an adapter whose base model is not on the Hub.
    """
    recipe = load_recipe(str(run.recipe_path), [])
    image = recipe.task == "image-classification"
    columns = recipe.data.columns.text
    pair = not image and not isinstance(columns, str) and len(columns) == 2
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    labels, is_timm = list(run.status["labels"]), "architecture" in config
    regression = recipe.data.labels == "regression"
    texts = '{"text": text, "text_pair": second}' if pair else "text"
    known: dict[str, Any] = {
        "model": repo_id,
        "title": repo_id.split("/")[-1],
        "task": recipe.task,
        "labels": json.dumps(labels, ensure_ascii=False),
        "outputs": max(len(labels), 1),
        "activation": _ACTIVATION[recipe.data.labels],
        "answer": 'answers[0]["score"]' if regression else '{each["label"]: each["score"] for each in answers}',
        "output": "gr.Number()" if regression else "gr.Label(num_top_classes=5)",
        "inputs": "image" if image else "text, second" if pair else "text",
        "given": "image" if image else f"{texts}, truncation=True",
        "widgets": 'gr.Image(type="pil")' if image else "[gr.Textbox(), gr.Textbox()]" if pair else "gr.Textbox()",
        "auto": "AutoModelForImageClassification" if image else "AutoModelForSequenceClassification",
        "beside": "image_processor" if image else "tokenizer",
        "auto_beside": "AutoImageProcessor" if image else "AutoTokenizer",
        "options": "".join(f", {key}={value!r}" for key, value in recipe.backbone.options.items()),
    }  # fmt: skip
    needs = ["torch", "transformers>=5.0"]
    imports, load = "from transformers import pipeline", _PIPELINE
    if (folder / "adapter_config.json").is_file():
        known |= _base(folder, repo_id)
        needs.append("peft")
        auto = sorted(["AutoConfig", known["auto"], known["auto_beside"]])
        imports, load = (
            f"from peft import PeftModel\nfrom transformers import {', '.join(auto)}, pipeline",
            _ADAPTER,
        )
        if is_timm:
            imports, load = "import timm\nimport torch\nfrom peft import PeftModel", _TIMM_ADAPTER
    needs += (["timm"] if is_timm else []) + (["pillow"] if image else [])
    app = _APP.substitute(known, imports=imports, load=Template(load).substitute(known))
    return {
        "app.py": app.encode(),
        "requirements.txt": ("\n".join(needs) + "\n").encode(),
        "README.md": _readme(repo_id, known["title"]).encode(),
    }


def _base(folder: Path, repo_id: str) -> dict[str, str]:
    """Return the adapter's base model and its revision."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = config["base_model_name_or_path"], config.get("revision")
    if not re.fullmatch(REPO_ID, base) or base.startswith("shipped/") or Path(base).exists():
        raise UserError(
            f"push: a Space cannot load the adapter in {repo_id}, because its base model '{base}' is not on the Hub. "
            "Push without --space, or train with the strategy's option `merge: true`."
        )
    return {
        "base": base,
        "revision": f', revision="{revision}"' if revision else "",
        "at": f"@{revision}" if revision else "",
    }


def _readme(repo_id: str, title: str) -> str:
    return f"""---
title: {json.dumps(title)}
emoji: 🔎
colorFrom: blue
colorTo: green
sdk: gradio
app_file: app.py
pinned: false
models:
- {repo_id}
---

A demo of [{repo_id}](https://huggingface.co/{repo_id}).
"""
