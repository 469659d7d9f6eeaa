"""Saliencies by hand, patterns of zeros, and amounts that are shares of parameters or FLOPs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny
import torch
from test_prune_units import logits
from torch import Tensor, nn

from lightning_accel import PruneConfig, QuantConfig, prune_model_, quantize_model, shrink_model
from lightning_accel.prune import find_groups
from lightning_accel.prune.allocate import Costs
from lightning_accel.prune.calibrate import measure
from lightning_accel.prune.saliency import activation, block_influence, l1, l2, random, taylor, wanda
from lightning_accel.prune.targets import find_targets
from lightning_accel.select import count_flops, count_parameters

TOKENS = {"input_ids": tiny.ids()}


def three_neurons() -> tuple[nn.Sequential, Any]:
    """Rows (3, 0), (1, 1), (0, 0) with biases 4, 1, 0; columns (0, -12), (0, 1), (2, 0)."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([4.0, 1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 0.0, 2.0], [-12.0, 1.0, 0.0]]))
    (group,) = find_groups(model, (torch.randn(2, 2),))
    return model, group


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_l1_and_l2_by_hand() -> None:
    model, group = three_neurons()
    assert l1(group, values(model)).tolist() == [3 + 4 + 12, 1 + 1 + 1 + 1, 2]
    assert l2(group, values(model)).tolist() == [13.0, 2.0, 2.0]


def test_taylor_is_what_zeroing_a_unit_changes_to_first_order() -> None:
    model, group = three_neurons()
    gradients = {name: torch.ones_like(p) for name, p in values(model).items()}
    assert taylor(group, values(model), gradients).tolist() == [abs(3 + 4 - 12), 1 + 1 + 1 + 1, 2]
    gradients["2.weight"] = torch.zeros(2, 3)
    assert taylor(group, values(model), gradients).tolist() == [7, 3, 0]


def test_wanda_weighs_each_weight_with_its_input() -> None:
    model, group = three_neurons()
    inputs = {"0.weight": torch.tensor([[2.0, 5.0]]), "2.weight": torch.tensor([[1.0, 10.0, 3.0]])}
    assert wanda(group, values(model), inputs).tolist() == [3 * 2 + 4 + 12, 2 + 5 + 1 + 10, 2 * 3]


def test_the_activation_norm_is_that_of_what_layers_read() -> None:
    model, group = three_neurons()
    inputs = {"0.weight": torch.tensor([[2.0, 5.0]]), "2.weight": torch.tensor([[1.0, 10.0, 3.0]])}
    assert activation(group, values(model), inputs).tolist() == [1.0, 10.0, 3.0]


def test_block_influence_is_the_angle_between_input_and_output() -> None:
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    y = torch.tensor([[[4.0, 3.0], [2.0, 0.0]]])
    assert float(block_influence(x, y)) == pytest.approx(1 - (24 / 25 + 1) / 2)
    images = torch.randn(2, 3, 4, 5)
    tokens = images.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(block_influence(images, images.exp()), block_influence(tokens, tokens.exp()))


def test_random_saliency_follows_its_seed() -> None:
    _, group = three_neurons()
    assert torch.equal(random(group, 1), random(group, 1)) and not torch.equal(random(group, 1), random(group, 2))


@pytest.mark.parametrize("make", ["linear", "Conv1D", "conv", "depthwise"])
def test_the_norms_of_inputs_are_measured_over_all_batches(make: str) -> None:
    from transformers.pytorch_utils import Conv1D

    layer: Any = {
        "linear": nn.Linear(3, 5), "Conv1D": Conv1D(5, 3), "conv": nn.Conv2d(3, 5, 1),
        "depthwise": nn.Conv2d(3, 3, 1, groups=3),
    }[make]  # fmt: skip
    shape = (2, 3, 4, 4) if "conv" in make or make == "depthwise" else (2, 6, 3)
    batches = [torch.randn(*shape) for _ in range(3)]
    model, config = nn.Sequential(layer), PruneConfig(saliency="wanda")
    targets = find_targets(model, config)
    means = measure(model, targets, config, batches)
    x = torch.cat([b.movedim(1, -1) if b.dim() == 4 else b for b in batches]).reshape(-1, 3)
    rms = x.square().mean(0).sqrt()
    found = means["0.weight"].sqrt()
    torch.testing.assert_close(found.flatten(), rms)
    assert (layer.weight * found).shape == layer.weight.shape
    prune_model_(model, config, calibration=batches)
    assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())


