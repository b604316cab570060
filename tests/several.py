"""Run every recipe of a folder, one after the other: `python several.py FOLDER`.

What fails is written beside its recipe, to `<name>.error`, and the others have their turn.
"""

import sys
import traceback
from pathlib import Path

from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune

for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        finetune(load_recipe(path), quiet=True)
    except Exception:
        path.with_suffix(".error").write_text(traceback.format_exc())
