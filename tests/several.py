"""Run every recipe of a folder, one after the other: `python several.py FOLDER`.

What a launcher would say to one of them in the environment stands beside its recipe, in `<name>.json`. What fails is
written there too, to `<name>.error`, and the others have their turn.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune

for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    said = path.with_suffix(".json")
    try:
        with patch.dict(os.environ, json.loads(said.read_text()) if said.exists() else {}):
            finetune(load_recipe(path), quiet=True)
    except Exception:
        path.with_suffix(".error").write_text(traceback.format_exc())
