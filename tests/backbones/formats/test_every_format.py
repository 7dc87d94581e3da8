"""For the toy files of every format: one format fits, every key is explained, the export reads back equal."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.adapters.features import FeatureMaps
from backbones.load import load_backbone
from backbones.reading.source import open_source
from backbones.translating.detect import FORMATS, detect, get_format
from mae_bench.export import write_export

pytestmark = pytest.mark.usefixtures("toy_heads")

HERE = Path(__file__).parent
# A module toys_FORMAT.py has `write(folder) -> {name: (path, keywords of load_backbone that it needs)}`.
TOYS = sorted(path.stem.removeprefix("toys_") for path in HERE.glob("toys_*.py"))


@pytest.fixture(scope="module", params=TOYS)
def toys(request, tmp_path_factory) -> tuple[str, dict[str, tuple[Path, dict[str, Any]]]]:
    module = import_module(f"tests.backbones.formats.toys_{request.param}")
    return request.param, module.write(tmp_path_factory.mktemp(request.param))


def test_one_format_fits(toys):
    format, files = toys
    for name, (path, options) in files.items():
        checkpoint = open_source(path, weights=options.get("weights"))
        if "format" in options:  # the layout of several families: the user says which
            assert get_format(options["format"]).fits(checkpoint) or format == options["format"], name
        else:
            assert [other for other in FORMATS if get_format(other).fits(checkpoint)] == [format], name
            assert detect(checkpoint) == format


def test_every_key_is_explained_and_the_export_reads_back(toys, tmp_path):
    _, files = toys
    for name, (path, options) in files.items():
        model, spec, report = load_backbone(path, **options)
        stored = open_source(path, weights=options.get("weights")).stored
        assert set(report.renamed) | set(report.dropped) == set(stored), name
        assert not set(report.renamed) & set(report.dropped), name
        assert all(report.dropped.values()), name
        assert set(report.renamed.values()) | set(report.new) == set(model.state_dict()), name
        write_export(tmp_path / name, model.state_dict(), spec, {})
        again, same_spec, _ = load_backbone(tmp_path / name)
        assert same_spec == spec, name
        imgs = torch.randn(2, spec.in_chans, *spec.img_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens = model.eval().forward_features(imgs)
            assert tokens.shape[:2] == (2, spec.num_prefix_tokens + spec.num_patches), name
            assert tokens.isfinite().all(), name
            assert torch.equal(tokens, again.eval().forward_features(imgs)), name


def test_feature_maps_of_images_of_another_size(toys):
    _, files = toys
    for name, (path, options) in files.items():
        model, spec, _ = load_backbone(path, dynamic_img_size=True, **options)
        (height, width), (down, across) = spec.img_size, spec.patch_size
        imgs = torch.zeros(1, spec.in_chans, height + down, width + 2 * across)
        maps = FeatureMaps(model, spec, [spec.depth - 1])(imgs)
        assert maps[0].shape == (1, spec.embed_dim, height // down + 1, width // across + 2), name
