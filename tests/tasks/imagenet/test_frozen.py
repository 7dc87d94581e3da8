"""Cached features, nearest neighbours and few-shot classifiers, against brute force and known answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.load import load_backbone
from mae_bench.config import build
from mae_bench.data.batches import loader
from mae_bench.data.sets.source import BadImage
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.job import Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.imagenet import features, few_shot, knn, linear_probe
from tasks.imagenet.config import FewShotConfig, KnnConfig, LinearProbeConfig
from tasks.imagenet.data import open_data
from tests.parity import assert_parity, assert_within_rounding
from tests.tasks.imagenet.toy import SPEC, TRAIN, job, write_backbone, write_images

COMMON: dict[str, Any] = {"protocol": "toy", "crop_pct": 1.0}


def run_knn(
    data: Path, folder: Path, backbone: str, progress: Progress | None = None, **changes: Any
) -> Outcome:
    values = {"kind": "knn", "data": str(data), **COMMON, "ks": [1, 5], "k": 5, **changes}
    return knn.run(build(KnnConfig, values, "test"), job(folder, backbone), progress or Progress())


def run_few_shot(data: Path, folder: Path, backbone: str, seed: int = 0, **changes: Any) -> Outcome:
    values = {
        "kind": "few_shot",
        "data": str(data),
        **COMMON,
        "shots": [1, 3],
        "shares": [0.5],
        "score": "3shot",
        **changes,
    }
    return few_shot.run(build(FewShotConfig, values, "test"), job(folder, backbone, seed), Progress())


class TestCache:
    @pytest.fixture
    def passes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Return a list that collects the number of images per forward pass of the backbone."""
        seen: list[int] = []
        real = features.FrozenFeatures.forward

        def forward(self, imgs):
            seen.append(len(imgs))
            return real(self, imgs)

        monkeypatch.setattr(features.FrozenFeatures, "forward", forward)
        return seen

    def test_one_pass_serves_every_protocol(self, data, tmp_path, backbone, passes):
        run_knn(data, tmp_path / "a", backbone)
        assert sum(passes) == 33
        run_few_shot(data, tmp_path / "b", backbone)
        run_knn(data, tmp_path / "c", backbone, ks=[3], k=3)
        assert sum(passes) == 33

    def test_a_probe_of_several_sets_shares_what_is_there(self, data, tmp_path, backbone, passes):
        run_knn(data, tmp_path / "a", backbone)
        values = {
            "kind": "linear_probe",
            "data": str(data),
            **TRAIN,
            "crop_pct": 1.0,
            "features": "cached",
            "holdout": 0.25,
        }
        config = build(LinearProbeConfig, values | {"pools": ["avg", "token"]}, "test")
        linear_probe.run(config, job(tmp_path / "b", backbone), Progress())
        assert sum(passes) == 66, "one pass for the set that was missing"
        run_knn(data, tmp_path / "c", backbone, global_pool="token")
        assert sum(passes) == 66
        assert {path.name for path in (tmp_path / "cache/features").glob("*/train/*")} == {"avg-1", "token-1"}

    @pytest.mark.parametrize("change", [{"global_pool": "token"}, {"crop_pct": 0.8}, {"img_size": (32, 32)}])
    def test_another_feed_is_another_entry(self, data, tmp_path, backbone, passes, change):
        run_knn(data, tmp_path / "a", backbone)
        run_knn(data, tmp_path / "b", backbone, **change)
        assert sum(passes) == 66

    def test_other_weights_and_other_data_are_other_entries(self, tmp_path, data, backbone, passes):
        run_knn(data, tmp_path / "a", backbone)
        vit, spec, _ = load_backbone(backbone)
        other = {name: tensor + 1e-3 * (name == "norm.weight") for name, tensor in vit.state_dict().items()}
        write_export(tmp_path / "other", other, spec, {})
        run_knn(data, tmp_path / "b", str(tmp_path / "other"))
        assert sum(passes) == 66
        run_knn(write_images(tmp_path / "more", 27), tmp_path / "c", backbone)
        assert sum(passes) == 66 + 36

    @pytest.mark.parametrize(
        "change", [{"num_heads": 4}, {"norm_eps": 1e-2}, {"options": {"act_layer": "quick_gelu"}}]
    )
    def test_the_same_weights_of_another_shape_are_another_entry(
        self, data, tmp_path, backbone, passes, change
    ):
        run_knn(data, tmp_path / "a", backbone)
        vit, spec, _ = load_backbone(backbone)
        write_export(tmp_path / "other", vit.state_dict(), replace(spec, **change), {})
        run_knn(data, tmp_path / "b", str(tmp_path / "other"))
        assert sum(passes) == 66

    def test_features_that_are_not_finite_give_no_score(self, data, tmp_path, backbone):
        vit, spec, _ = load_backbone(backbone)
        large = {
            name: tensor * (3e38 if name == "norm.weight" else 1) for name, tensor in vit.state_dict().items()
        }
        write_export(tmp_path / "large", large, spec, {})
        with pytest.raises(UserError, match="features of .* images are not finite"):
            run_knn(data, tmp_path / "a", str(tmp_path / "large"))

    def test_an_interrupted_pass_resumes(self, data, tmp_path, backbone, passes, monkeypatch):
        real = features.Feed.run

        def fail(self, model, imgs):
            if sum(passes) >= 16:
                raise KeyboardInterrupt
            return real(self, model, imgs)

        monkeypatch.setattr(features.Feed, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            run_knn(data, tmp_path / "a", backbone, eval_batch_size=8)
        monkeypatch.setattr(features.Feed, "run", real)
        outcome = run_knn(data, tmp_path / "a", backbone, eval_batch_size=8)
        assert sum(passes) == 33
        assert outcome.metrics == run_knn(data, tmp_path / "b", backbone, crop_pct=0.999).metrics

    def test_an_image_that_does_not_decode_is_left_out_and_noted(self, tmp_path, backbone):
        root = write_images(tmp_path / "images", 24, 12)
        (root / "val/class0/0.png").write_bytes(b"no image")
        for _ in range(2):  # made, then read from the cache
            outcome = run_knn(root, tmp_path / "a", backbone, max_bad_images=0.2)
            assert outcome.num_samples == 11
            assert any("0.png" in note or "1 of 12" in note for note in outcome.notes), outcome.notes

    def test_an_image_that_could_not_be_read_once_is_tried_again(
        self, data, tmp_path, backbone, passes, monkeypatch
    ):
        real = loader.decode
        with monkeypatch.context() as away:

            def decode(content):
                away.setattr(loader, "decode", real)  # the first image alone
                raise BadImage("the disk is away")

            away.setattr(loader, "decode", decode)
            first = run_knn(data, tmp_path / "a", backbone, max_bad_images=0.2)
        assert any("1 of 24" in note for note in first.notes), first.notes
        again = run_knn(data, tmp_path / "b", backbone, max_bad_images=0.2)
        assert sum(passes) == 33
        assert not any("1 of 24" in note for note in again.notes)

    @pytest.mark.parametrize("name", ["values.f32", "checksums.u32"])
    @pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
    def test_damaged_rows_are_computed_again(self, data, tmp_path, backbone, passes, name, damage):
        intact = run_knn(data, tmp_path / "a", backbone, eval_batch_size=1)
        (path,) = (tmp_path / "cache/features").glob(f"*/val/*/{name}")
        written = path.read_bytes()
        if damage == "flipped":
            half = len(written) // 2
            path.write_bytes(written[:half] + bytes([written[half] ^ 1]) + written[half + 1 :])
        elif damage == "truncated":
            path.write_bytes(written[:-1])
        else:
            path.unlink()
        again = run_knn(data, tmp_path / "b", backbone, Progress(tmp_path / "events"), eval_batch_size=1)
        assert again.metrics == intact.metrics
        assert path.read_bytes() == written
        assert sum(passes) == 33 + (1 if damage == "flipped" else 9)
        noted = "rows of" in (tmp_path / "events").read_text()
        assert noted or (name, damage) in {("checksums.u32", "truncated"), ("checksums.u32", "missing")}


class TestKnn:
    def test_it_equals_brute_force_whatever_the_chunks(self):
        generator = torch.Generator().manual_seed(0)
        train, labels = (
            torch.randn(50, 8, generator=generator).double(),
            torch.randint(0, 4, (50,), generator=generator),
        )
        queries = torch.randn(7, 8, generator=generator).double()
        similarity = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T
        for size in (1, 7, 50, 80):
            chunks = zip(train.split(size), labels.split(size), strict=True)
            near, found = knn.find_nearest(queries, chunks, 5, size=3)
            assert_parity(near, similarity.topk(5, dim=1).values)
            top, margin = knn.vote(near.float(), found, 4, 0.07)
            for i in range(7):
                votes = torch.zeros(4, dtype=torch.float64)
                for j in similarity[i].topk(5).indices:
                    votes[labels[j]] += torch.exp(similarity[i, j] / 0.07)
                expected = votes.argsort(descending=True, stable=True)
                assert top[i].tolist() == [int(label) if votes[label] else -1 for label in expected]
                first, second = votes.sort(descending=True).values[:2] / votes.sum()
                assert_within_rounding(margin[i], first - second, roundings=32)  # exp of 14

    def test_separable_features_reach_100_for_every_k(self, data, tmp_path, backbone):
        outcome = run_knn(data, tmp_path / "run", backbone)
        assert {
            name: outcome.metrics[name].value for name in ("top1", "top1_k1", "top1_k5")
        } == dict.fromkeys(("top1", "top1_k1", "top1_k5"), 100.0)
        assert outcome.num_samples == 9

    def test_more_neighbours_than_images_is_refused(self, data, tmp_path, backbone):
        for values, fix in (
            ({"ks": [5, 24, 25]}, "ks=[5,24]"),
            ({"ks": [5, 25], "k": 25}, "ks=[5] tasks.NAME.k=5"),
        ):
            with pytest.raises(UserError, match="k 25 with 24") as caught:
                run_knn(data, tmp_path / "run", backbone, **values)
            assert caught.value.fix == f"set tasks.NAME.{fix}"
        with pytest.raises(UserError, match="not one of ks"):
            build(KnnConfig, {"kind": "knn", "data": "", **COMMON, "ks": [3], "k": 5}, "test")


class TestFewShot:
    def test_separable_features_need_few_labels(self, data, tmp_path, backbone):
        outcome = run_few_shot(data, tmp_path / "run", backbone)
        assert outcome.main_metric == "top1_3shot"
        assert outcome.metrics["top1_3shot"].value > 90
        assert outcome.metrics["top1_3shot"].value >= outcome.metrics["top1_1shot"].value
        draws = json.loads((tmp_path / "run/draws.json").read_text())
        assert outcome.metrics["top1_1shot"].value == pytest.approx(np.mean(draws["1shot"]))
        half = 2.7764 * np.std(draws["1shot"], ddof=1) / np.sqrt(5)  # Student's t for 4 degrees of freedom
        assert outcome.metrics["top1_1shot_margin"].value == pytest.approx(half, rel=1e-3)

    def test_draws_follow_from_the_seed(self, tmp_path, backbone):
        data = write_images(tmp_path / "hard", 60, 60, signal=8)
        runs = [
            run_few_shot(data, tmp_path / name, backbone, seed).metrics
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
        assert runs[0] == runs[1] != runs[2]

    def test_the_solver_finds_the_minimum(self):
        """The gradient of mean cross-entropy + decay / 2 |W|^2 is zero, and weights shrink with the decay."""
        x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
        norms = []
        for decay, weight in zip(
            [1.0, 0.1, 0.01], few_shot.solve_decay_path(x, y, 3, [1.0, 0.1, 0.01]), strict=True
        ):
            w = weight.clone().requires_grad_(True)
            loss = F.cross_entropy(F.linear(x, w[:, :-1], w[:, -1]), y) + decay / 2 * w[:, :-1].square().sum()
            (gradient,) = torch.autograd.grad(loss, w)
            assert gradient.abs().max() < 1e-4
            norms.append(weight[:, :-1].norm().item())
        assert norms == sorted(norms)

    def test_classes_with_too_few_images_are_noted(self, tmp_path, backbone):
        root = write_images(tmp_path / "images", 24, 9)
        for path in sorted((root / "train/class0").iterdir())[3:]:
            path.unlink()
        outcome = run_few_shot(root, tmp_path / "run", backbone, shots=[3, 5], shares=[], score="3shot")
        assert "1 classes have fewer than 5 images: all of their images are drawn" in outcome.notes
        assert not any("fewer than 3" in note for note in outcome.notes)

    def test_what_cannot_be_drawn_is_refused(self, data, tmp_path, backbone):
        for name, values, value in (("shares", [1.0], "1"), ("shots", [3, 8], "8")):
            with pytest.raises(
                UserError, match=f"drawn by {name}={value}: the largest class has 8"
            ) as caught:
                run_few_shot(data, tmp_path / "a", backbone, 0, **{name: values})
            assert caught.value.fix == f"remove {value} from tasks.NAME.{name}"
        with pytest.raises(UserError, match="score '7shot'"):
            run_few_shot(data, tmp_path / "b", backbone, score="7shot")


def test_data_of_another_set_is_refused(data):
    config = build(KnnConfig, {"kind": "knn", "data": str(data), **COMMON, "expect": "imagenet-1k"}, "test")
    with pytest.raises(UserError, match="3 classes: 1000 of ImageNet-1k are missing"):
        open_data(config)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_own_pooling_is_that_of_the_checkpoint(data, tmp_path, pool):
    spec = replace(SPEC, global_pool=pool)
    source = write_backbone(tmp_path / "export", spec)
    own, named = (run_knn(data, tmp_path / name, source, global_pool=name) for name in ("own", pool))
    found = [np.load(tmp_path / name / "predictions.npz")["margin"] for name in ("own", pool)]
    assert np.array_equal(*found)
    assert own.metrics == named.metrics
    other = "avg" if pool == "token" else "token"
    run_knn(data, tmp_path / other, source, global_pool=other)
    assert not np.array_equal(np.load(tmp_path / other / "predictions.npz")["margin"], found[0])


def test_a_backbone_without_class_token(data, tmp_path):
    spec = replace(SPEC, num_prefix_tokens=0, pos_embed="learned")
    source = write_backbone(tmp_path / "export", spec)
    assert run_knn(data, tmp_path / "a", source).metrics["top1"].value == 100
    assert run_knn(data, tmp_path / "own", source, global_pool="own").metrics["top1"].value == 100
    with pytest.raises(UserError, match="global_pool"):
        run_knn(data, tmp_path / "b", source, global_pool="token")


@pytest.mark.parametrize(
    ("change", "fix"), [({"depth": 3}, "[1,3]"), ({"arch": "sam", "num_prefix_tokens": 0}, "[1]")]
)
def test_layers_that_cannot_be_concatenated_are_refused(change, fix):
    spec = replace(SPEC, depth=5, global_pool="avg")
    with pytest.raises(UserError) as caught:
        features.FrozenFeatures(
            build_vit(spec), replace(spec, **change), [features.FeatureSet("avg", n) for n in (1, 4)]
        )
    assert caught.value.fix == f"set tasks.NAME.layers={fix}"


@pytest.mark.parametrize("registers", [0, 2])
def test_a_grid_needs_the_class_token_it_asks_for(registers):
    """A register is not a class token."""
    spec = replace(
        SPEC,
        num_prefix_tokens=registers,
        pos_embed="learned",
        global_pool="avg",
        options={"class_token": False},
    )
    vit = build_vit(spec, global_pool="avg")
    with pytest.raises(UserError, match="no class token"):
        features.FrozenFeatures(vit, spec, [features.FeatureSet("avg"), features.FeatureSet("token")])


BEIT = {"use_rel_pos_bias": True, "use_abs_pos_emb": False}
EVA = {"use_rot_pos_emb": True, "swiglu_mlp": True}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"arch": "beit", "pos_embed": "relative", "options": BEIT},
        {"arch": "eva", "pos_embed": "rope", "options": EVA},
    ],
)
def test_several_layers_of_any_architecture(change):
    """Of two layers, the last equals a single one; the other, that of a backbone without its last block."""
    spec = replace(SPEC, **change)
    torch.manual_seed(0)
    vit, imgs = build_vit(spec).double(), torch.randn(2, 3, 16, 16).double()
    for pool in ("token", "avg"):
        both, last = (
            features.FrozenFeatures(vit, spec, [features.FeatureSet(pool, count)])(imgs) for count in (2, 1)
        )
        assert_parity(both[:, 16:], last)
        shorter = build_vit(replace(spec, depth=1)).double()
        shorter.load_state_dict(
            {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("blocks.1.")}
        )
        before = features.FrozenFeatures(shorter, replace(spec, depth=1), [features.FeatureSet(pool)])(imgs)
        assert_parity(both[:, :16], before)
