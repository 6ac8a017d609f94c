"""What is refused of the arguments that users give: at construction, in options, as draws, and in pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import in_loop, labels, names, tiny

from vistok.draws import Keys
from vistok.guidance import GuidanceOptions
from vistok.pipelines import Pipeline
from vistok.quantizers.bsq import MultiScaleBSQ
from vistok.quantizers.multiscale import MultiScaleQuantizer
from vistok.quantizers.scaled import PackedBSQ
from vistok.types import TokenSpec

SMALL = ["var", "randar", "open_magvit2_gpt", "mar"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("wrong", [2.0, -1, float("nan"), 1.0001])
def test_shares_are_from_0_to_1(name: str, wrong: float):
    with pytest.raises(ValueError, match="condition_dropout is a share from 0 to 1, got"):
        tiny(name, condition_dropout=wrong)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"num_layers": 0}, {"num_heads": -1}, {"num_classes": -1}])
def test_sizes_have_a_least_value(wrong: dict):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{key} must be at least ., got {value}"):
        tiny("randar", **wrong)


@pytest.mark.parametrize(
    "scales",
    [[[1, 1], [8, 8], [4, 4]], [[4, 4], [1, 1], [4, 4]], [[1, 1], [1000000, 1000000], [4, 4]], [[2, 1], [1, 4]]],
)
def test_scales_are_ordered_from_small_to_large(scales: list):
    makers = (
        lambda: MultiScaleQuantizer(8, 4, scales),
        lambda: PackedBSQ(4, scales),
        lambda: MultiScaleBSQ(4, scales),
        lambda: TokenSpec(1, 8, dim=4, scales=scales),
        lambda: tiny("llamagen_vq", quantizer={"name": "multi_scale", "codebook_size": 8, "scales": scales}),
    )
    for make in makers:
        with pytest.raises(ValueError, match=r"scales must be ordered from small to large, but .* follows"):
            make()


@pytest.mark.parametrize("scales", [[1, 2, 4], [[1.5, 1]], ["a"], "1,2", None, {"a": 1}, [[]], [[True, 4]], [[0, 4]]])
def test_a_spec_has_grids(scales):
    with pytest.raises(ValueError, match="scales must be"):
        TokenSpec(21, 8, dim=4, scales=scales)


@pytest.mark.parametrize("grid", [4, "4,4", [4.0, 4], [True, 16], [0, 16], [], [[4, 4]]])
def test_a_spec_has_a_grid(grid):
    with pytest.raises(ValueError, match=r"grid must be \(height, width\)"):
        TokenSpec(16, 8, dim=4, grid=grid)


@pytest.mark.parametrize("interval", [(5, 2), (-1, 3), (float("nan"), 3)])
def test_an_interval_begins_before_it_ends(interval: tuple):
    with pytest.raises(ValueError, match=r"guidance_interval is \(start, stop\), with 0 <= start <= stop"):
        GuidanceOptions(guidance_scale=2.0, guidance_interval=interval)


ORDERS = {
    "equal": torch.zeros(2, 16, dtype=torch.int64),
    "short": torch.arange(15).expand(2, -1),
    "one row too many": torch.arange(16).expand(3, -1),
    "negative": torch.arange(16).expand(2, -1) - 1,
    "too large": torch.arange(16).expand(2, -1) + 1,
    "floats": torch.arange(16).float().expand(2, -1),
    "a vector": torch.arange(16),
    "bool": torch.ones(2, 16, dtype=torch.bool),
}


@pytest.mark.parametrize("name", ["mar", "randar", "lpd"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_orders_of_sampling_are_permutations(name: str, order: torch.Tensor):
    model = tiny(name)
    draws = model.sampling_draws(Keys.range(0, 2)) | {"order": order}
    with pytest.raises(ValueError, match="order"):
        model.sample(labels(0, 1), draws=draws)


@pytest.mark.parametrize("name", ["var", "maskgit", "mar", "xar", "rar", "randar", "llama"])
def test_draws_fit_the_batch(name: str):
    model = tiny(name)
    draws = model.sampling_draws(Keys.range(0, 3))
    with pytest.raises(ValueError, match=r"(draws '\w+' are of 3 samples, but there are 2|3 orders do not fit 2 rows)"):
        model.sample(labels(0, 1), draws=draws, **in_loop(model))
    with pytest.raises(ValueError, match=r"draws|uniforms"):
        model.sample(labels(0, 1), draws={}, **in_loop(model))


def pipe() -> Pipeline:
    return Pipeline(tiny("llamagen_vq"), tiny("randar"))


MASK = torch.ones(16, 16, dtype=torch.bool)


@pytest.mark.parametrize("masks", [None, "mask.png", np.ones((16, 16), bool), [[True]], ["mask.png"]])
def test_masks_are_images_or_tensors(masks):
    with pytest.raises(ValueError, match="masks must be PIL images or a bool tensor, got"):
        pipe().edit(Image.new("RGB", (16, 16)), masks, 0)


@pytest.mark.parametrize("images", [None, torch.zeros(0, 3, 16, 16), torch.zeros(3, 16, 16), np.zeros((2, 3, 16, 16))])
def test_images_to_edit_are_images(images):
    with pytest.raises(ValueError, match="images must be"):
        pipe().edit(images, MASK, 0)


@pytest.mark.parametrize("name", ["batch_size", "index_start", "num_images_per_label"])
def test_nothing_is_no_number(name: str):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got None"):
        pipe()(0, **{name: None})


@pytest.mark.parametrize("name", [name for name in names("generator") if name in ("var", "randar", "lpd", "ibq_gpt")])
def test_guidance_of_1_needs_no_null_condition(name: str):
    model = tiny(name, condition_dropout=0.0)
    draws, loop = model.sampling_draws(Keys.range(0, 2)), in_loop(model)
    for scale in (1, 1.0, (1, 1)):
        model.sample(labels(0, 1), model.options_type(guidance_scale=scale), draws=draws, **loop)
    with pytest.raises(ValueError, match="without a null condition"):
        model.sample(labels(0, 1), model.options_type(guidance_scale=2), draws=draws, **loop)


@pytest.mark.parametrize("name", ["llamagen_vq", "vit_vqgan", "titok"])
@pytest.mark.parametrize("quantizer", ["lfq", ["lfq"], 3])
def test_a_quantizer_has_a_name_and_arguments(name: str, quantizer):
    with pytest.raises(ValueError, match=r"quantizer must be a name and arguments, such as \{'name': 'lfq'\}; got"):
        tiny(name, quantizer=quantizer)
