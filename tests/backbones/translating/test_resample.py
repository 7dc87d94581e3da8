"""Other image and patch sizes: each method is the published one, and equal sizes change nothing."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline

from backbones.adapters.features import FeatureMaps
from backbones.load import load_backbone
from backbones.translating.resample import resample
from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.models.cost import backbone_gmacs
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.models.resampling import resize_bias_table, resize_distances, resize_filters, resize_table
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec, PosResample
from tests.backbones.formats.reference import randomise
from tests.parity import FLOAT32_TABLES, assert_parity, assert_within_rounding

VIT = BackboneSpec(
    arch="vit", img_size=(32, 32), patch_size=(8, 8), in_chans=3, embed_dim=32, depth=2, num_heads=2
)
BEIT = replace(VIT, arch="beit", pos_embed="relative")
SPECS = {
    "vit": VIT,
    "vit, DINO's offset": replace(VIT, pos_resample="bicubic_offset"),
    "vit with registers": replace(VIT, num_prefix_tokens=5, pos_resample="bicubic_antialias"),
    "vit, rows for patches only": replace(VIT, options={"no_embed_class": True}),
    "beit": replace(BEIT, options={"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}),
    "beit, shared": replace(BEIT, options={"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}),
    "eva": replace(VIT, arch="eva", options={"use_rot_pos_emb": True, "ref_feat_shape": [4, 4]}),
    "sam": replace(
        VIT,
        arch="sam",
        num_prefix_tokens=0,
        options={"use_rel_pos": True, "window_size": 2, "global_attn_indexes": [1], "neck_chans": 16},
    ),
}


@pytest.fixture(params=SPECS)
def model(request) -> tuple[Any, BackboneSpec]:
    """A ViT of each kind for images of any size."""
    spec = SPECS[request.param]
    return randomise(build_vit(spec, dynamic_img_size=True)), spec


def translated(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, *size: Any
) -> tuple[Translation, BackboneSpec]:
    translation = Translation(weights={name: tensor.clone() for name, tensor in weights.items()})
    return translation, resample(translation, spec, *size)


# Tables and filters are resampled in float32. A cubic kernel adds 16 neighbours, whose weights depend on a
# position that is itself rounded.
RESAMPLED = 64


class TestTables:
    """(1, 1 + 16, 8): a class token and 4 x 4 patches."""

    table = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(("method", "offset"), [("bicubic", 0.0), ("bicubic_offset", 0.1)])
    @pytest.mark.parametrize("grid", [(7, 9), (3, 2)])
    def test_equals_a_cubic_convolution(self, method, offset, grid):
        down, across = (cubic_weights(4, side, (side + offset) / 4) for side in grid)
        wanted = np.einsum("yh,xw,hwc->yxc", down, across, self.table[0, 1:].view(4, 4, 8).double().numpy())
        found = resize_table(self.table, (4, 4), grid, method)
        assert_within_rounding(found[0, 1:], wanted.reshape(-1, 8), roundings=RESAMPLED)
        assert torch.equal(found[:, :1], self.table[:, :1])

    def test_bilinear_follows_a_ramp(self):
        table = torch.cat(
            [torch.full((1, 1, 8), 9.0), torch.arange(4.0).repeat(4)[None, :, None].expand(1, 16, 8)], dim=1
        )
        found = resize_table(table, (4, 4), (2, 7), "bilinear")
        ramp = ((torch.arange(7.0, dtype=torch.float64) + 0.5) * 4 / 7 - 0.5).clamp(0, 3)
        assert_within_rounding(
            found[0, :, 0], torch.cat([torch.tensor([9.0]), ramp.repeat(2)]), roundings=RESAMPLED
        )

    def test_methods_differ(self):
        found = [resize_table(self.table, (4, 4), (3, 3), method) for method in get_args(PosResample)]
        assert all((a - b).abs().max() > 0.01 for a, b in zip(found, found[1:] + found[:1], strict=True))

    def test_a_short_table_is_refused(self):
        with pytest.raises(ValueError, match="17 rows for 5 x 5"):
            resize_table(self.table, (5, 5), (6, 6), "bicubic")


def cubic_weights(old: int, new: int, scale: float) -> np.ndarray:
    """Return the matrix (new, old) of cubic convolution (Keys 1981): a = -0.75, repeated border."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(j, 0), old - 1)] += kernel(centre - j)
    return weights


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (10, 10)), ((4, 4), (7, 6))])
def test_bias_table_equals_beits_cubic_spline(old, new):
    """beit/run_class_finetuning.py: scipy's interp2d, which was removed, was this spline on a grid."""
    rows = (2 * old[0] - 1) * (2 * old[1] - 1)
    table = torch.randn(rows + 3, 2, generator=torch.Generator().manual_seed(0))
    found = resize_bias_table(table, old, new)
    assert torch.equal(found[-3:], table[-3:])
    known, wanted = ([positions(a, b)[i] for a, b in zip(old, new, strict=True)] for i in (0, 1))
    for head in range(2):
        values = table[:rows, head].view(2 * old[0] - 1, -1).double().numpy()
        spline = RectBivariateSpline(*known, values, kx=3, ky=3, s=0)
        assert_within_rounding(found[:-3, head], spline(*wanted).flatten(), roundings=RESAMPLED)