DATA: dict[str, Any] = {"calibration": [(torch.randn(6, 8), torch.arange(6) % 3) for _ in range(2)]}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("structure", ["unstructured", "neurons", "2:4", "4x2"])
@pytest.mark.parametrize("saliency", ["l1", "l2", "taylor", "wanda", "activation", "random"])
def test_pruning_twice_changes_nothing_whatever_the_saliency(structure: str, saliency: str) -> None:
    if saliency == "activation" and structure != "neurons":
        with pytest.raises(ValueError, match="no activation of their own; write saliency='wanda'"):
            PruneConfig(structure, saliency=saliency)
        return
    model = tiny.mlp(classes=4)
    config = PruneConfig(structure, 0.5, saliency=saliency)
    options: Any = {"example_inputs": (torch.randn(2, 8),), "loss": cross_entropy, **DATA}
    masks = prune_model_(model, config, **options)
    before = copy.deepcopy(model.state_dict())
    again = prune_model_(model, config, **options)
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert {p.requires_grad for p in model.parameters()} == {True}


@pytest.mark.parametrize("saliency", ["taylor", "wanda", "activation"])
def test_heads_and_neurons_of_a_transformer_by_measured_saliencies(saliency: str) -> None:
    model = tiny.llama(num_key_value_heads=4)
    batch = TOKENS | {"labels": TOKENS["input_ids"]}
    config = PruneConfig(("neurons", "heads"), 0.5, saliency=saliency)
    masks = prune_model_(model, config, example_inputs=TOKENS, calibration=[batch])
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    assert (logits(model, TOKENS) - logits(shrunk, TOKENS)).abs().max() <= 1e-5
    assert shrunk.config.num_attention_heads == 2


def test_the_neuron_that_never_fires_goes_first_by_activation() -> None:
    model = tiny.mlp()
    with torch.no_grad():
        model[0].bias[5] = -100.0
    config = PruneConfig("neurons", 0.04, saliency="activation")
    masks = prune_model_(model, config, example_inputs=(torch.randn(2, 8),), **DATA)
    assert (~masks["0.bias"]).nonzero().tolist() == [[5]]


def test_data_or_a_loss_that_are_missing_are_asked_for() -> None:
    model = tiny.mlp()
    with pytest.raises(ValueError, match=r"'wanda' is measured on data; write calibration=\[batch"):
        prune_model_(model, PruneConfig(saliency="wanda"))
    with pytest.raises(ValueError, match=r"a loss is needed; give batches with labels, .*write loss=lambda"):
        prune_model_(model, PruneConfig(saliency="taylor"), calibration=[torch.ones(2, 8)])
    with pytest.raises(ValueError, match="unknown saliency 'l3'"):
        PruneConfig(saliency="l3")
    with pytest.raises(ValueError, match="block influence is that of whole layers, not of neurons"):
        PruneConfig("neurons", saliency="block-influence")
    with pytest.raises(ValueError, match="layers have no activation of their own; write saliency='block-influence'"):
        PruneConfig("layers", saliency="activation")


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "amount"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)])
def test_n_of_m_consecutive_inputs_stay_the_largest(structure: str, amount: float) -> None:
    n, m = map(int, structure.split(":"))
    model = tiny.gpt2()
    dense = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    masks = prune_model_(model, PruneConfig(structure, amount))
    mask = masks["transformer.h.0.mlp.c_fc.weight"].t().reshape(-1, m)  # stored as [in, out]
    rows = dense.t().reshape(-1, m).abs()
    assert mask.sum(1).unique().tolist() == [n]
    assert bool((rows.masked_fill(~mask, math.inf).amin(1) >= rows.masked_fill(mask, 0).amax(1)).all())


def test_blocks_of_weights_go_as_a_whole() -> None:
    model = tiny.mlp(hidden=32, classes=16)
    masks = prune_model_(model, PruneConfig("16x1", 0.25))
    mask = masks["2.weight"]
    assert mask.shape == (32, 32) and mask.float().mean() == 0.75
    blocks = mask.view(2, 16, 32)
    assert bool((blocks.all(1) | ~blocks.any(1)).all())


def test_a_pattern_that_does_not_divide_a_layer_names_it() -> None:
    with pytest.raises(
        ValueError, match=r"16x1 does not divide '4', .* 3 outputs and 24 inputs.*overrides=\{'4': None"
    ):
        prune_model_(tiny.mlp(), PruneConfig("16x1", overrides={"0": None, "2": None}))
    prune_model_(tiny.mlp(hidden=32), PruneConfig("16x1", overrides={"4": None}))
    with pytest.raises(ValueError, match=r"write PruneConfig\('1:4', amount=0.75\)"):
        PruneConfig("1:4")
    with pytest.raises(ValueError, match="keeps 4 of 4 weights, which is all"):
        PruneConfig("4:4", amount=0.0)


# --- shares of the whole model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_share_of_the_whole_model_is_reached_and_hardly_passed(of: str, scope: str) -> None:
    model = tiny.llama(num_hidden_layers=6, num_key_value_heads=4, intermediate_size=200)
    config = PruneConfig(("neurons", "heads"), 0.4, of=of, scope=scope)
    masks = prune_model_(model, config, example_inputs=TOKENS)
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    left = (
        count_parameters(shrunk) / count_parameters(model)
        if of == "parameters"
        else count_flops(shrunk, (), TOKENS)[""] / count_flops(model, (), TOKENS)[""]
    )
    assert 0.6 - 0.15 <= left <= 0.6


