"""clip: OpenAI's and OpenCLIP's image towers against the code of arXiv 2103.00020, and their activations."""

import json
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from backbones.adapters.features import get_layer_id
from backbones.inspection import inspect_checkpoint
from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_clip
from tests.backbones.formats.reference import apply_linear, apply_norm, check_real_size, fill
from tests.parity import assert_parity

pytestmark = pytest.mark.usefixtures("toy_heads")

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def forward(w: dict[str, torch.Tensor], imgs: torch.Tensor, heads: int, activation: str) -> torch.Tensor:
    """Compute the blocks' tokens with torch's attention: pre-norm blocks after a norm of the embeddings."""
    linear, norm = partial(apply_linear, w), partial(apply_norm, w, eps=1e-5)
    x = F.conv2d(imgs, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre") if "ln_pre.weight" in w else x
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        block = f"transformer.resblocks.{i}"
        attention = torch.nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, dtype=x.dtype)
        attention.load_state_dict({n: w[f"{block}.attn.{n}"] for n in attention.state_dict()})
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0] * w.get(f"{block}.ls_1.gamma", 1)
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        y = linear(ACTIVATIONS[activation](y), f"{block}.mlp.c_proj")
        x = x + y * w.get(f"{block}.ls_2.gamma", 1)
    return x


