"""convert: round trips are identity to the bit, and transformers itself loads what is written for it."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones.convert import convert
from backbones.detect import FORMATS
from backbones.load import load_backbone
from backbones.source import open_source
from mae_bench.errors import UserError

SUFFIX = {"mae_bench": "", "timm": ".safetensors", "official_mae": ".pth", "hf_vitmae": ""}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", ["full", "fine", "timm.safetensors", "hf"])
def test_there_and_back_again(tmp_path, files, name, to):
    source = files[name][0]
    model, spec, _ = load_backbone(source)
    out = tmp_path / f"out{SUFFIX[to]}"
    if name == "fine" and to == "hf_vitmae":
        with pytest.raises(UserError, match="fc_norm"):
            convert(source, out, to)
        return
    report = convert(source, out, to)
    assert report.source == str(source)
    there, same_spec, read = load_backbone(out)
    assert (read.format, same_spec) == (to, spec)
    convert(out, tmp_path / "back", "mae_bench")
    back, _, _ = load_backbone(tmp_path / "back")
    for other in (there, back):
        state = other.state_dict()
        assert set(state) == set(model.state_dict())
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_their_own_readers_load_what_is_written(tmp_path, files, encoder):
    convert(files["full"][0], tmp_path / "x.safetensors", "timm")
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    timm.models.load_checkpoint(model, str(tmp_path / "x.safetensors"))  # strict by default
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], encoder["blocks.1.attn.qkv.weight"])
    convert(files["full"][0], tmp_path / "x.pth", "official_mae")
    assert set(torch.load(tmp_path / "x.pth", weights_only=True)["model"]) == set(encoder)


@pytest.mark.parametrize("to", FORMATS)
def test_the_stored_precision_is_kept(tmp_path, encoder, to):
    torch.save({key: tensor.bfloat16() for key, tensor in encoder.items()}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / f"out{SUFFIX[to]}", to)
    assert {tensor.dtype for tensor in open_source(tmp_path / f"out{SUFFIX[to]}").tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("to", FORMATS)
def test_one_source_gives_one_digest(tmp_path, files, to):
    digests = set()
    for name in ("a", "b", "c"):
        convert(files["full"][0], tmp_path / f"{name}{SUFFIX[to]}", to)
        digests.add(open_source(tmp_path / f"{name}{SUFFIX[to]}").digest)
    assert len(digests) == 1


def test_wrong_targets_are_refused_before_anything_is_read(tmp_path, files):
    (tmp_path / "there.pth").write_text("mine")
    wrong = [("there.pth", "official_mae", "exists"), ("x.bin", "timm", "safetensors"), ("x", "onnx", "unknown format")]
    for out, to, told in wrong:
        with pytest.raises(UserError, match=told):
            convert(files["full"][0], tmp_path / out, to)
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_what_a_format_cannot_express_is_refused(tmp_path, encoder):
    encoder["reg_token"] = torch.zeros(1, 4, 192)
    encoder["pos_embed"] = torch.randn(1, 5 + 16, 192)
    torch.save(encoder, tmp_path / "registers.pth")
    assert load_backbone(tmp_path / "registers.pth")[1].num_prefix_tokens == 5
    for to in ("official_mae", "hf_vitmae"):
        with pytest.raises(UserError, match="5 prefix tokens"):
            convert(tmp_path / "registers.pth", tmp_path / f"out{SUFFIX[to]}", to)


class TestTransformers:
    """transformers' own classes are the judge of its format."""

    @pytest.fixture
    def transformers(self):
        return pytest.importorskip("transformers", reason="transformers is in the test set only")

    @pytest.fixture
    def config(self, transformers):
        return transformers.ViTMAEConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
            mask_ratio=0.0, layer_norm_eps=1e-5,
        )  # fmt: skip

    def features(self, model, imgs):
        """Tokens in the images' order: with ascending noise nothing is shuffled, with mask_ratio 0 nothing removed."""
        noise = torch.arange(16.0).repeat(len(imgs), 1)
        with torch.no_grad():
            return model.eval()(imgs, noise=noise).last_hidden_state

    @pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel"])
    def test_features_equal_theirs(self, tmp_path, transformers, config, kind):
        theirs = getattr(transformers, kind)(config)
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "hf")
        ours, spec, report = load_backbone(tmp_path / "hf")
        imgs = torch.randn(2, 3, 32, 32)
        expected = self.features(theirs.vit if kind == "ViTMAEForPreTraining" else theirs, imgs)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval().forward_features(imgs), expected, rtol=1e-5, atol=1e-5)
        assert (spec.num_heads, spec.norm_eps, spec.mlp_ratio) == (4, 1e-5, 2.0)
        assert set(report.renamed) | set(report.dropped) == set(open_source(tmp_path / "hf").stored)
        assert bool(report.dropped) == (kind == "ViTMAEForPreTraining")

    def test_they_load_what_we_write(self, tmp_path: Path, transformers, files):
        convert(files["encoder"][0], tmp_path / "hf", "hf_vitmae")
        theirs, info = transformers.ViTMAEModel.from_pretrained(tmp_path / "hf", mask_ratio=0.0, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours, spec, _ = load_backbone(files["encoder"][0])
        imgs = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(self.features(theirs, imgs), ours.eval().forward_features(imgs), rtol=1e-5, atol=1e-5)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
        assert tuple(processor.image_mean) == spec.mean
        theirs.save_pretrained(tmp_path / "again")
        assert load_backbone(tmp_path / "again")[1].num_heads == 3


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Draws every weight but the position tables, so that no bias or scale stays at the value that hides it."""
    for name, parameter in model.named_parameters():
        if "pos" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
