"""A script, not a module of ours: it reads model folders with their own library alone, and tells what they answer.

`python -I reader.py FOLDER…` (folders to find libraries in) reads commands from its input, one JSON object a line:
`{"import": [module, …]}` loads libraries ahead of time, `{"read": …}` (see `read`) is answered by one line of output.
Each reading happens in a process of its own, forked where the system can; nothing of hf_finetune can be imported here.
It leaves when its input ends, so it never outlives who started it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

FORKS = sys.platform.startswith("linux")
"""Elsewhere a process that has loaded such libraries cannot be forked safely: each reads once."""


def main() -> None:
    """Serve commands until the input ends."""
    if hasattr(os, "nice"):
        os.nice(10)  # the run goes first: its threads wait for each other when one has to share a core
    gc.disable()  # libraries are a million objects and no garbage: looking for it takes a sixth of their imports
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    sys.modules["hf_finetune"] = None  # type: ignore[assignment]  # an import of it fails
    sys.path += [folder for folder in sys.argv[1:] if folder not in sys.path]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C means the run: that decides
    waiting = b""
    while block := os.read(0, 65536):
        *lines, waiting = (waiting + block).split(b"\n")
        for line in lines:
            command = json.loads(line)
            for name in command.get("import", []):
                importlib.import_module(name)
            if "read" in command:
                answer = _in_a_fork(command["read"]) if FORKS else _answer(command["read"])
                answers.write(json.dumps(answer) + "\n")
                answers.flush()


def read(
    folder: str,
    task: str,
    place: str,
    max_length: int | None,
    remote_code: bool,
    threads: int,
    base: str | None = None,
) -> dict[str, Any]:
    """Load the model in `folder` and write its logits to `place`; return what else is to be compared.

    Args:
        folder: a model folder of timm, transformers or peft, as its config files say.
        task: `image-classification` or `text-classification`.
        place: holds `inputs.safetensors`, and the same samples raw: `00.png` … or `texts.json` (a list of texts, or two
            of pairs). `answer.safetensors` is written: `ready` and `raw` logits, `inputs.…` made from what was raw.
        max_length: tokens a text is cut at.
        remote_code: run code that came with the model.
        threads: to compute with.
        base: the folder of an adapter's base model, if that is no repository: the adapter does not say where it lies.
    """
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    adapted = Path(folder, "adapter_config.json").is_file()
    library = "timm" if "architecture" in config else "transformers"
    if library == "timm":
        model = _timm_model(folder, config, adapted, base)
        names: Any = config.get("label_names")
    else:
        model = _transformers_model(folder, task, adapted, remote_code, base)
        found = model.config.id2label
        names = [found[index] for index in sorted(found)]
        backwards = model.config.label2id
        names = [name if backwards.get(name) == index else f"{name} (label2id: {backwards.get(name)})"
                 for index, name in enumerate(names)]  # fmt: skip
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder, torch_device="cpu")
    model = model.eval().float()

    ready = load_file(Path(place, "inputs.safetensors"))
    if task == "text-classification":
        raw = _tokenised(
            folder, json.loads(Path(place, "texts.json").read_text(encoding="utf-8")), max_length, remote_code
        )
    else:
        pictures = [_picture(path) for path in sorted(Path(place).glob("*.png"))]
        raw = {"pixel_values": _preprocessed(folder, config, model, pictures, library, remote_code)}
    with torch.no_grad():
        found_logits = {"ready": _logits(model, ready), "raw": _logits(model, raw)}
    inputs = {f"inputs.{name}": tensor.contiguous() for name, tensor in raw.items()}
    save_file({**found_logits, **inputs}, Path(place, "answer.safetensors"))
    modules = ("torch", library, *(("peft",) if adapted else ()))
    return {
        "library": "peft" if adapted else library,
        "labels": list(names or []),
        "versions": {name: sys.modules[name].__version__ for name in modules},
        "ours": sorted(
            n for n, m in sys.modules.items() if n.split(".")[0] == "hf_finetune" and m is not None
        ),
    }


def _timm_model(folder: str, config: dict[str, Any], adapted: bool, base: str | None) -> Any:
    import timm

    if not adapted:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
    if base is not None:
        return timm.create_model(f"local-dir:{base}", pretrained=True, **arguments)
    name, revision = _base(folder)
    if revision is None:  # built from the registry, so all it was given is in the adapter
        return timm.create_model(name.removeprefix("timm/"), pretrained=False, **arguments)
    return timm.create_model(f"hf-hub:{name}@{revision}", pretrained=True, **arguments)


def _transformers_model(folder: str, task: str, adapted: bool, remote_code: bool, base: str | None) -> Any:
    import transformers

    auto = {
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
    }[task]
    if not adapted:
        return auto.from_pretrained(folder, trust_remote_code=remote_code)
    name, revision = (base, None) if base is not None else _base(folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    return auto.from_pretrained(
        name, revision=revision, config=config, ignore_mismatched_sizes=True, trust_remote_code=remote_code,
        dtype="float32",
    )  # fmt: skip


def _base(folder: str) -> tuple[str, str | None]:
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    return config["base_model_name_or_path"], config.get("revision")


def _logits(model: Any, inputs: dict[str, Any]) -> Any:
    output = model(inputs["pixel_values"]) if "pixel_values" in inputs else model(**inputs)
    return getattr(output, "logits", output).float().contiguous()


def _picture(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _preprocessed(
    folder: str, config: dict[str, Any], model: Any, pictures: list[Any], library: str, remote_code: bool
) -> Any:
    """Return pixels as the library itself makes them, by what the folder says."""
    if library == "timm":
        import torch
        from timm.data import create_transform, resolve_data_config

        given = config.get("pretrained_cfg", {})
        transform = create_transform(
            **resolve_data_config({}, pretrained_cfg=given, model=None), is_training=False
        )
        return torch.stack([transform(picture) for picture in pictures])
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=remote_code)
    return processor(pictures, return_tensors="pt")["pixel_values"]


def _tokenised(
    folder: str, texts: list[list[str]], max_length: int | None, remote_code: bool
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    return dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))


# ---- one process for each reading ----------------------------------------------------------------------------------


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        answer = read(**request)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        trace = "".join(traceback.format_exception(error))
        return {"error": f"{type(error).__name__}: {lines[0]}", "traceback": trace}
    return {**answer, "seconds": round(time.monotonic() - started, 3)}


def _in_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in a child, so that no model, cache or setting of an earlier one is there."""
    server, file = os.getpid(), Path(request["place"], "answer.json")
    child = os.fork()
    if child == 0:
        threading.Thread(target=_end_with, args=(server,), daemon=True).start()
        file.write_text(json.dumps(_answer(request)), encoding="utf-8")
        os._exit(0)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if select.select([0], [], [], 0.01)[
            0
        ]:  # nothing is sent while an answer is awaited: the input has ended
            os._exit(0)
    code = os.waitstatus_to_exitcode(ended[1])
    if code or not file.is_file():
        what = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = "; the system does that when memory runs out" if code == -signal.SIGKILL else ""
        return {"error": f"the process reading the model ended by {what}{memory}", "traceback": ""}
    return json.loads(file.read_text(encoding="utf-8"))


def _end_with(server: int) -> None:
    while os.getppid() == server:
        time.sleep(0.05)
    os._exit(1)


if __name__ == "__main__":
    main()
