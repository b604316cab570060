"""Fine-tune any timm or transformers backbone from one short recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe, load_recipe
    from hf_finetune.runfolder import Run, load_run
    from hf_finetune.train import finetune

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "__version__", "finetune", "load_recipe", "load_run"]

_HOMES = {
    "Recipe": "hf_finetune.recipe",
    "load_recipe": "hf_finetune.recipe",
    "Run": "hf_finetune.runfolder",
    "load_run": "hf_finetune.runfolder",
    "finetune": "hf_finetune.train",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first asked for: `import hf_finetune` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_finetune' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
