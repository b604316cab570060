"""The model card: what the weights beside it are, from what they were made, and how they were measured."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from hf_finetune.recipe import dump_recipe

if TYPE_CHECKING:
    from hf_finetune.setup import Setup

_USAGE = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()',
    "transformers": 'from transformers import pipeline\n\nclassify = pipeline("{task}", model="PATH/TO/THIS/FOLDER")',
}


_ADAPTER_USAGE = {
    "timm": """import timm
from peft import PeftModel

base = timm.create_model("{base}", pretrained=True, num_classes={outputs}{options})
model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER").eval()""",
    "transformers": """from peft import PeftModel
from transformers import {imports}

base = {auto}.from_pretrained("{base}", num_labels={outputs}{options})
model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER").eval()""",
}
_AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
}


def model_card(setup: Setup, best: dict[str, Any] | None) -> str:
    """Return the card of the weights measured as `best` says; without it the card holds no figure."""
    recipe, report, labels = setup.recipe, setup.splits.report, setup.splits.labels
    source = report.source
    results = []
    if best is not None:
        results = [
            EvalResult(
                task_type=recipe.task, dataset_type=source, dataset_name=source, dataset_split="validation",
                metric_type=name, metric_name=name, metric_value=value,
            )
            for name, value in best["metrics"].items()
        ]  # fmt: skip
    from_hub = "/" in recipe.backbone.id and not recipe.backbone.id.startswith(("shipped/", "/", "."))
    adapter = setup.backbone.adapter
    is_adapter = adapter is not None and not adapter.spec.merge
    data = ModelCardData(
        library_name="peft" if is_adapter else setup.backbone.library,
        pipeline_tag=recipe.task,
        base_model=recipe.backbone.id if from_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if from_hub else None,
        tags=["hf_finetune", recipe.strategy.name],
        model_name=f"{recipe.backbone.id.rstrip('/').split('/')[-1]}-{recipe.strategy.name}"
        if results
        else None,
        eval_results=results or None,
    )
    figures = "These weights were not measured."
    if best is not None:
        rows = "\n".join(
            f"| {name} | {value:.4f} |" for name, value in {**best["metrics"], "loss": best["loss"]}.items()
        )
        figures = (
            f"Measured on {report.rows['validation']} validation rows of `{source}`, at step {best['step']} "
            f"(epoch {best['epoch']:g}):\n\n| metric | value |\n| --- | --- |\n{rows}"
        )
    if is_adapter and (quantized := setup.backbone.source.get("quantize")):
        figures += (
            f"\n\nThese are figures of the base model in {quantized['kind']} (bitsandbytes: {quantized['layers']} "
            "linear layers of its blocks). On the base model in full precision the adapter works too, and answers "
            "differ a little."
        )
    counts = report.class_counts.get("train", {})
    label_rows = "\n".join(
        f"| {i} | {name} | {counts.get(name, '')} |" for i, name in enumerate(labels.names)
    )
    usage = (
        _adapter_usage(setup, from_hub)
        if is_adapter
        else _USAGE[setup.backbone.library].replace("{task}", recipe.task)
    )
    return f"""---
{data.to_yaml()}
---

# {recipe.backbone.id} adapted to {source}

Strategy `{recipe.strategy.name}`: {setup.trainable_size:,} of {setup.total_size:,} parameters trained on
{report.rows["train"]} rows.

{figures}

## Labels

| id | label | training rows |
| --- | --- | --- |
{label_rows}

## Use

```python
{usage}
```

## Recipe

```yaml
{dump_recipe(recipe).strip()}
```
"""


def _adapter_usage(setup: Setup, from_hub: bool) -> str:
    """Return the code that loads the adapter on its base model."""
    recipe, library = setup.recipe, setup.backbone.library
    base = recipe.backbone.id if from_hub else f"PATH/TO/{recipe.backbone.id.rstrip('/').split('/')[-1]}"
    if library == "timm":
        base = f"hf-hub:{base}" if from_hub else f"local-dir:{base}"
    values = {
        "base": base,
        "outputs": str(setup.splits.labels.outputs),
        "auto": _AUTO[recipe.task],
        "imports": _AUTO[recipe.task],
        "options": "".join(f", {key}={value!r}" for key, value in recipe.backbone.options.items()),
    }
    if quantized := setup.backbone.source.get("quantize"):
        arguments = ", ".join(f"{key}={value!r}" for key, value in quantized["config"].items())
        values["imports"] += ", BitsAndBytesConfig"
        values["options"] += f", quantization_config=BitsAndBytesConfig({arguments})"
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], _ADAPTER_USAGE[library])
