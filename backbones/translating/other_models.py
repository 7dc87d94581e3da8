"""Name the models that are not plain vision transformers, by config.json, tensor names and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_bench.errors import UserError

if TYPE_CHECKING:
    from backbones.reading.source import Checkpoint

VIT = "give the weights of a vision transformer; `mae-bench list formats` lists what can be read"
TOWER = "if the model has an image encoder, give the file of that encoder (its vision tower)"
PARTS = "if its backbone is a vision transformer, save the state_dict of the backbone and give that file"
HEAD = "give the file of the backbone that the head belongs to"
VIDEO = "give an image model: a video model embeds several frames at once"
MERGE = "merge the adapter into its base model, save that, and give its file"
NEXT_STEPS = {"video": VIDEO, "text": TOWER, "parts": PARTS, "head": HEAD, "adapter": MERGE}


@dataclass(frozen=True)
class Model:
    """A model that is not a plain ViT.

    name: with its article. names: patterns of tensor names; each must occur, behind any prefix.
    without: a pattern that no name may match. group: a key of `NEXT_STEPS`, or "image". types: its
    `model_type`s in config.json. like_vit: a format of a plain ViT could take it for its own.
    """

    name: str
    names: tuple[str, ...] = ()
    without: str = ""
    group: str = "image"
    types: tuple[str, ...] = ()
    like_vit: bool = False


# model_types in config.json of transformers that need no name of their own
LANGUAGE = (
    *("albert", "electra", "deberta", "deberta-v2", "modernbert", "mpnet", "camembert", "data2vec-text"),
    *("gptj", "gpt_neo", "gpt_neox", "openai-gpt", "opt", "bloom", "mistral", "mixtral", "qwen2", "qwen3"),
    *(
        "gemma",
        "gemma2",
        "phi3",
        "mt5",
        "umt5",
        "longt5",
        "bart",
        "mbart",
        "pegasus",
        "xlnet",
        "siglip_text_model",
    ),
)
SPEECH = ("hubert", "wavlm", "data2vec-audio", "wav2vec2-bert", "wav2vec2-conformer", "speecht5", "sew")
DETECTORS = (
    "conditional_detr",
    "table-transformer",
    "rt_detr",
    "rt_detr_v2",
    "grounding-dino",
    "d_fine",
    "dab-detr",
)
SWIN = (
    r"layers\.0\.blocks\.0\.(attn|attention\.self)\.(qkv\.weight|relative_position_bias_table)|"
    r"features\.1\.0\.attn\.relative_position_bias_table|stages\.0\.blocks\.0\.attn\.w_msa\."
)
# The first model that fits counts: whole systems before the backbones inside them.
MODELS = (
    Model("a LoRA adapter", (r"lora_(A|down)\b.*weight",), group="adapter"),
    Model("a DINOv2 or DINOv3 linear head", (r"^weight$", r"^bias$"), r"\.", "head"),
    Model(
        "a linear head",
        (r"^(linear|fc|head|classifier|linear_head)\.weight$",),
        r"^(?!\w+\.(weight|bias)$)",
        "head",
    ),
    Model("a depth head", (r"^(decode_head|head)\.conv_depth\.",), r"^backbone\.", "head"),
    Model("a segmentation head", (r"^decode_head\.(conv_seg|cls_embed)\.",), r"^backbone\.", "head"),
    Model(
        "a DINO projection head",
        (r"^(\w+\.)*last_layer\.weight_[gv]$",),
        r"patch_embed|layer\d|stages",
        "head",
    ),
    Model(
        "a Mask2Former or MaskFormer",
        (r"sem_seg_head\.predictor\.(query_feat|query_embed|static_query)|transformer_module\.queries_",),
        group="parts",
        types=("mask2former", "maskformer"),
    ),
    Model(
        "a Deformable DETR",
        (r"self_attn\.sampling_offsets\.weight", r"class_embed|class_head"),
        "backbone.net",
        "parts",
        ("deformable_detr",),
    ),
    Model(
        "a DETR",
        (r"(query_embed|query_position_embeddings)\.weight$", r"class_embed|class_labels"),
        group="parts",
        types=("detr",),
    ),
    Model("a YOLO detector", (r"model\.\d+\.(cv1|m\.0\.cv1)\.conv\.weight",), group="parts"),
    Model("a YOLOS detector", group="parts", types=("yolos",)),
    Model(
        "a latent diffusion model", (r"model\.diffusion_model\.input_blocks\.0\.0\.weight",), group="parts"
    ),
    Model("a diffusion U-Net", (r"down_blocks\.\d\.resnets\.0\.conv1", r"time_embedding\.linear_1\.")),
    Model("a diffusion U-Net", (r"input_blocks\.0\.0\.weight", r"time_embed\.0\.weight")),
    Model("a diffusion transformer (DiT)", (r"adaLN_modulation\.1\.weight",), like_vit=True),
    Model("a VQGAN", (r"encoder\.(down|down_blocks)\.0\.", r"quantize\.embedding")),
    Model(
        "a variational autoencoder (VAE)",
        (r"encoder\.(down|down_blocks)\.0\.", r"decoder\.(up|up_blocks)\.0\."),
    ),
    Model(
        "a video transformer (TimeSformer)",
        (r"temporal_attn|temporal_attention", r"time_embed"),
        group="video",
        types=("timesformer",),
        like_vit=True,
    ),
    Model("a VideoMAE video transformer", group="video", types=("videomae", "videomt"), like_vit=True),
    Model(
        "a video transformer",
        (r"tubelet_embedding",),
        group="video",
        types=("vivit", "vjepa2", "videoprism"),
        like_vit=True,
    ),
    Model("an MViT", (r"attn\.pool_[kq]\b.*weight",), types=("mvit",), like_vit=True),
    Model(
        "a Swin Transformer V2",
        (r"layers\.0\.(blocks\.)?0\.attn\.(cpb_mlp|logit_scale)|continuous_position_bias_mlp",),
        types=("swinv2", "swin2sr"),
        like_vit=True,
    ),
    Model("a Swin Transformer V2", (r"features\.1\.0\.attn\.cpb_mlp",)),
    Model(
        "a Swin Transformer",
        (SWIN,),
        types=("swin", "donut-swin", "maskformer-swin"),
        like_vit=True,
    ),
    Model("a MaxViT", (r"attn_grid\.|layers\.grid_attention\.",)),
    Model(
        "a Hiera",
        (r"(^|\.)(blocks|layers)\.\d+\.proj\.weight$", r"patch_embed|patch_embeddings"),
        types=("hiera", "sam2"),
        like_vit=True,
    ),
    Model(
        "a SegFormer",
        (r"encoder\.block\.0\.0\.attention\.self\.",),
        r"sequence_reduction",
        types=("segformer",),
    ),
    Model("a SegFormer", (r"layers\.0\.1\.0\.attn\.attn\.", r"layers\.0\.1\.0\.ffn\.layers\.1\.")),
    Model(
        "a PVT v2 or SegFormer encoder",
        (r"(block1\.0|stages\.0\.blocks\.0|layers\.0\.0)\.mlp\.dwconv\.",),
        types=("pvt_v2",),
    ),
    Model(
        "a PVT",
        (r"block1\.0\.attn\.sr\.|patch_embeddings\.0\.position_embeddings|sequence_reduction",),
        types=("pvt",),
    ),
    Model("a Twins", (r"pos_block\.0\.proj\.0\.weight",)),
    Model("a CSWin Transformer", (r"stage1\.0\.attns\.0\.get_v\.",)),
    Model("a CvT", (r"conv_proj_q|convolution_projection_query",), types=("cvt",)),
    Model("an XCiT", (r"blocks\.0\.local_mp\.conv1\.",), like_vit=True),
    Model("a CaiT", (r"blocks_token_only\.0\.",), like_vit=True),
    Model("a FocalNet", (r"(blocks\.0|layers\.0)\.modulation\.",), types=("focalnet",)),
    Model(
        "a neighbourhood attention transformer (NAT)",
        (r"levels\.0\.blocks\.0\.attn\.rpb|attention\.self\.rpb",),
        types=("dinat", "nat"),
    ),
    Model("an InternImage", (r"levels\.0\.blocks\.0\.dcn\.",)),
    Model("a VMamba", (r"(op|self_attention)\.A_logs$",)),
    Model("a Vision Mamba (Vim)", (r"mixer\.A(_b)?_log$", r"patch_embed")),
    Model(
        "a Mamba language model", (r"mixer\.A_log$",), group="text", types=("mamba", "mamba2", "falcon_mamba")
    ),
    Model(
        "an MLP-Mixer", (r"blocks\.0\.(mlp_tokens\.fc1|token_mix\.0|linear_tokens)\b.*weight",), like_vit=True
    ),
    Model(
        "a PoolFormer",
        (r"(network|stages|encoder\.block)\.0\.(blocks\.)?0\.(mlp|output)\.(fc1|conv1)\.weight",),
        r"attn|conv_dw|dwconv|token_mixer",
        types=("poolformer",),
    ),
    Model(
        "a MobileViT",
        (r"transformer\.(layer\.)?0\.\w+", r"conv_1x1_(in|out|exp)|conv_kxk|conv_projection"),
        types=("mobilevit", "mobilevitv2"),
    ),
    Model("a LeViT", types=("levit",)),
    Model("a ConvNeXt V2", (r"(stages|downsample_layers)\.0", r"\.grn\."), types=("convnextv2",)),
    Model(
        "a ConvNeXt",
        (r"stages\.0\.(blocks\.|layers\.)?0\.(dwconv|conv_dw|depthwise_conv)\.weight",),
        r"xca",
        types=("convnext", "dinov3_convnext"),
    ),
    Model("a ConvNeXt", (r"features\.1\.0\.layer_scale$",)),
    Model(
        "an EfficientNet",
        (r"(_blocks\.0\._depthwise_conv|features\.1\.0\.block\.0\.0)\.weight",),
        types=("efficientnet",),
    ),
    Model(
        "an EfficientNet",
        (r"conv_stem\.weight", r"blocks\.\d\.0\.se\.", r"^(model\.|module\.|backbone\.)?bn2\.weight$"),
    ),
    Model(
        "a MobileNet",
        (r"(blocks\.0\.0\.conv_dw|features\.1\.conv\.0\.0|features\.1\.block\.0\.0)\.weight",),
        types=("mobilenet_v1", "mobilenet_v2"),
    ),
    Model("a RegNet", (r"trunk_output\.block1|(^|\.)s1\.b1\.conv1\.",), types=("regnet",)),
    Model("a DenseNet", (r"denseblock1\.denselayer1\.",)),
    Model("an Inception network", (r"Mixed_5b\.|inception3a\.|mixed_5b\.",)),
    Model("a SqueezeNet", (r"features\.3\.squeeze\.weight",)),
    Model("a ShuffleNet", (r"stage2\.0\.branch1\.0\.weight",)),
    Model(
        "a VGG", (r"(^|\.)features\.0\.weight$", r"features\.(10|11)\.weight$"), r"attn|running_mean.*attn"
    ),
    Model("an AlexNet", (r"(^|\.)features\.0\.weight$", r"classifier\.6\.weight$")),
    Model("a CLIP with a ResNet", (r"visual\.layer1\.0\.conv1\.", r"visual\.attnpool\.")),
    Model(
        "a ResNet",
        (r"(layer1|res2)\.0\.conv1\.weight|encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.",),
        types=("resnet", "bit"),
    ),
    Model(
        "a Whisper speech model",
        (r"decoder\.(layers|blocks)\.0\.(encoder_attn|cross_attn)\.", r"encoder\.conv1\.weight"),
        group="text",
        types=("whisper",),
    ),
    Model(
        "a wav2vec 2.0 speech model",
        (r"feature_extractor\.conv_layers\.0\.",),
        group="text",
        types=("wav2vec2",),
    ),
    Model("an audio spectrogram transformer", group="text", types=("audio-spectrogram-transformer",)),
    Model("a T5", (r"block\.0\.layer\.0\.SelfAttention\.q\.",), group="text", types=("t5",)),
    Model("a RoBERTa", (r"roberta\.encoder\.layer\.0\.",), group="text", types=("roberta", "xlm-roberta")),
    Model(
        "a DistilBERT", (r"transformer\.layer\.0\.attention\.q_lin\.",), group="text", types=("distilbert",)
    ),
    Model(
        "a BERT",
        (r"encoder\.layer\.0\.attention\.self\.query\.", r"embeddings\.word_embeddings\."),
        group="text",
        types=("bert",),
    ),
    Model("a GPT-2", (r"(^|\.)h\.0\.attn\.c_attn\.", r"wte\."), group="text", types=("gpt2",)),
    Model("an ImageGPT", types=("imagegpt",)),
    Model(
        "a LLaMA",
        (r"layers\.0\.(self_attn\.q_proj|attention\.wq)\.", r"embed_tokens|tok_embeddings"),
        r"vision|visual",
        "text",
        ("llama",),
    ),
    Model(
        "a CLIP text tower",
        (r"text_model\.encoder\.layers\.0\.self_attn\.|resblocks\.0\.attn\.", r"token_embedding\.weight"),
        r"visual|vision|patch",
        "text",
        ("clip_text_model",),
    ),
    Model("a language model", group="text", types=LANGUAGE),
    Model("a speech model", group="text", types=SPEECH),
    Model("a detector", group="parts", types=DETECTORS),
)
MAX_SHOWN = 60  # characters of a tensor's name that are shown


def check_is_vit(checkpoint: "Checkpoint", formats: list[str]) -> None:
    """Raise UserError that names the model, unless it may be a plain ViT.

    formats: those that fit. Models that look like a ViT are refused even then: Hiera has timm's names.
    """
    found = identify(checkpoint)
    if found is None or (formats and not found[0].like_vit):
        return
    model, evidence = found
    raise UserError(
        f"{checkpoint.source} is {model.name} ({evidence}); mae_bench reads vision transformers",
        fix=NEXT_STEPS.get(model.group, VIT),
    )


def identify(checkpoint: "Checkpoint") -> tuple[Model, str] | None:
    """Return the model that a file holds, with the evidence for it, or None if no known model fits."""
    config = checkpoint.beside.get("config.json", {})
    for model in MODELS:
        if config.get("model_type") in model.types:
            return model, f"model_type {config['model_type']} in config.json"
    stored = checkpoint.stored
    for model in MODELS:
        evidence = _find_evidence(model, stored)
        if evidence:
            return model, f"it holds {evidence[:MAX_SHOWN]}"
    return _identify_by_shapes({name: tuple(tensor.shape) for name, tensor in stored.items()})


def _find_evidence(model: Model, stored: Mapping[str, object]) -> str:
    """Return the first name that the model is recognised by, "" if a pattern has no match."""
    if not model.names or (model.without and any(re.search(model.without, name) for name in stored)):
        return ""
    matches = [next((name for name in stored if re.search(pattern, name)), "") for pattern in model.names]
    return matches[0] if all(matches) else ""


def _identify_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Model, str] | None:
    """Return a video model by its patch embedding (D, C, T, p, p), a hierarchical one by its widths."""
    widths: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        if re.search(r"(^|\.)patch_embed\w*(\.\w+)*\.weight$", name) and len(shape) == 5:
            model = Model("a video transformer (VideoMAE, V-JEPA, ...)", group="video", like_vit=True)
            return model, f"{name[:MAX_SHOWN]} has shape {shape}"
        norm = re.search(r"^(.*(?:blocks|stages)\.)\d+\.(.*norm1|layernorm_before)\.weight$", name)
        if norm:
            widths.setdefault(norm[1] + norm[2], set()).add(shape[0] if shape else 0)
    mixed = next((stem for stem, found in widths.items() if len(found) > 1), None)
    if mixed is None:
        return None
    sizes = ", ".join(map(str, sorted(widths[mixed])))
    model = Model("a transformer whose blocks differ in width", like_vit=True)
    return model, f"the widths of its blocks are {sizes}"
