"""Each kind of quantized layer in one compiled program, against the same layer run eagerly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled import Built, build
from kernels import linear_bound
from test_norms import Same, live
from torch import Tensor, nn

from lightning_accel import QuantConfig, prepare_
from lightning_accel.quantize import calibrate_, convert_
from lightning_accel.quantize.ops import round_rows

pytestmark = pytest.mark.aoti

CONFIG = QuantConfig(
    "int8-static",
    overrides={"int4_weight": "int4-weight", "int4_int8": "int4-int8", "table": "int4-weight", "dynamic.*": "int8"},
)
CONVS = ("conv2d", "conv1d", "pointwise", "depthwise", "same", "groups", "chain")
STATIC = ("linear", "bare", *CONVS, "feed_forward")
WIDTH = 64


class EveryLayer(nn.Module):
    """Each output is one quantized layer, or one feed-forward block, fed by nothing but inputs; sizes are awkward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(37, 32)
        self.int4_weight, self.int4_int8 = nn.Linear(WIDTH, 33), nn.Linear(WIDTH, 20, bias=False)
        self.linear, self.bare = nn.Linear(WIDTH, 17), nn.Linear(5, 300, bias=False)
        self.conv2d = nn.Sequential(nn.Conv2d(3, 21, 3, stride=2, padding=1, bias=False), live(nn.BatchNorm2d(21)))
        self.conv1d = nn.Conv1d(9, 7, 5, padding="same", dilation=2, padding_mode="replicate")
        self.pointwise = nn.Conv2d(3, 5, 1)
        self.depthwise = nn.Conv2d(70, 70, 3, stride=2, padding=1, groups=70)
        self.same = nn.Sequential(Same(70, 70, 5, groups=70, bias=False, before=(2, 2, 1, 3)), live(nn.BatchNorm2d(70)))
        self.groups = Same(3, 6, 3, groups=3)
        middle = nn.Conv2d(70, 70, 3, groups=70), live(nn.BatchNorm2d(70)), nn.ReLU()
        self.chain = nn.Sequential(nn.Conv2d(70, 70, 1), nn.ReLU6(inplace=True), *middle, nn.Conv2d(70, 9, 1))
        self.feed_forward, self.dynamic = (
            nn.Sequential(nn.Linear(WIDTH, 90), nn.ReLU(), nn.Linear(90, 11)) for _ in range(2)
        )

    def forward(self, ids: Tensor, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        deep = image.repeat(1, 24, 1, 1)[:, :70]
        given = {"table": ids, "bare": x[..., :5], "conv2d": image, "conv1d": image[:, 1], "pointwise": image}
        given |= {"depthwise": deep, "same": deep, "groups": image, "chain": deep}
        return {name: module(given.get(name, x)) for name, module in self.named_children()}


def inputs(rows: int = 21, images: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 37, (rows, 3), generator=generator),
        "x": 2 * torch.randn(rows, WIDTH, generator=generator),
        "image": torch.randn(images, 3, 9, 10, generator=generator),
    }


CALIBRATION = [inputs(seed=seed) for seed in range(8)]


@pytest.fixture(scope="module")
def every_layer(tmp_path_factory: pytest.TempPathFactory) -> Built:
    fake = EveryLayer().eval()
    prepare_(fake, CONFIG)
    calibrate_(fake, CALIBRATION)
    return build(tmp_path_factory, "every", fake, example_inputs=inputs(), data=CALIBRATION[:4])


@pytest.mark.parametrize(("rows", "images"), [(1, 1), (2, 3), (13, 2), (16, 5), (128, 40)])
@torch.no_grad()
def test_each_layer_of_a_compiled_program_is_the_converted_one(every_layer: Built, rows: int, images: int) -> None:
    given = inputs(rows, images, seed=100 + rows)
    converted: Any = convert_(copy.deepcopy(every_layer.eager))
    eager = converted(**given)
    compiled, portable = every_layer.load("aoti")(**given), every_layer.load("portable")(**given)
    assert set(compiled) == set(portable) == set(eager) and set(STATIC) < set(eager)
    for name, expected in eager.items():
        assert torch.equal(portable[name], expected), name
        if name in ("int4_weight", "int4_int8"):
            layer, x = getattr(converted, name), given["x"]
            x = x if name == "int4_weight" else round_rows(x)
            difference = (compiled[name] - expected).abs()
            assert (difference <= linear_bound(x, layer.weight, layer.bias)).all(), name
        else:
            assert torch.equal(compiled[name], expected), name


@pytest.mark.parametrize("seeds", [50, pytest.param(1000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_seeds_and_sizes_of_inputs_change_nothing(every_layer: Built, seeds: int) -> None:
    fake, converted = every_layer.eager, convert_(copy.deepcopy(every_layer.eager))
    compiled, portable = every_layer.load("aoti"), every_layer.load("portable")
    for seed in range(seeds):
        given = inputs(1 + seed % 7, 1, seed)
        given["x"] *= 10.0 ** (seed % 5 - 2)
        eager, trained, ours = converted(**given), fake(**given), compiled(**given)
        for name, expected in eager.items():
            if name in ("int4_weight", "int4_int8"):
                layer, x = getattr(converted, name), given["x"]
                bound = linear_bound(x if name == "int4_weight" else round_rows(x), layer.weight, layer.bias)
                assert ((ours[name] - expected).abs() <= bound).all(), (seed, name)
            else:
                assert torch.equal(ours[name], expected), (seed, name)
            if name in ("linear", "bare"):
                layer, x = getattr(fake, name), given["x"][..., :5] if name == "bare" else given["x"]
                bound = linear_bound(layer.activation_fake_quantizer(x), layer.weight_fake_quantizer(layer.weight),
                                     layer.bias)  # fmt: skip
                assert ((trained[name] - expected).abs() <= bound).all(), (seed, name)
        if seed % 20 == 0:
            assert all(torch.equal(y, eager[name]) for name, y in portable(**given).items()), seed


@torch.no_grad()
def test_values_out_of_range_are_cut_off_in_a_compiled_program_too(every_layer: Built) -> None:
    given = inputs(seed=5)
    given["x"][0, 2], given["x"][1, 3], given["x"][2, 4] = torch.inf, -torch.inf, torch.nan
    given["image"][0, 1, 2, 3], given["image"][1, 2, 3, 4] = 1e9, torch.nan
    expected, compiled = convert_(copy.deepcopy(every_layer.eager))(**given), every_layer.load("aoti")(**given)
    for name in STATIC:
        assert torch.equal(compiled[name], expected[name]) and compiled[name].isfinite().all(), name


def test_no_layer_of_the_program_is_left_to_an_operator_of_python(every_layer: Built) -> None:
    nodes = [path.read_text() for path in every_layer.directory.glob("*.aoti.json")]
    assert not any("lightning_accel" in text for text in nodes)
