"""Adapter methods of peft: one explicit table, and what a recipe says about adapters.

An adapter is a small addition to a layer that learns in the layer's place. This module is light: peft is imported by
`hf_finetune.models.adapters`, which puts adapters into a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hf_finetune.models.spec import Quantize
from hf_finetune.spec import Auto, Pattern, Spec

Layer = Literal["linear", "conv", "norm"]


@dataclass(frozen=True)
class Method:
    """What one method is to peft, and which layers it can adapt."""

    peft_type: str
    """peft's own name of it."""
    layers: frozenset[Layer]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Set in peft's config unless the recipe says otherwise."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Key of a recipe -> peft's name of it; a key that is absent does not apply."""
    rank: int = 8
    """What `r: auto` means."""
    grouped: bool = False
    """Adapts convolutions with groups, when they divide the rank."""
    pointwise: bool = False
    """Of convolutions it adapts those of 1 x 1 only."""
    block: str | None = None
    """The option that holds a block size which has to divide a layer's inputs."""
    on: tuple[Quantize, ...] = ("8bit", "4bit")
    """On which quantised layers peft computes it."""
    start: str = "lora"
    """Whose starting values it has in the table of defaults."""


_LINEAR: frozenset[Layer] = frozenset({"linear"})
_BOTH: frozenset[Layer] = frozenset({"linear", "conv"})
_PATTERNS = {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
_LORA = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"} | _PATTERNS
_LYCORIS = {"r": "r", "alpha": "alpha", "dropout": "rank_dropout"} | _PATTERNS

METHODS: dict[str, Method] = {
    "lora": Method("LORA", _BOTH, "Hu 2021, arXiv 2106.09685", keys=_LORA, grouped=True),
    "dora": Method("LORA", _BOTH, "Liu 2024, arXiv 2402.09353", {"use_dora": True}, _LORA, on=("4bit",)),
    "rslora": Method(
        "LORA", _BOTH, "Kalajdzievski 2023, arXiv 2312.03732", {"use_rslora": True}, _LORA, rank=32, grouped=True
    ),
    # peft initialises it by the weight's own singular vectors, which it does for matrices only, in full precision.
    "pissa": Method("LORA", _LINEAR, "Meng 2024, arXiv 2404.02948", {"init_lora_weights": "pissa"}, _LORA, on=()),
    "lora_plus": Method("LORA", _BOTH, "Hayou 2024, arXiv 2402.12354", keys=_LORA, grouped=True, start="lora_plus"),
    "adalora": Method(
        "ADALORA", _BOTH, "Zhang 2023, arXiv 2303.10512",
        keys={"r": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    ),
    "ia3": Method("IA3", _BOTH, "Liu 2022, arXiv 2205.05638", start="vectors"),
    "vera": Method(
        "VERA", _LINEAR, "Kopiczko 2023, arXiv 2310.11454", keys={"r": "r", "dropout": "vera_dropout"}, rank=256,
        start="vectors",
    ),
    # peft rotates the windows of a convolution and adds up where they overlap: right for 1 x 1 windows only.
    "oft": Method(
        "OFT", _BOTH, "Qiu 2023, arXiv 2306.07280", {"oft_block_size": 32}, {"dropout": "module_dropout"},
        pointwise=True, start="rotations",
    ),
    "boft": Method(
        "BOFT", _BOTH, "Liu 2023, arXiv 2311.06243", {"boft_block_size": 4}, {"dropout": "boft_dropout"},
        block="boft_block_size", start="rotations",
    ),
    "loha": Method("LOHA", _BOTH, "Hyeon-Woo 2021, arXiv 2108.06098", keys=_LYCORIS, on=("8bit",)),
    "lokr": Method("LOKR", _BOTH, "Yeh 2023, arXiv 2309.14859", keys=_LYCORIS, on=("8bit",)),
    "ln_tuning": Method("LN_TUNING", frozenset({"norm"}), "Zhao 2023, arXiv 2312.11420", start="norms"),
}  # fmt: skip
"""Name in a recipe -> what it is. `{name: peft, method: …}` takes peft's other methods too."""

TARGETS = ("all", "all-linear", "attention", "mlp")
_KEYS = ("r", "alpha", "dropout", "rank_pattern", "alpha_pattern")


class AdapterOptions(Spec):
    """What adapters are put where, whatever their method."""

    targets: Pattern = "all"
    """Layers of the blocks: `all` the method can adapt, `all-linear`, `attention`, `mlp`, or a regular expression on
    their names; never the head."""
    r: Annotated[int, Field(ge=1)] | Auto | None = "auto"
    """Rank; auto = 8 for most methods (adalora: what is left at the end, on average), null for those without."""
    alpha: Annotated[float, Field(gt=0)] | Auto | None = "auto"
    """The adapter's output is multiplied by alpha / r (rslora: alpha / sqrt(r)); auto = r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapter's input."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Regular expression on layer names -> their rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Regular expression on layer names -> their alpha."""
    options: dict[str, Any] = {}
    """Passed to the method's configuration class of peft."""
    merge: bool = False
    """Keep the model with the adapters merged into its weights, in its own library's format, instead of an adapter."""


class AdapterSpec(AdapterOptions):
    """Adapters of one method."""

    method: str
    """A name of the table of methods, or any method of peft."""

    @model_validator(mode="after")
    def _keys_apply(self) -> AdapterSpec:
        check_keys(self, self.method)
        return self

    @property
    def table_row(self) -> Method:
        """The method's row; for a method of peft that has none, one that promises nothing."""
        keys = {"r": "r"} if self.r not in ("auto", None) else {}
        return METHODS.get(self.method) or Method(self.method.upper(), _BOTH, "peft", keys=keys)

    @property
    def rank(self) -> int:
        """The rank, `auto` resolved."""
        return self.r if isinstance(self.r, int) else self.table_row.rank

    def without_auto(self) -> dict[str, Any]:
        """Return `r` and `alpha` written out, null where the method has none."""
        values = {"r": self.rank, "alpha": self.rank if self.alpha in ("auto", None) else self.alpha}
        return {key: value if key in self.table_row.keys else None for key, value in values.items()}

    def peft_options(self) -> dict[str, Any]:
        """Return what to write into peft's config, by its own names."""
        method = self.table_row
        values = self.without_auto() | {
            "dropout": self.dropout,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        return {**method.options, **{ours: values[key] for key, ours in method.keys.items()}, **self.options}


def check_keys(given: AdapterOptions, method: str) -> None:
    """Raise ValueError when `given` sets a key that `method` has no use for."""
    if method not in METHODS:
        return
    for key in _KEYS:
        default = AdapterOptions.model_fields[key].get_default()
        if getattr(given, key) not in (default, None) and key not in METHODS[method].keys:
            has = [each for each in _KEYS if each in METHODS[method].keys]
            raise ValueError(
                f"`{key}` does not apply to {method}: "
                + (f"of these keys it has {', '.join(has)}" if has else "remove it")
            )