COUNTED = {
    "llama": (lambda: tiny.llama(num_hidden_layers=3), TOKENS, ("neurons", "heads", "layers")),
    "gpt2": (tiny.gpt2, TOKENS, ("neurons", "heads", "layers")),
    "bert": (tiny.bert, TOKENS, ("neurons", "heads", "layers")),
    "vit": (tiny.vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, ("neurons", "heads", "layers")),
    "convnet": (tiny.convnet, (torch.randn(2, 3, 8, 8),), ("neurons",)),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_what_is_counted_from_masks_is_what_the_cut_model_has(case: str, of: str) -> None:
    make, inputs, structures = COUNTED[case]
    model = make()
    config = PruneConfig(structures, 0.5, saliency="l2")
    targets = find_targets(model, config, inputs)
    costs = Costs(model, targets, of, {"": inputs})
    masks = prune_model_(model, config, example_inputs=inputs)
    by_kind = {}
    for i, target in enumerate(targets):
        dropped = [masks[m.name] for m in target.members if m.unit is not None]
        if target.kind == "layers":
            by_kind[i] = torch.tensor(
                [any(bool(masks[m.name].any()) for m in target.members if m.unit == u) for u in range(target.width)]
            )
        else:
            member = next(m for m in target.members if m.name in masks)
            kept = (
                masks[member.name].movedim(member.dim, 0).flatten(1).any(1)
                if masks[member.name].dim() > 1
                else masks[member.name]
            )
            by_kind[i] = kept[member.index].any(1)
        assert not dropped or target.kind == "layers"
    shrunk = shrink_model(model, masks, example_inputs=inputs)

    def count(model: nn.Module) -> float:
        if of == "parameters":
            return count_parameters(model)
        args = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        return count_flops(model, *args)[""]

    expected = 1 - count(shrunk) / count(model)
    assert costs.removed(masks, [by_kind[i] for i in range(len(targets))]) == pytest.approx(expected, abs=1e-9)


def test_a_share_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(
        ValueError, match=r"amount=0.9 of parameters is out of reach.* (\d+\.\d)% are gone; write amount=0"
    ):
        prune_model_(tiny.llama(), PruneConfig("neurons", 0.9, of="parameters"), example_inputs=TOKENS)
    with pytest.raises(ValueError, match=r"of='flops' counts the FLOPs of a forward and needs example_inputs"):
        prune_model_(tiny.mlp(), PruneConfig(amount=0.5, of="flops"))
    with pytest.raises(ValueError, match="unknown of='bytes'"):
        PruneConfig(of="bytes")


# --- bad inputs -------------------------------------------------------------------------------------------------------


def test_a_group_that_crosses_an_excluded_module_names_both() -> None:
    config = PruneConfig("neurons", overrides={"*.up_proj": None})
    with pytest.raises(ValueError, match=r"exclude '(model.layers.0.mlp.up_proj)'.* with those of '(.*gate_proj)'"):
        prune_model_(tiny.llama(), config, example_inputs=TOKENS)


def test_a_tied_weight_that_is_excluded_on_one_side_is_refused() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)))
    blocks[1][0].weight = blocks[0][0].weight
    with pytest.raises(ValueError, match=r"exclude '1.0', whose weights are cut together with those of '0.0'"):
        prune_model_(blocks, PruneConfig("neurons", overrides={"1.0": None}), example_inputs=(torch.randn(2, 8),))


def test_a_quantized_model_is_refused() -> None:
    quantized = quantize_model(tiny.mlp(), QuantConfig("int8"))
    with pytest.raises(ValueError, match="already quantized"):
        prune_model_(quantized, PruneConfig())


def test_heads_that_are_not_computed_side_by_side_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    with pytest.raises(ValueError, match=r"nothing .*'self_attn' is an nn.MultiheadAttention, whose operation F\."):
        prune_model_(layer, PruneConfig("heads"), example_inputs=(torch.randn(2, 5, 16),))


def test_attention_whose_heads_stay_is_named_where_others_are_cut() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.torchs = tiny.bert(), nn.MultiheadAttention(3, 1, batch_first=True)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.own(input_ids=input_ids).logits[:, None]
            return self.torchs(x, x, x, need_weights=False)[0]

    with pytest.warns(UserWarning, match="'torchs' is an nn.MultiheadAttention"):
        masks = prune_model_(Both().eval(), PruneConfig("heads"), example_inputs=(tiny.ids(),))
    assert masks and not any(name.startswith("torchs") for name in masks)


def test_structures_are_named_once() -> None:
    with pytest.raises(ValueError, match="name each once"):
        PruneConfig(("neurons", "neurons"))
    assert PruneConfig(["neurons", "heads"]).structure == ("neurons", "heads")  # type: ignore[arg-type]
