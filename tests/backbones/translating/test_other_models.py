"""Models that are not plain ViTs are named, in at most three lines, and no ViT is taken for one of them."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbones.load import load_backbone
from backbones.reading.source import Checkpoint, open_source
from backbones.translating.detect import FORMATS
from backbones.translating.other_models import identify
from mae_bench.errors import UserError

Shapes = dict[str, tuple[int, ...]]

OF_TIMM = {
    "resnet18": "a ResNet",
    "convnext_atto": "a ConvNeXt",
    "convnextv2_atto": "a ConvNeXt V2",
    "swin_tiny_patch4_window7_224": "a Swin Transformer",
    "swinv2_tiny_window8_256": "a Swin Transformer V2",
    "hiera_tiny_224": "a Hiera",
    "mvitv2_tiny": "an MViT",
    "pvt_v2_b0": "a PVT v2 or SegFormer encoder",
    "maxvit_tiny_tf_224": "a MaxViT",
    "efficientnet_b0": "an EfficientNet",
    "mobilenetv3_small_050": "a MobileNet",
    "mobilenetv2_050": "a MobileNet",
    "regnetx_002": "a RegNet",
    "densenet121": "a DenseNet",
    "vgg11": "a VGG",
    "inception_v3": "an Inception network",
    "mixer_s16_224": "an MLP-Mixer",
    "poolformer_s12": "a PoolFormer",
    "xcit_nano_12_p16_224": "an XCiT",
    "cait_xxs24_224": "a CaiT",
    "focalnet_tiny_srf": "a FocalNet",
    "twins_svt_small": "a Twins",
    "mobilevit_xxs": "a MobileViT",
    "crossvit_tiny_240": "a transformer whose blocks differ in width",
}
# Some names of each model's files, in the layout of its authors.
BY_NAMES: dict[str, Shapes] = {
    "a SegFormer": {"segformer.encoder.block.0.0.attention.self.query.weight": (8, 8)},
    "a PVT": {"block1.0.attn.sr.weight": (8, 8, 8, 8), "pos_embed1": (1, 4, 8)},
    "a CSWin Transformer": {"stage1.0.attns.0.get_v.weight": (8, 1, 3, 3)},
    "a CvT": {"stage0.blocks.0.attn.conv_proj_q.conv.weight": (8, 1, 3, 3)},
    "a video transformer (TimeSformer)": {
        "model.time_embed": (1, 8, 8),
        "model.blocks.0.temporal_attn.qkv.weight": (24, 8),
    },
    "a video transformer (VideoMAE, V-JEPA, ...)": {"encoder.patch_embed.proj.weight": (8, 3, 2, 16, 16)},
    "a BERT": {
        "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
        "bert.embeddings.word_embeddings.weight": (9, 8),
    },
    "a RoBERTa": {"roberta.encoder.layer.0.attention.self.query.weight": (8, 8)},
    "a GPT-2": {"transformer.h.0.attn.c_attn.weight": (8, 24), "transformer.wte.weight": (9, 8)},
    "a LLaMA": {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.embed_tokens.weight": (9, 8)},
    "a T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
    "a CLIP text tower": {
        "transformer.resblocks.0.attn.in_proj_weight": (24, 8),
        "token_embedding.weight": (9, 8),
    },
    "a Whisper speech model": {
        "model.encoder.conv1.weight": (8, 80, 3),
        "model.decoder.layers.0.encoder_attn.q_proj.weight": (8, 8),
    },
    "a wav2vec 2.0 speech model": {"wav2vec2.feature_extractor.conv_layers.0.conv.weight": (8, 1, 10)},
    "a diffusion U-Net": {
        "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "time_embedding.linear_1.weight": (8, 8),
    },
    "a latent diffusion model": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "a diffusion transformer (DiT)": {
        "blocks.0.adaLN_modulation.1.weight": (48, 8),
        "x_embedder.proj.weight": (8, 4, 2, 2),
    },
    "a variational autoencoder (VAE)": {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (8,),
        "decoder.up_blocks.0.x": (8,),
    },
    "a DETR": {
        "query_embed.weight": (100, 8),
        "class_embed.weight": (92, 8),
        "backbone.0.body.layer1.0.conv1.weight": (8,),
    },
    "a YOLO detector": {"model.2.cv1.conv.weight": (8, 8, 1, 1)},
    "a Mask2Former or MaskFormer": {"sem_seg_head.predictor.query_feat.weight": (100, 8)},
    "a Mamba language model": {"backbone.layers.0.mixer.A_log": (8, 8)},
    "a Vision Mamba (Vim)": {"layers.0.mixer.A_log": (8, 8), "patch_embed.proj.weight": (8, 3, 16, 16)},
    "a VMamba": {"layers.0.blocks.0.op.A_logs": (8, 8)},
    "an InternImage": {"levels.0.blocks.0.dcn.offset.weight": (8, 8)},
    "a LoRA adapter": {"base_model.model.encoder.layer.0.lora_A.weight": (4, 8)},
    "a DINOv2 or DINOv3 linear head": {"weight": (1000, 768), "bias": (1000,)},
    "a segmentation head": {
        "decode_head.conv_seg.weight": (150, 384, 1, 1),
        "decode_head.conv_seg.bias": (150,),
    },
    "a DINO projection head": {
        "mlp.0.weight": (8, 8),
        "last_layer.weight_g": (8, 1),
        "last_layer.weight_v": (8, 8),
    },
}
BY_TYPE = {
    "resnet": "a ResNet",
    "segformer": "a SegFormer",
    "hiera": "a Hiera",
    "videomae": "a VideoMAE video transformer",
    "vivit": "a video transformer",
    "bert": "a BERT",
    "albert": "a language model",
    "whisper": "a Whisper speech model",
    "yolos": "a YOLOS detector",
    "convnext": "a ConvNeXt",
    "levit": "a LeViT",
    "imagegpt": "an ImageGPT",
}


def refuse(path: Path) -> str:
    """Return how a file is refused: at most three lines, without the list of all formats."""
    with pytest.raises(UserError) as error:
        load_backbone(path)
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    assert "Next: " in message
    assert sum(name in message for name in FORMATS) < 3
    return message


@pytest.mark.parametrize("name", OF_TIMM)
def test_models_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = identify(Checkpoint(name, "", dict(model.state_dict())))
    assert found is not None
    assert found[0].name == OF_TIMM[name]


@pytest.mark.parametrize("name", BY_NAMES)
def test_names_and_shapes(tmp_path: Path, name: str) -> None:
    torch.save({key: torch.zeros(shape) for key, shape in BY_NAMES[name].items()}, tmp_path / "x.pth")
    assert f"x.pth is {name} (" in refuse(tmp_path / "x.pth")


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_model_types(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert f"is {BY_TYPE[model_type]} (model_type {model_type} in config.json)" in refuse(tmp_path)


def test_hiera_is_not_taken_for_a_windowed_vit(tmp_path: Path) -> None:
    torch.save(timm.create_model("hiera_tiny_224").state_dict(), tmp_path / "x.pth")
    assert "is a Hiera" in refuse(tmp_path / "x.pth")


def test_what_is_unknown_is_not_named(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    message = refuse(tmp_path / "x.pth")
    assert "fits no known format: a.weight" in message
    assert "mae-bench list formats" in message


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"simmim"}))
def test_no_vit_is_taken_for_another_model(tmp_path: Path, format: str) -> None:
    files: dict[str, tuple[Path, dict[str, Any]]]
    files = import_module(f"tests.backbones.formats.toys_{format}").write(tmp_path)
    for name, (path, options) in files.items():
        found = identify(open_source(path, weights=options.get("weights")))
        assert found is None or not found[0].like_vit, name
