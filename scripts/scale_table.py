"""Write the tables of docs/scale.md from the code: what a process holds and sends in a step, by network and strategy.

python scripts/scale_table.py            writes them
python scripts/scale_table.py --check    exits with 1 when the page is not what the code says
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import transformers
from torch import nn

from hf_finetune.data.spec import DataSpec
from hf_finetune.models.anatomies import module_groups, output_layers, timm_anatomy, transformers_anatomy
from hf_finetune.models.anatomy import Anatomy
from hf_finetune.optim import group_parameters
from hf_finetune.parallel import UNIT_SHARE
from hf_finetune.recipe import Recipe, parse_recipe
from hf_finetune.strategies.phase import plan_phases

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- table: scripts/scale_table.py -->\n", "<!-- end of table -->\n"
NETWORKS: dict[str, str | dict[str, int]] = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "ViT-B/16": "vit_base_patch16_224",
    "XLM-R large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "vocab_size": 250002, "max_position_embeddings": 514,
    },
    "ViT-g/14 (DINOv2)": "vit_giant_patch14_dinov2",
}  # fmt: skip
"""Title -> timm's architecture, or the shape of a BERT."""
STRATEGIES = ("full", "frozen")
OUTPUTS = 10
GB, MB = 10**9, 10**6
ADAM = 8
"""Bytes AdamW keeps for each parameter that learns: two averages in fp32."""


@dataclass(frozen=True)
class Size:
    """Numbers of parameters of one network under one strategy."""

    total: int
    learning: int
    largest_unit: int
    """Of what FSDP2 gathers at once."""


def network(title: str) -> tuple[nn.Module, Anatomy]:
    """Return a network without weights and its anatomy."""
    given = NETWORKS[title]
    with torch.device("meta"):
        if isinstance(given, str):
            model = timm.create_model(given, num_classes=OUTPUTS)
            return model, timm_anatomy(model, output_layers(title, model, OUTPUTS), new=frozenset())
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**given, num_labels=OUTPUTS)
        )
    outputs = output_layers(title, model, OUTPUTS)
    return model, transformers_anatomy(model, outputs, new=frozenset(), text=True)


def size(title: str, strategy: str) -> Size:
    """Return how many parameters a process holds, and how many of them learn."""
    model, anatomy = network(title)
    plans, _ = plan_phases(recipe(strategy).strategy.to_phases(anatomy), anatomy, 1e-3)
    learning = sum(group.size for group in group_parameters(plans, anatomy))
    total = sum(parameter.size for parameter in anatomy.parameters)
    homes = module_groups(model, anatomy)
    units = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in homes]
    return Size(total, learning, max(unit for unit in units if unit >= UNIT_SHARE * total))


def recipe(strategy: str) -> Recipe:
    """Return a recipe of this strategy; its data and backbone do not matter here."""
    return parse_recipe(
        {"strategy": strategy, "data": DataSpec(path="shipped/digits").model_dump(mode="json")}
    )


def memory(of: Size, processes: int, *, shared: bool) -> float:
    """Return the bytes of weights, gradients and AdamW's state in each process, in a step: no activations.

    DDP's buckets hold the gradients once more. FSDP2 has two units gathered (one is on its way) and one's gradients.
    """
    if not shared:
        buckets = 4 * of.learning if processes > 1 else 0
        return 4 * of.total + (4 + ADAM) * of.learning + buckets
    gathered = 3 if of.learning == of.total else 2
    return (4 * of.total + (4 + ADAM) * of.learning) / processes + gathered * 4 * of.largest_unit


def traffic(of: Size, processes: int, *, shared: bool) -> float:
    """Return the bytes each process sends in a step of one micro-batch, by rings.

    DDP adds up gradients (an all-reduce sends them twice). FSDP2 gathers weights for the forward pass, and for the
    backward pass where something learns below, and scatters the sums of gradients.
    """
    share = (processes - 1) / processes
    if not shared:
        return 2 * share * 4 * of.learning
    passes = 2 if of.learning == of.total else 1
    return share * (passes * 4 * of.total + 4 * of.learning)


def table() -> str:
    """Return the table as markdown."""
    head = ["network", "strategy", "parameters", "learn", "one process", "DDP", "FSDP2 of 2", "FSDP2 of 8",
            "DDP sends", "FSDP2 of 8 sends"]  # fmt: skip
    rows = []
    for title in NETWORKS:
        for strategy in STRATEGIES:
            of = size(title, strategy)
            held = [memory(of, 1, shared=False), memory(of, 8, shared=False)]
            held += [memory(of, count, shared=True) for count in (2, 8)]
            sent = [traffic(of, 8, shared=shared) for shared in (False, True)]
            rows.append([
                title, f"`{strategy}`", f"{of.total / 1e6:.1f} M", f"{of.learning / 1e6:.3g} M",
                *(f"{each / GB:.2f} GB" for each in held), *(_amount(each) for each in sent),
            ])  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _amount(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / MB:.2g} MB"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page = before + BEGIN + table() + END + after
    if parser.parse_args().check:
        sys.exit(0 if page == text else f"{PAGE} is not what the code says: run scripts/scale_table.py")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