def positions(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances of `old` patches, in a geometric progression with the end of `new`'s, and `new`'s."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(old - 1)) > new - 1 else (ratio, high)
    right = [sum(ratio**i for i in range(n)) for n in range(old)]
    return np.array([-d for d in right[:0:-1]] + right), np.arange(1 - new, new)


def test_distances_are_linear():
    ramp = torch.arange(7.0)[:, None].expand(7, 3)
    found = resize_distances(ramp, 13)
    wanted = ((torch.arange(13.0, dtype=torch.float64) + 0.5) * 7 / 13 - 0.5).clamp(0, 6)
    assert_within_rounding(found, wanted[:, None].expand(13, 3), roundings=RESAMPLED)


class TestFilters:
    filters = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0))

    # The convolutions below add 3 x 16 x 16 products with filters that are stored in float32.
    def test_pseudo_inverse_answers_to_a_resized_patch_as_before(self):
        patch = torch.randn(2, 3, 14, 14)
        larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
        found = F.conv2d(larger, resize_filters(self.filters, (16, 16), "pinv"))
        assert_within_rounding(found, F.conv2d(patch, self.filters), roundings=3 * 16 * 16)

    def test_a_constant_image_gives_equal_tokens(self):
        image = torch.full((1, 3, 48, 48), 0.7)
        found = F.conv2d(image, resize_filters(self.filters, (16, 16), "pinv"), stride=16)
        wanted = F.conv2d(image[..., :14, :14], self.filters)
        assert_within_rounding(found, wanted.expand(1, 5, 3, 3), roundings=3 * 16 * 16)

    def test_bicubic_resizes_the_filters(self):
        down, across = cubic_weights(14, 16, 16 / 14), cubic_weights(14, 12, 12 / 14)
        wanted = np.einsum("yh,xw,dchw->dcyx", down, across, self.filters.double().numpy())
        found = resize_filters(self.filters, (16, 12), "bicubic")
        assert_within_rounding(found, wanted, roundings=RESAMPLED)


