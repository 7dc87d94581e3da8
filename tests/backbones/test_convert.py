"""convert: round trips between all formats are bit-identical, and the libraries load what is written."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from backbones.convert import convert
from backbones.inspection import inspect_checkpoint, render
from backbones.load import load_backbone, translate
from backbones.reading.source import open_source
from backbones.translating.detect import FORMATS, WRITABLE, get_format
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

PLAIN = {
    "mae_bench",
    "official_mae",
    "timm",
    "hf_vitmae",
    "hf_vit",
    "mmseg",
    "detectron2",
}  # formats that hold a plain ViT
HELD = {  # a toy of each kind of backbone -> the formats that have a place for all of it
    "official_mae/full": PLAIN,
    "official_mae/fine": {"mae_bench", "official_mae", "timm"},  # its last norm stands behind the pooling
    "mmpretrain/deit3": {"mae_bench", "timm"},
    "mmpretrain/distilled": {"mae_bench", "timm", "hf_vit"},  # two prefix tokens, as DeiT has them
    "mmpretrain/dinov2_giant": {"mae_bench", "timm", "hf_dinov2"},
    "mmpretrain/clip": {"mae_bench", "timm", "mmseg"},  # a norm in front of the blocks
    "mmpretrain/beit": {"mae_bench", "timm", "hf_beit"},
    "mmseg/vit_as_configured_by_default": {"mae_bench", "timm", "mmseg"},  # without a last norm
    "detectron2/windows": {"mae_bench", "timm", "detectron2"},
}


def place(folder: Path, to: str, name: str = "out") -> Path:
    """A name for what is written in a format: with its suffix, where it is one file."""
    return folder / (name + (WRITABLE[to] or ("",))[0])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The toy files that HELD names, with the keywords that they need."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for format in {kind.split("/")[0] for kind in HELD}:
        written = import_module(f"tests.backbones.formats.toys_{format}").write(
            tmp_path_factory.mktemp(format)
        )
        found |= {f"{format}/{name}": toy for name, toy in written.items()}
    return found


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("kind", HELD)
def test_there_and_back_again_or_refused_before_anything_is_written(tmp_path, kinds, kind, to):
    out, (path, options) = place(tmp_path, to), kinds[kind]
    if to not in HELD[kind]:
        with pytest.raises(UserError) as refused:
            convert(path, out, to, **options)
        assert to in str(refused.value) or "fc_norm" in str(refused.value)
        assert refused.value.given.startswith(("this backbone", "patches", "nothing")), "a sentence"
        assert not out.exists()
        return
    model, spec, _ = load_backbone(path, **options)
    report = convert(path, out, to, **options)
    assert report.source == str(path)
    there, same_spec, read = load_backbone(out)
    assert (read.format, same_spec) == (to, spec)
    convert(out, tmp_path / "back", "mae_bench")
    for other in (there, load_backbone(tmp_path / "back")[0]):
        state = other.state_dict()
        assert set(state) == set(model.state_dict())
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def check_same(path: Path, to: str, stored: dict[str, torch.Tensor], spec: BackboneSpec) -> None:
    """A file holds exactly those weights, in their precision, and that spec."""
    format, translation, found = translate(open_source(path))
    assert (format, found) == (to, spec)
    assert {name: tensor.dtype for name, tensor in translation.weights.items()} == {
        name: tensor.dtype for name, tensor in stored.items()
    }
    assert all(torch.equal(tensor, stored[name]) for name, tensor in translation.weights.items())


@pytest.mark.parametrize("through", sorted(PLAIN))
def test_every_pair_of_formats_is_identity(tmp_path, files, encoder, through):
    """From the reference's file through one format to each other; identity of pairs implies longer chains."""
    convert(files["full"][0], place(tmp_path, through), through)
    spec = load_backbone(files["full"][0])[1]
    for to in sorted(PLAIN):
        convert(place(tmp_path, through), place(tmp_path, to, to), to)
        check_same(place(tmp_path, to, to), to, encoder, spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_precision_is_kept_through_all_formats(tmp_path, encoder, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in encoder.items()}
    here = tmp_path / "source.pth"
    torch.save({"model": stored}, here)
    spec = load_backbone(here)[1]
    for to in (*sorted(PLAIN), "official_mae"):
        there = place(tmp_path, to, f"{to} of {here.stem}")
        convert(here, there, to)
        check_same(there, to, stored, spec)
        here = there


def test_their_own_readers_load_what_is_written(tmp_path, files, encoder):
    convert(files["full"][0], tmp_path / "x.safetensors", "timm")
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    timm.models.load_checkpoint(model, str(tmp_path / "x.safetensors"))  # strict by default
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], encoder["blocks.1.attn.qkv.weight"])
    convert(files["full"][0], tmp_path / "x.pth", "official_mae")
    assert set(torch.load(tmp_path / "x.pth", weights_only=True)["model"]) == set(encoder)


@pytest.mark.parametrize("to", sorted(PLAIN))
def test_one_source_gives_one_digest(tmp_path, files, to):
    digests = set()
    for name in ("a", "b", "c"):
        convert(files["full"][0], place(tmp_path, to, name), to)
        digests.add(open_source(place(tmp_path, to, name)).digest)
    assert len(digests) == 1


