"""What a checkpoint reads: image size, normalisation, crop, or tokenizer and length. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.data.model_config import resolve_input_data_config
from torch import nn

from hf_finetune.errors import ModelError
from hf_finetune.models.backbone import ImageInput, TextInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1_000_000
"""Length given when neither the positions nor the tokenizer set one (relative positions)."""
_SENTINEL = 1e9  # tokenizers that know no limit say 1e30
_SAVE_TOKENIZER = (
    "Save one beside the model: `AutoTokenizer.from_pretrained(<original id>).save_pretrained(<folder>)`."
)
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's numbering


def timm_input(where: str, model: nn.Module) -> ImageInput:
    """Return what a timm model reads, at the size it was built for.

    Raises:
        ModelError: the model does not read three channels.
    """
    data = resolve_input_data_config(model)
    channels, height, width = data["input_size"]
    _require_rgb(where, channels)
    return ImageInput(
        size=(height, width),
        mean=tuple(float(v) for v in data["mean"]),
        std=tuple(float(v) for v in data["std"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
        interpolation=str(data["interpolation"]),
    )


def load_processor(where: str, folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the image processor beside a transformers checkpoint.

    Raises:
        ModelError: there is none, so size and normalisation are unknown.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{where}: no usable image processor in {folder} (preprocessor_config.json), so image size, mean "
            f"and std are unknown: {_first_line(error)} Save one beside the model: "
            "`AutoImageProcessor.from_pretrained(<original id>).save_pretrained(<folder>)`."
        ) from None


def processor_input(
    where: str, processor: Any, *, image_size: int | tuple[int, int] | None = None
) -> ImageInput:
    """Return what a transformers image processor does, in timm's terms; `image_size` overrides its size.

    Raises:
        ModelError: the processor states no size.
    """
    size = _as_dict(getattr(processor, "size", None))
    crop = (
        _as_dict(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else {}
    )
    crop_pct = getattr(processor, "crop_pct", None)
    if crop:
        target = _sides(crop)
        resized = size.get("shortest_edge") or min(_sides(size) or target or (0,))
        crop_pct, crop_mode = (min(target) / resized if target and resized else 1.0), "center"
        if not size.get("shortest_edge") and _sides(size):
            crop_mode = "squash"
    elif crop_pct and size.get("shortest_edge"):
        # ConvNeXt's rule: below 384 pixels crop, from there on squash.
        edge = size["shortest_edge"]
        target = (edge, edge)
        crop_pct, crop_mode = (crop_pct, "center") if edge < 384 else (1.0, "squash")
    else:
        target = _sides(size)
        crop_pct, crop_mode = 1.0, "center" if size.get("shortest_edge") else "squash"
    if image_size is not None:
        target = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if not target:
        raise ModelError(
            f"{where}: its image processor states no size ({size or 'nothing'}). Write `size` into "
            "preprocessor_config.json, or give `backbone.options.image_size`."
        )
    normalises = getattr(processor, "do_normalize", True)
    mean = tuple(float(v) for v in processor.image_mean) if normalises else (0.0, 0.0, 0.0)
    std = tuple(float(v) for v in processor.image_std) if normalises else (1.0, 1.0, 1.0)
    # Our pixels are in 0..1. Where the processor scales 0..255 otherwise, the factor moves into mean and std.
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    if abs(scale - 1) > 1e-6:
        mean, std = tuple(v / scale for v in mean), tuple(v / scale for v in std)
    _require_rgb(where, len(mean))
    return ImageInput(target, mean, std, float(min(crop_pct, 1.0)), crop_mode, _interpolation(processor))


def resize_processor(processor: Any, read: ImageInput) -> None:
    """Let an image processor make images of the size that `processor_input` was told: it is saved with the model."""
    height, width = read.size
    by_edge = "shortest_edge" in _as_dict(processor.size)
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": height, "width": width}
        height, width = round(height / read.crop_pct), round(width / read.crop_pct)
    processor.size = {"shortest_edge": min(height, width)} if by_edge else {"height": height, "width": width}


def load_text_input(where: str, folder: Path, model: nn.Module, *, trust_remote_code: bool) -> TextInput:
    """Load the tokenizer beside a transformers checkpoint; makes sure model and tokenizer agree on padding.

    Raises:
        ModelError: there is no tokenizer, it does not fit the embeddings, or it cannot pad.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{where}: no usable tokenizer in {folder}: {_first_line(error)} {_SAVE_TOKENIZER}"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without its vocabulary file, transformers makes an empty tokenizer and says nothing.
        raise ModelError(f"{where}: the tokenizer in {folder} has no words. {_SAVE_TOKENIZER}")
    config: Any = model.config
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{where}: its tokenizer has no padding token and no end-of-text token to pad with. "
                "Set `pad_token` in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        # Decoders classify the last token that is not padding: they must know what padding is.
        config.pad_token_id = tokenizer.pad_token_id
    rows = getattr(config, "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise ModelError(
            f"{where}: its tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings. "
            "They do not belong together: save the tokenizer the model was trained with."
        )
    return TextInput(tokenizer, _max_length(config, model, tokenizer))


def _max_length(config: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    limits = [n for n in (tokenizer.model_max_length,) if n < _SENTINEL]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - _position_offset(model))
    return int(min(limits, default=UNLIMITED))


def _position_offset(model: nn.Module) -> int:
    """Positions RoBERTa and its kin never use: theirs start after the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _as_dict(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"shortest_edge": size}
    return (
        {k: v for k, v in dict(size).items() if v is not None} if isinstance(size, Mapping) else _fields(size)
    )


def _fields(size: Any) -> dict[str, int]:
    names = ("height", "width", "shortest_edge", "longest_edge")
    return {name: value for name in names if (value := getattr(size, name, None)) is not None}


def _sides(size: dict[str, int]) -> tuple[int, int] | None:
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else None


def _interpolation(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    if isinstance(resample, int) and 0 <= int(resample) < len(_INTERPOLATIONS):
        return _INTERPOLATIONS[int(resample)]
    return str(getattr(resample, "value", resample or "bilinear"))


def _require_rgb(where: str, channels: int) -> None:
    if channels != 3:
        raise ModelError(
            f"{where}: it reads {channels} channels; images are read as RGB. Take a backbone of 3 channels."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.')}." if lines else f"{type(error).__name__}."
