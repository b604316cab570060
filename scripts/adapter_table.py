"""Write the table of docs/adapters.md from the code: which method adapts which family, where, at what size.

python scripts/adapter_table.py            writes it
python scripts/adapter_table.py --check    exits with 1 when the page is not what the code says
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import transformers
from torch import nn

from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError
from hf_finetune.models.adapters import add_adapters
from hf_finetune.models.anatomies import output_layers, timm_anatomy, transformers_anatomy
from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.models.backbone import Backbone, ImageInput, LoadReport, TextInput
from hf_finetune.strategies.methods import METHODS, AdapterSpec

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- table: scripts/adapter_table.py -->\n", "<!-- end of table -->\n"
COLUMNS = {
    "ResNet-18": "resnet18",
    "MobileNetV2": "mobilenetv2_100",
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "BERT-small": "",
}
"""Title -> timm's architecture; none for a BERT of MiniLM's shape."""
OUTPUTS = 2


def table() -> str:
    """Return the table as markdown: supported, layers, share of all parameters that learn, the head included."""
    head = ["method", "paper", *COLUMNS]
    rows = [
        [f"`{method}`", METHODS[method].source, *(cell(method, title) for title in COLUMNS)]
        for method in METHODS
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(method: str, title: str) -> str:
    """Return what one method does on one network."""
    try:
        backbone = add_adapters(network(title), AdapterSpec(method=method), seed=0, total_steps=100)
    except ModelError:
        return "no"
    adapter, anatomy = backbone.adapter, backbone.anatomy
    assert adapter is not None
    total = sum(p.size for p in anatomy.parameters)
    learns = sum(p.size for p in anatomy.trainable if p.is_adapter or p.group == HEAD)
    kinds = dict.fromkeys(target.kind for target in adapter.targets)
    return f"{len(adapter.targets)} {' and '.join(kinds)}, {100 * learns / total:.2g} %"


def network(title: str) -> Backbone:
    """Return a network of random weights with a head for two classes."""
    architecture = COLUMNS[title]
    labels = Labels("single", ("a", "b"))
    model: nn.Module
    read: ImageInput | TextInput
    if architecture:
        model = timm.create_model(architecture, num_classes=OUTPUTS)
        outputs = output_layers(title, model, labels.outputs)
        anatomy: Anatomy = timm_anatomy(model, outputs, new=new_tensors(outputs))
        read = ImageInput((224, 224), (0.5,) * 3, (0.5,) * 3, 1.0, "center", "bicubic")
    else:
        config = transformers.BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            num_labels=OUTPUTS,
        )
        model = transformers.BertForSequenceClassification(config)
        outputs = output_layers(title, model, labels.outputs)
        anatomy = transformers_anatomy(model, outputs, new=new_tensors(outputs), text=True)
        read = TextInput(Words(), 512)
    report = LoadReport(0, (), (), tuple(new_tensors(outputs)), (), 1.0, "random weights")
    source = {"id": title, "folder": None, "commit": None, "architecture": title}
    return Backbone(model, "timm" if architecture else "transformers", anatomy, read, report, source)


class Words:
    """A tokenizer of one word, for a forward pass."""

    def __call__(self, text: str, **options: object) -> dict[str, object]:
        """Return the ids of three tokens."""
        import torch

        return {"input_ids": torch.tensor([[101, 1037, 102]])}


def new_tensors(outputs: dict[str, nn.Module]) -> frozenset[str]:
    """Return the names of the output layers' parameters."""
    return frozenset(
        f"{name}.{each}" for name, layer in outputs.items() for each, _ in layer.named_parameters()
    )


def parts(text: str) -> Iterator[str]:
    """Yield what stands before the table, the table, and what stands after it."""
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    yield from (before, inside, after)


def main() -> None:
    """Write the table into the page, or check it."""
    parser = argparse.ArgumentParser(description="Write the table of docs/adapters.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    before, inside, after = parts(PAGE.read_text(encoding="utf-8"))
    if not parser.parse_args().check:
        PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
    elif inside != table():
        sys.exit(f"{PAGE.name} is not what the code says; run `python scripts/adapter_table.py`.")


if __name__ == "__main__":
    main()
