"""The config of Mask R-CNN: contradictions are refused, and the packaged recipes are complete."""

from collections.abc import Callable
from typing import Any

import pytest

from mae_bench.config import CONFIGS, build, load_yaml
from mae_bench.errors import UserError
from tasks.coco.config import MaskRCNNConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"anchor_sizes": (8, 16)}, "2 sizes for 4 levels"),
        ({"pyramid_strides": (4, 16, 32)}, "do not double"),
        ({"img_size": 72}, "not a multiple of the coarsest stride 16"),
        ({"scale_range": (2.0, 0.1)}, "scale_range"),
        ({"lr_steps": (0.9, 0.5)}, "lr_steps"),
        ({"warmup_iterations": 4}, "not fewer than iterations"),
        ({"lr_step": (0.5,)}, "nearest known key is 'lr_steps'"),
        ({"amp_dtype": "float16"}, "amp_dtype"),
    ],
)
def test_contradictions_are_refused(
    make_config: Callable[..., MaskRCNNConfig], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(**overrides)


RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in (CONFIGS / "tasks" / "coco").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES)
def test_packaged_recipes_need_nothing_but_data(path: str) -> None:
    config = build(MaskRCNNConfig, load_yaml(path, ["data=somewhere"]), path)
    assert config.kind == "maskrcnn"


def test_the_vitdet_recipe_is_the_published_one() -> None:
    """arXiv 2203.16527, Table 11: 184,375 iterations of 64 images, lr / 10 at 163,889 and 177,546."""
    config = build(
        MaskRCNNConfig, load_yaml("tasks/coco/maskrcnn_vitdet_100ep.yaml", ["data=somewhere"]), "recipe"
    )
    assert (config.iterations, config.global_batch_size, config.lr, config.weight_decay) == (
        184_375,
        64,
        1e-4,
        0.1,
    )
    assert [round(step * config.iterations) for step in config.lr_steps] == [163_889, 177_546]
    assert (config.layer_decay, config.drop_path, config.warmup_iterations, config.img_size) == (
        0.7,
        0.1,
        250,
        1024,
    )