@pytest.mark.parametrize("size", [(48, 40), (16, 24)])
def test_an_image_of_any_size_sees_the_resampled_backbone(model, size):
    """Tables resampled at each batch are those that a backbone of that size is loaded with."""
    vit, spec = model
    translation, fixed_spec = translated(vit.state_dict(), spec, size, None)
    fixed = build_vit(fixed_spec).eval()
    fixed.load_state_dict(translation.weights)
    vit, fixed, imgs = vit.double(), fixed.double(), torch.randn(2, 3, *size).double()
    with torch.no_grad():
        assert_parity(vit.forward_features(imgs), fixed.forward_features(imgs), rtol=FLOAT32_TABLES)
        for dynamic, still in zip(
            FeatureMaps(vit, spec, [0, 1])(imgs), FeatureMaps(fixed, spec, [0, 1])(imgs), strict=True
        ):
            assert dynamic.shape == (2, 32, size[0] // 8, size[1] // 8)
            assert_parity(dynamic, still, rtol=FLOAT32_TABLES)


def test_images_of_the_own_size_see_the_stored_tables(model):
    vit, spec = model
    plain = build_vit(spec).eval()
    plain.load_state_dict(vit.state_dict())
    imgs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        vit.forward_features(torch.randn(1, 3, 48, 48))  # leaves nothing behind
        assert torch.equal(vit.forward_features(imgs), plain.forward_features(imgs))


def test_training_at_another_size_reaches_the_stored_tables(model):
    vit, spec = model
    shapes = {name: tensor.shape for name, tensor in vit.state_dict().items()}
    FeatureMaps(vit, spec, [1])(torch.randn(1, 3, 48, 40))[0].square().mean().backward()
    tables = {
        name: p
        for name, p in vit.named_parameters()
        if "pos_embed" in name or "rel_pos" in name or "bias_table" in name
    }
    assert tables
    assert all(table.grad is not None and table.grad.abs().max() > 0 for table in tables.values())
    assert {name: tensor.shape for name, tensor in vit.state_dict().items()} == shapes


def test_training_after_evaluation_and_after_a_count_of_operations(model):
    """What is kept of a grid is of no mode and no device but its own."""
    vit, spec = model
    with torch.inference_mode():
        vit.forward_features(torch.zeros(1, 3, 56, 40))
    assert backbone_gmacs(spec, (56, 40)) > backbone_gmacs(spec)
    vit.forward_features(torch.zeros(1, 3, 56, 40)).square().mean().backward()


@pytest.mark.parametrize("arch", ["beit", "sam"])
def test_checkpointed_blocks_see_the_same_tables(arch):
    spec = SPECS[arch]
    vit: Any = randomise(build_vit(spec, dynamic_img_size=True)).double().train()
    imgs = torch.randn(1, 3, 48, 40).double()
    gradients: list[dict[str, torch.Tensor]] = []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        vit.zero_grad()
        vit.forward_features(imgs).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_parity(gradients[1][name], gradient, msg=name)


def test_huge_of_14_goes_to_16():
    """arXiv 2203.16527 A.2: 16 x 16 patches of 224 pixels become 14 x 14."""
    spec = replace(VIT, img_size=(224, 224), patch_size=(14, 14), embed_dim=8, pos_embed="sincos")
    weights = {"patch_embed.proj.weight": TestFilters.filters, "pos_embed": torch.randn(1, 257, 8)}
    for method, told in (("pinv", "pseudo-inverse"), ("bicubic", "bicubic")):
        translation, new = translated(weights, spec, None, (16, 16), method)
        assert (new.img_size, new.patch_size, new.grid_size, new.pos_embed) == (
            (224, 224),
            (16, 16),
            (14, 14),
            "learned",
        )
        assert torch.equal(
            translation.weights["patch_embed.proj.weight"],
            resize_filters(TestFilters.filters, (16, 16), method),
        )
        assert translation.weights["pos_embed"].shape == (1, 197, 8)
        assert translation.reshaped == {
            "patch_embed.proj.weight": f"14 x 14 -> 16 x 16 pixels ({told})",
            "pos_embed": "16 x 16 -> 14 x 14 patches (bicubic)",
        }


def test_windows_keep_their_distances():
    spec = SPECS["sam"]
    translation, _ = translated(build_vit(spec).state_dict(), spec, (64, 48), None)
    assert translation.weights["blocks.0.attn.rel_pos_h"].shape == (3, 16)
    assert translation.weights["blocks.1.attn.rel_pos_h"].shape == (15, 16)
    assert translation.weights["blocks.1.attn.rel_pos_w"].shape == (11, 16)
    assert set(translation.reshaped) == {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}


@pytest.mark.usefixtures("toy_heads")
class TestLoading:
    def test_a_sincos_table_becomes_a_learned_one(self, files):
        model, spec, report = load_backbone(files["encoder"][0], img_size=(48, 64))
        assert (spec.img_size, spec.pos_embed) == ((48, 64), "learned")
        assert report.reshaped["pos_embed"] == "4 x 4 -> 6 x 8 patches (bicubic)"
        assert model.forward_features(torch.zeros(1, 3, 48, 64)).shape == (1, 1 + 6 * 8, 192)

    def test_equal_sizes_change_nothing(self, files, toys):
        model, spec, report = load_backbone(files["encoder"][0], img_size=(32, 32), patch_size=(8, 8))
        assert torch.equal(model.state_dict()["pos_embed"], toys["encoder"]["pos_embed"])
        assert spec.pos_embed == "sincos"
        assert not report.reshaped

    def test_a_resampled_backbone_is_exported_as_it_is(self, files, tmp_path):
        model, spec, _ = load_backbone(files["encoder"][0], img_size=(48, 64), patch_size=(16, 16))
        write_export(tmp_path / "export", model.state_dict(), spec, {})
        again, same_spec, _ = load_backbone(tmp_path / "export")
        assert same_spec == spec
        assert torch.equal(
            again.state_dict()["patch_embed.proj.weight"], model.state_dict()["patch_embed.proj.weight"]
        )

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"img_size": (33, 32)}, "not divisible"),
            ({"img_size": (0, 32)}, "positive"),
            ({"patch_size": (16, 16), "img_size": (40, 40)}, "not divisible"),
            ({"patch_size": (16, 16), "patch_resample": "nearest"}, "pinv, bicubic"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, files, options: dict[str, Any], told):
        with pytest.raises(UserError, match=told):
            load_backbone(files["encoder"][0], **options)


