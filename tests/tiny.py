"""Tiny random models on disk, in the layout their own libraries save: one table row per family.

`timm_folder` and `transformers_folder` write a pretrained-looking folder in well under a second, so that
tests reach a model the way users do: by the folder's path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = (
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *(
        "good",
        "bad",
        "fine",
        "poor",
        "film",
        "soup",
        "the",
        "a",
        "was",
        "is",
        "not",
        "very",
        "we",
        "liked",
        "it",
    ),
)
SIZE = 32
"""Height and width of the tiny vision models."""

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet10t", {"stem_width": 8, "channels": (8, 16, 24, 32)}),
    "mobilenetv2": ("mobilenetv2_035", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "efficientnet": ("test_efficientnet", {}),
    "convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
    ),
    "deit": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIZE,
            "window_size": 2,
            "embed_dim": 16,
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 2, 2),
        },
    ),
}
"""family -> timm architecture, constructor arguments."""

_ENCODER = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _ENCODER),
    "roberta": ("RobertaConfig", _ENCODER),
    "xlm-roberta": ("XLMRobertaConfig", _ENCODER),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": len(VOCABULARY), "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
        | {"max_position_embeddings": 40},
    ),
    "deberta": (
        "DebertaV2Config",
        _ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        }
        | {"share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "electra": ("ElectraConfig", _ENCODER | {"embedding_size": 16}),
    "albert": ("AlbertConfig", _ENCODER | {"embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        _ENCODER | {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "mpnet": ("MPNetConfig", _ENCODER),
}
"""family -> transformers config class, its arguments."""

VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", _PATCHES),
    "deit": ("DeiTConfig", _PATCHES),
    "beit": ("BeitConfig", _PATCHES | {"use_shared_relative_position_bias": True}),
    "dinov2": ("Dinov2Config", _PATCHES | {"mlp_ratio": 2}),
    "swin": (
        "SwinConfig",
        {
            "image_size": SIZE,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
    ),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": SIZE},
    ),
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "mobilenetv2": ("MobileNetV2Config", {"image_size": SIZE, "depth_multiplier": 0.25}),
}
"""family -> transformers config class, its arguments."""


def timm_folder(
    folder: Path, family: str, *, classes: int = 7, label_names: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """Write a random timm model of `TIMM[family]` to `folder`; 0 classes makes it headless."""
    import timm

    architecture, args = TIMM[family]
    with _seeded(seed):
        model = timm.create_model(architecture, num_classes=classes, **args)
        _shake(model)
    timm.models.save_for_hf(
        model,
        folder,
        model_config={"label_names": list(label_names)} if label_names else {},
        model_args={key: list(value) if isinstance(value, tuple) else value for key, value in args.items()},
        safe_serialization=True,
        data_config={
            "input_size": (3, SIZE, SIZE),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.3, 0.4),
            "crop_pct": 0.9,
        },
    )
    return folder


def transformers_folder(
    folder: Path, family: str, *, head: bool = False, label_names: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """Write a random transformers model of `TEXT[family]` or, with `vision-` before it, `VISION[family]`.

    The folder holds the tokenizer or the image processor too. Without `head` it is the bare encoder, as most
    pretrained checkpoints are.
    """
    import transformers

    vision = family.startswith("vision-")
    name, args = VISION[family.removeprefix("vision-")] if vision else TEXT[family]
    if not vision:
        args = args | {"pad_token_id": 1}
    if label_names:
        args = args | {
            "id2label": dict(enumerate(label_names)),
            "label2id": {n: i for i, n in enumerate(label_names)},
        }
    config = getattr(transformers, name)(**args)
    auto: Any = transformers.AutoModel
    if head:
        auto = (
            transformers.AutoModelForImageClassification
            if vision
            else transformers.AutoModelForSequenceClassification
        )
    classes = auto._model_mapping[type(config)]
    with _seeded(seed):
        model = (classes[0] if isinstance(classes, (list, tuple)) else classes)(config)
        _shake(model)
    with quiet():
        model.save_pretrained(folder)
    beside: Any = image_processor() if vision else tokenizer(tell_pairs=family == "bert")
    beside.save_pretrained(folder)
    return folder


def tokenizer(*, tell_pairs: bool = False) -> Any:
    """Return a tokenizer of whole words over `VOCABULARY`, 128 tokens long, padding with id 1.

    With `tell_pairs` it gives `token_type_ids`, as BERT's does.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    names = ["input_ids", *(["token_type_ids"] if tell_pairs else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=128, model_input_names=names, **special
    )


def image_processor(**changes: Any) -> Any:
    """Return an image processor for 32 x 32 pixels with mean and std that are nobody's default."""
    from transformers import ViTImageProcessor

    given = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    return ViTImageProcessor(**(given | changes))


def batch(modality: str, rows: int = 3, *, seed: int = 0) -> dict[str, Any]:
    """Return model inputs: random pixels, or token ids of unequal lengths with their mask."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if modality == "image":
        return {"pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=generator)}
    ids = torch.randint(4, len(VOCABULARY), (rows, 8), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 8 - row :] = 0
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def quiet() -> Any:
    """Silence transformers' progress bars inside a `with`."""
    from hf_finetune.models.load_transformers import quiet as quietly

    return quietly()


def _seeded(seed: int) -> Any:
    from hf_finetune.models.load import seeded

    return seeded(seed)


def _shake(model: Any) -> None:
    """Move every tensor off its initial value, so that a test can tell loaded from freshly initialised."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn_like(tensor))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(0.1 * torch.randn_like(tensor))
