"""Code that loads the model in its own library: what a reader copies out of the card."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from hf_finetune.hub.card_facts import CardFacts

FOLDER = "PATH/TO/THIS/FOLDER"
"""Stands for the model until a repository is known, see `card.with_repo_id`."""
LISTED = 20
"""Labels that a snippet spells out."""

_ANSWERS = {
    "single": """\
probability, label = logits.softmax(-1).max(-1)
print(names[label.item()], probability.item())""",
    "multi": "print(dict(zip(names, logits.sigmoid().tolist())))",
    "regression": "print(logits.item())",
}

_TIMM = """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:$folder", pretrained=True).eval()
read = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg["label_names"]

with torch.inference_mode():
    logits = model(read(Image.open("photo.jpg").convert("RGB"))[None])[0]
$answer"""

_TIMM_ADAPTER = """\
import timm
import torch
from peft import PeftModel
from PIL import Image

base = timm.create_model("$base", pretrained=True, num_classes=$outputs$options)
model = PeftModel.from_pretrained(base, "$folder").eval()
read = timm.data.create_transform(**timm.data.resolve_model_data_config(base))
names = $names

with torch.inference_mode():
    logits = model(read(Image.open("photo.jpg").convert("RGB"))[None])[0]
$answer"""

_IMAGE_PIPELINE = """\
from transformers import pipeline

classify = pipeline("image-classification", model="$folder")
print(classify("photo.jpg"))"""

_TEXT_PIPELINE = """\
from transformers import pipeline

classify = pipeline("text-classification", model="$folder", $cut)
print(classify($text))"""

_ADAPTER = """\
import torch
from peft import PeftModel$import_image
from transformers import AutoConfig, $auto, $beside$import_quantize

config = AutoConfig.from_pretrained("$folder")  # the base model's, with these labels
base = $auto.from_pretrained(
    "$base"$revision, config=config, ignore_mismatched_sizes=True$quantize
)
model = PeftModel.from_pretrained(base, "$folder").eval()
read = $beside.from_pretrained("$folder")
names = config.id2label

with torch.inference_mode():
    logits = model(**read($input, return_tensors="pt")).logits[0]
$answer"""


def snippets(facts: CardFacts) -> list[str]:
    """Return the code that answers for one input, by each library that loads the model."""
    image = facts.recipe.task == "image-classification"
    columns = facts.recipe.data.columns.text
    pair = not image and not isinstance(columns, str) and len(columns) == 2
    first, second = '"The soup was cold."', '"It was not warm."'
    cut = f"truncation=True, max_length={facts.max_length}"
    texts = f"{first}, {second}" if pair else first
    labels = facts.labels
    known = {
        "folder": FOLDER,
        "base": _base(facts),
        "revision": f', revision="{facts.base.commit}"' if facts.base.commit else "",
        "outputs": str(labels.outputs),
        "options": "".join(
            f", {_arguments({key: value})}" for key, value in facts.recipe.backbone.options.items()
        ),
        "names": repr(list(labels.names))
        if labels.outputs <= LISTED
        else f"[str(number) for number in range({labels.outputs})]  # their words: label_names in config.json",
        "cut": cut,
        "text": f'{{"text": {first}, "text_pair": {second}}}' if pair else first,
        "auto": "AutoModelForImageClassification" if image else "AutoModelForSequenceClassification",
        "beside": "AutoImageProcessor" if image else "AutoTokenizer",
        "import_image": "\nfrom PIL import Image" if image else "",
        "input": 'Image.open("photo.jpg").convert("RGB")' if image else f"{texts}, {cut}",
        "answer": _ANSWERS[labels.kind],
        "import_quantize": ", BitsAndBytesConfig" if facts.quantized else "",
        "quantize": f",\n    quantization_config=BitsAndBytesConfig({_arguments(facts.quantized['config'])}),"
        if facts.quantized
        else "",
    }
    if facts.is_adapter:
        templates = [_TIMM_ADAPTER if facts.library == "timm" else _ADAPTER]
    elif facts.library == "timm":
        templates = [_TIMM, _IMAGE_PIPELINE]
    else:
        templates = [_IMAGE_PIPELINE if image else _TEXT_PIPELINE]
    return [Template(each).substitute(known) for each in templates]


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _base(facts: CardFacts) -> str:
    """Return the name under which the library finds an adapter's base model."""
    base = facts.base
    if base.hub_id is None:
        place = f"PATH/TO/{base.name.removeprefix('./').removeprefix('shipped/')}"
        return f"local-dir:{place}" if facts.library == "timm" else place
    if facts.library == "timm":
        return f"hf-hub:{base.hub_id}" + (f"@{base.commit}" if base.commit else "")
    return base.hub_id