def last_norm(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return apply_norm(w, x, "ln_post", eps=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def stored(path) -> dict[str, torch.Tensor]:
    path = path / "open_clip_model.safetensors" if path.is_dir() else path
    content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    named = content.get("state_dict", content)
    bare = {name.removeprefix("module."): tensor.double() for name, tensor in named.items()}
    return {
        name.removeprefix("visual."): t
        for name, t in bare.items()
        if "visual.class_embedding" not in bare or "visual." in name
    }


def test_heads_that_no_tensor_shows_are_not_said_to_be_read_from_the_tensors(files):
    origin = inspect_checkpoint(files["openai"][0])["origins"]["num_heads"]
    assert origin == "64 channels per head, as in the authors' code"
    assert f"num_heads 3: {origin}" in load_backbone(files["openai"][0])[2].assumptions


@pytest.mark.parametrize(
    ("name", "heads", "activation"),
    [
        ("openai", 3, "quick_gelu"),
        ("training", 3, "gelu"),
        ("tower", 3, "quick_gelu"),
        ("open_clip", 6, "gelu"),
        ("quickgelu", 3, "quick_gelu"),
        ("clipa", 3, "gelu"),
    ],
)
@torch.no_grad()
def test_features_equal_the_published_forward(files, imgs, name, heads, activation):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    weights = stored(path)
    tokens = forward(weights, imgs, heads, activation)
    model.double().eval()
    if name == "clipa":  # its last norm stands behind the average of the patch tokens
        found, want = (
            model.forward_head(model.forward_features(imgs), pre_logits=True),
            last_norm(weights, tokens[:, 1:].mean(1)),
        )
        assert spec.global_pool == "avg"
    else:
        found, want = model.forward_features(imgs), last_norm(weights, tokens)
        assert spec.global_pool == "token"
    assert_parity(found, want)
    assert (report.format, spec.num_heads, spec.norm_eps, spec.pretrain_method) == (
        "clip",
        heads,
        1e-5,
        "clip",
    )
    assert spec.options.get("pre_norm", False) is (name != "clipa")
    assert backbone_gmacs(spec) > 0


@pytest.mark.parametrize("config", [True, False])
def test_a_tower_of_timm_in_its_files_is_fed_as_clip(tmp_path, config):
    tower = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    weights = {f"visual.trunk.{name}": tensor for name, tensor in tower.state_dict().items()} | fill(
        toys_clip.TEXT
    )
    folder = toys_clip.open_clip_folder(tmp_path / "x", weights, {"timm_model_name": "toy"})
    if not config:
        (folder / "open_clip_config.json").unlink()
    _, spec, report = load_backbone(folder)
    assert (report.format, spec.pretrain_method, spec.norm_eps) == ("timm", "clip", 1e-6)
    assert spec.mean == ((0.5,) * 3 if config else (0.48145466, 0.4578275, 0.40821073))


def test_it_is_fine_tuned_as_any_backbone(files, imgs):
    model, spec, _ = load_backbone(files["quickgelu"][0], drop_path_rate=0.1)
    Classifier(model, spec, 5, "token", fc_norm=False)(imgs.float()).sum().backward()
    layers = {
        name: get_layer_id(name, spec.depth)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert layers.keys() == dict(model.named_parameters()).keys()
    assert (layers["norm_pre.weight"], layers["blocks.1.attn.qkv.weight"], layers["norm.weight"]) == (0, 2, 3)


def test_how_images_are_fed(files):
    openai, folder = load_backbone(files["openai"][0])[1], load_backbone(files["open_clip"][0])[1]
    assert openai.mean == (0.48145466, 0.4578275, 0.40821073)
    assert openai.std == (0.26862954, 0.26130258, 0.27577711)
    assert (folder.mean, folder.std, folder.interpolation) == ((0.5,) * 3, (0.4,) * 3, "bilinear")


def test_tables_are_resampled_as_by_open_clip(files):
    """open_clip/model.py resize_pos_embed antialiases; transformers' port does not."""
    path, options = next(iter(files.values()))
    assert load_backbone(path, **options)[1].pos_resample == "bicubic_antialias"


def test_nothing_is_guessed_of_the_activation(files, imgs):
    path = files["training"][0]
    with pytest.raises(UserError, match="act_layer"):
        load_backbone(path)
    features = [
        load_backbone(path, overrides={"options": {"act_layer": a}})[0].eval().forward_features(imgs.float())
        for a in ACTIVATIONS
    ]
    assert (features[0] - features[1]).abs().max() > 1e-2


def test_what_stands_outside_of_the_tower_has_its_reason(files):
    dropped = load_backbone(files["training"][0], **files["training"][1])[2].dropped
    assert dropped["module.visual.proj"].startswith("projection")
    assert {dropped[f"module.{name}"] for name in toys_clip.TEXT} == {"text tower, or the logits' scale"}
    assert load_backbone(files["openai"][0])[2].dropped["vocab_size"] == "a size of the model: no weights"


@pytest.mark.parametrize(
    ("width", "heads", "depth", "hidden", "patch"),
    [
        (768, 12, 12, 3072, 32),
        (1024, 16, 24, 4096, 14),
        (1280, 16, 32, 5120, 14),
        (1408, 16, 40, 6144, 14),
        (1664, 16, 48, 8192, 14),
    ],
)
def test_published_sizes(width, heads, depth, hidden, patch):
    """B/32 and L/14 of OpenAI; H, g and bigG of OpenCLIP, whose heads are wider than 64."""
    shapes: dict[str, Any] = {
        f"visual.{name}": shape
        for name, shape in toys_clip.tower(width, depth, patch, 224 // patch, hidden).items()
    }
    openai = {"input_resolution": ()} if width <= 1024 else {}
    activation = {"options": {"act_layer": "gelu"}}
    spec = check_real_size("clip", shapes | openai, overrides=None if openai else activation)
    assert (spec.num_heads, spec.img_size, spec.depth) == (heads, (224, 224), depth)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("visual.ln_post.bias"), "missing: norm.bias"),
        (lambda w: w.update({"visual.ln_mid.bias": torch.zeros(3)}), "unexpected: ln_mid.bias"),
        (lambda w: w.update({"visual.attn_pool.query": torch.zeros(3)}), "CoCa"),
        (lambda w: w.pop("visual.ln_pre.weight"), "open_clip_config.json"),
        (lambda w: w.update({"visual.conv1.weight": torch.zeros(())}), "conv1"),
        (lambda w: w.update({"visual.class_embedding": torch.zeros(())}), "wrong shape: cls_token"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, change, told):
    weights = toys_clip.openai()
    change(weights)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pt")


def test_a_resnet_tower_is_named(tmp_path):
    shapes = {
        "visual.conv1.weight": (8, 3, 3, 3),
        "visual.attnpool.positional_embedding": (50, 8),
        "visual.layer1.0.conv1.weight": (8, 8, 1, 1),
    }
    torch.save(fill(shapes), tmp_path / "rn50.pt")
    with pytest.raises(UserError, match="ResNet tower"):
        load_backbone(tmp_path / "rn50.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"model_cfg": 3},
        {"model_cfg": {"vision_cfg": []}},
        {"model_cfg": {"vision_cfg": {"head_width": "wide"}}},
        {"model_cfg": {"vision_cfg": {"image_size": {}}}},
        {"preprocess_cfg": {"mean": 5}},
        {"preprocess_cfg": None},
        {"model_cfg": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}},
        {"model_cfg": {"vision_cfg": {"head_width": 7}}},
    ],
)
def test_a_damaged_config_is_refused(tmp_path, config):
    folder = toys_clip.open_clip_folder(tmp_path / "x", toys_clip.visual(), {})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_backbone(folder)
