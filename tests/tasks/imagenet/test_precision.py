"""bfloat16 and torch.compile: every protocol runs, and heads are evaluated in float32."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbones.load import load_backbone
from mae_bench.config import build
from tasks.imagenet.classify import Classifier
from tasks.imagenet.config import LinearProbeConfig
from tasks.imagenet.features import FrozenFeatures
from tasks.imagenet.linear_probe import Probe, build_heads
from tests.parity import MEAN, assert_within_rounding
from tests.tasks.imagenet.toy import PROTOCOLS, SPEC, predictions_of, run_protocol

COSTS = {"seconds_eval", "images_per_second", "params", "gmacs", "peak_memory_mib"}


def probe_of(backbone: str, **changes: Any) -> Probe:
    vit, spec, _ = load_backbone(backbone)
    config = build(LinearProbeConfig, {**PROTOCOLS["grid"], "data": "", **changes}, "test")
    heads = build_heads(config, spec)
    sets = list(dict.fromkeys(head.features for head in heads))
    extract = FrozenFeatures(vit, spec, sets)
    return Probe(heads, sets, extract.widths, 3, 0).attach(extract)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_in_bfloat16(faint: Path, tmp_path: Path, sources: dict[str, str], name: str) -> None:
    """Each runs and reports predictions for every image, and its cost."""
    outcome = run_protocol(name, faint, tmp_path / "cell", sources[name], amp_dtype="bfloat16")
    trains = "epochs" in PROTOCOLS[name]
    assert outcome.cost.keys() >= COSTS | ({"seconds_train"} if trains else set())
    assert all(math.isfinite(value) and value > 0 for value in outcome.cost.values())
    metrics = (
        {"top1_3shot"} if name == "few_shot" else {"top1", "top5"} | ({"loss"} if name != "knn" else set())
    )
    assert outcome.metrics.keys() >= metrics
    found = predictions_of((tmp_path / "cell" / outcome.artefacts["predictions"]).parent)
    assert found["top5"].shape == (11, 3)
    assert found["margin"].dtype == np.float32
    for path in (tmp_path / "cache").glob("features/**/values.f32"):
        num_images, num_layers = (
            path.with_name("checksums.u32").stat().st_size // 4,
            int(path.parent.name[-1]),
        )
        assert path.stat().st_size == 4 * num_images * num_layers * 16


def test_predictions_are_those_of_the_score(faint: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    """For knn those of config.k, for few_shot those of the first draw of config.score."""
    knn = run_protocol("knn", faint, tmp_path / "knn", sources["knn"], ks=[1, 9], k=9)
    found = predictions_of(tmp_path / "knn")
    assert 100 * np.mean(found["top5"][:, 0] == found["targets"]) == pytest.approx(
        knn.metrics["top1_k9"].value
    )
    assert ((found["margin"] >= 0) & (found["margin"] <= 1)).all(), "shares of votes"
    run_protocol("few_shot", faint, tmp_path / "few", sources["few_shot"])
    found = predictions_of(tmp_path / "few")
    draws = json.loads((tmp_path / "few/draws.json").read_text())
    assert 100 * np.mean(found["top5"][:, 0] == found["targets"]) == pytest.approx(draws["3shot"][0])


@pytest.mark.parametrize("name", ["classifier", "probe"])
def test_heads_are_evaluated_in_float32(backbone: str, name: str) -> None:
    """In bfloat16 two logits near 8 differ by 1/32 or not at all."""
    vit, spec, _ = load_backbone(backbone)
    model = Classifier(vit, spec, 3, "avg", fc_norm=False) if name == "classifier" else probe_of(backbone)
    with torch.no_grad():
        for head in [model.head] if isinstance(model, Classifier) else model.heads:
            head.bias.copy_(torch.tensor([8.0, 8.001, 8.002]))  # type: ignore[union-attr, operator]
    imgs = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(imgs).dtype == torch.bfloat16
        logits = model.eval()(imgs)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_the_frozen_backbone_is_compiled_with_its_heads(backbone: str, layers: list[int]) -> None:
    """It is hidden in a list, so that it has no state and no gradients, but is nearly all of the cost."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    probe, imgs = probe_of(backbone, layers=layers).train(), torch.randn(4, 3, 16, 16)
    expected = probe(imgs)
    # the graph is run as it is
    assert_within_rounding(torch.compile(probe, backend=keep)(imgs), expected, roundings=MEAN)
    assert len(graphs) == 1, "nothing breaks the graph"
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("scaled_dot_product_attention" in call for call in calls) == SPEC.depth


@pytest.mark.parametrize("name", ["finetune", "grid"])
def test_compiled_training_gives_the_same(
    faint: Path, tmp_path: Path, sources: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend runs the graph as it is: inductor is slow, and the test is about what is compiled."""
    plain = run_protocol(name, faint, tmp_path / "plain", sources[name], compile=False)
    calls = []
    real = torch.compile

    def compiled(model: Any, **options: Any) -> Any:
        calls.append(model)
        return real(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compiled)
    outcome = run_protocol(name, faint, tmp_path / "compiled", sources[name], compile=True)
    assert len(calls) == 1
    assert outcome.metrics["top1"] == plain.metrics["top1"]
    assert outcome.metrics["loss"].value == pytest.approx(plain.metrics["loss"].value, rel=1e-4)