def test_wrong_targets_are_refused_before_anything_is_read(tmp_path, files):
    (tmp_path / "there.pth").write_text("mine")
    wrong = [
        ("there.pth", "official_mae", "exists"),
        ("x.bin", "timm", "safetensors"),
        ("x.pkl", "detectron2", r"\.pth"),
        ("x", "onnx", "unknown format"),
        ("x", "dectron2", "did you mean detectron2"),
        ("x.pth", "mmpretrain", "'mmpretrain' can only be read"),
    ]
    for out, to, told in wrong:
        with pytest.raises(UserError, match=told):
            convert(files["full"][0], tmp_path / out, to)
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_the_formats_that_are_written_are_listed(tmp_path):
    only_read = sorted(set(FORMATS) - set(WRITABLE))
    assert list(WRITABLE) == [name for name in FORMATS if hasattr(get_format(name), "write")]
    assert only_read
    for to in (*only_read, "onnx"):
        with pytest.raises(UserError) as refused:
            convert(tmp_path / "nothing", tmp_path / "x", to)
        assert refused.value.expected == f"a format that can be written: {', '.join(WRITABLE)}"


@pytest.mark.parametrize("to", ["timm", "hf_vit"])
def test_what_does_not_read_back_is_removed(tmp_path, files, monkeypatch, to):
    """A disk or a writer that changes a weight: the file is not left for someone to use."""
    module = import_module(FORMATS[to])
    write = module.write

    def wrong(weights, *rest):
        write(weights | {"norm.bias": weights["norm.bias"] + 1e-6}, *rest)

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(UserError, match="differs from what was written"):
        convert(files["full"][0], place(tmp_path, to), to)
    assert not place(tmp_path, to).exists()


class TestTransformers:
    """transformers' own classes are the judge of its format."""

    @pytest.fixture
    def transformers(self):
        return pytest.importorskip("transformers", reason="transformers is in the test set only")

    @pytest.fixture
    def config(self, transformers):
        return transformers.ViTMAEConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            mask_ratio=0.0,
            layer_norm_eps=1e-5,
        )

    def features(self, model, imgs):
        """Tokens in image order: ascending noise shuffles nothing, mask_ratio 0 removes nothing."""
        noise = torch.arange(16.0).repeat(len(imgs), 1)
        with torch.no_grad():
            return in_float64(model)(imgs, noise=noise).last_hidden_state

    @pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel"])
    def test_features_equal_theirs(self, tmp_path, transformers, config, kind):
        theirs = getattr(transformers, kind)(config)
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "hf")
        ours, spec, report = load_backbone(tmp_path / "hf")
        imgs = torch.randn(2, 3, 32, 32).double()
        expected = self.features(theirs.vit if kind == "ViTMAEForPreTraining" else theirs, imgs)
        with torch.no_grad():
            assert_parity(ours.double().eval().forward_features(imgs), expected)
        assert (spec.num_heads, spec.norm_eps, spec.mlp_ratio) == (4, 1e-5, 2.0)
        assert set(report.renamed) | set(report.dropped) == set(open_source(tmp_path / "hf").stored)
        assert bool(report.dropped) == (kind == "ViTMAEForPreTraining")

    def test_they_load_what_we_write(self, tmp_path: Path, transformers, files):
        convert(files["encoder"][0], tmp_path / "hf", "hf_vitmae")
        theirs, info = transformers.ViTMAEModel.from_pretrained(
            tmp_path / "hf", mask_ratio=0.0, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours, spec, _ = load_backbone(files["encoder"][0])
        imgs = torch.randn(2, 3, 32, 32).double()
        with torch.no_grad():
            assert_parity(self.features(theirs, imgs), ours.double().eval().forward_features(imgs))
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
        assert tuple(processor.image_mean) == spec.mean
        theirs.save_pretrained(tmp_path / "again")
        assert load_backbone(tmp_path / "again")[1].num_heads == 3


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Randomise every weight but the position tables, so that no bias or scale keeps a neutral value."""
    for name, parameter in model.named_parameters():
        if "pos" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("to", sorted(PLAIN))
def test_what_was_assumed_and_the_licence_stay_known_through_conversions(tmp_path, files, to):
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(files["timm.safetensors"][0], folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model")
    report = convert(folder, place(tmp_path, to), to)
    assert any("norm_eps 1e-06" in assumption for assumption in report.assumptions)
    convert(place(tmp_path, to), place(tmp_path, "timm", "again"), "timm")
    for path in (place(tmp_path, to), place(tmp_path, "timm", "again")):
        read = load_backbone(path)[2]
        assert (read.assumptions, read.licence) == (report.assumptions, "cc-by-nc-4.0")
        found = inspect_checkpoint(path)
        assert found["assumed_before"] == report.assumptions
        console = Console(width=500, record=True)
        console.print(render(found))
        assert f"assumed before the conversion: {report.assumptions[0]}" in console.export_text()


@pytest.mark.parametrize("provenance", ["a person", "[3]", '{"converted": {"assumptions": ["x"]}}'])
def test_provenance_of_other_writers_is_no_report(tmp_path, encoder, provenance):
    save_file(encoder, tmp_path / "x.safetensors", metadata={"provenance": provenance})
    assert "x" not in load_backbone(tmp_path / "x.safetensors")[2].assumptions