def test_a_table_of_no_grid_is_refused():
    spec = replace(VIT, arch="test_vit2")
    with pytest.raises(UserError, match="rows for 4 x 4"):
        translated({"pos_embed": torch.zeros(1, 3, 32)}, spec, (48, 48), None)


def test_a_model_that_is_built_by_its_name_keeps_its_patches():
    with pytest.raises(UserError, match="the patch size of this architecture"):
        translated({}, replace(VIT, arch="test_vit2"), None, (16, 16))


@pytest.mark.parametrize("grid", [(4, 9), (9, 4), (6, 6), (9, 16), (2, 8)])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_grid_of_a_sine_table_is_read_from_its_values(tmp_path, grid, swapped):
    spec = replace(VIT, img_size=(grid[0] * 8, grid[1] * 8))
    weights = randomise(build_vit(spec)).state_dict()
    of_moco = sincos_2d(32, (grid[1], grid[0])).roll(16, dims=2)  # vits.py: rows and columns exchanged
    weights["pos_embed"] = of_moco if swapped else sincos_2d(32, grid)
    torch.save({"model": weights}, tmp_path / "x.pth")
    kind = "moco_v3" if swapped else "official_mae"
    found = load_backbone(tmp_path / "x.pth", format=kind, overrides={"num_heads": 2})[1]
    assert found.img_size == spec.img_size
    wrong: dict[str, Any] = {"num_heads": 2, "img_size": [spec.img_size[1] * 2, spec.img_size[0] // 2]}
    if wrong["img_size"][1] % 8 == 0:
        with pytest.raises(UserError, match="where the shapes say"):
            load_backbone(tmp_path / "x.pth", format=kind, overrides=wrong)
