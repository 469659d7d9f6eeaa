"""Saliency, masks, groups and shrinking: by hand, and masked against shrunk."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import PruneConfig, QuantConfig, apply_masks_, prepare_, prune_model_, shrink_model
from lightning_accel.prune import compute_masks, find_groups, pruning_coverage
from lightning_accel.prune.groups import all_groups
from lightning_accel.prune.saliency import saliency
from lightning_accel.prune.targets import find_targets
from lightning_accel.select import count_parameters

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def set_weights(module: nn.Module, values: list[list[float]], bias: list[float] | None = None) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.tensor(values))
        if bias is not None:
            module.bias.copy_(torch.tensor(bias))


def neurons_kept(masks: dict[str, Tensor], name: str) -> list[bool]:
    return masks[name].flatten().tolist()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1.0, -0.1, 50, float("nan")])
def test_an_amount_outside_0_to_1_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        PruneConfig(amount=amount)
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        PruneConfig(overrides={"a": amount})


def test_unknown_structure_and_scope_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown structure 'filters'"):
        PruneConfig("filters")
    with pytest.raises(ValueError, match="write 'uniform' or 'global'"):
        PruneConfig(scope="layer")


# --- masks by hand ----------------------------------------------------------------------------------------------------


def test_the_smallest_weights_of_each_layer_go() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    set_weights(model[0], [[0.1, -5.0, 2.0], [-0.2, 3.0, -0.3]], [1.0, 1.0])
    set_weights(model[1], [[40.0, -10.0], [20.0, 30.0]])
    masks = prune_model_(model, PruneConfig(amount=0.5))
    assert model[0].weight.tolist() == [[0.0, -5.0, 2.0], [0.0, 3.0, 0.0]]
    assert model[1].weight.tolist() == [[40.0, 0.0], [0.0, 30.0]]
    assert model[0].bias.tolist() == [1.0, 1.0] and set(masks) == {"0.weight", "1.weight"}


def test_global_scope_takes_the_smallest_of_all_layers_together() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    set_weights(model[0], [[0.1, -5.0, 2.0], [-0.2, 3.0, -0.3]])
    set_weights(model[1], [[40.0, -10.0], [20.0, 30.0]])
    prune_model_(model, PruneConfig(amount=0.5, scope="global"))
    assert model[0].weight.tolist() == [[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]
    assert model[1].weight.tolist() == [[40.0, -10.0], [20.0, 30.0]]


def test_saliency_of_a_neuron_is_the_norm_of_all_that_belongs_to_it() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    set_weights(model[0], [[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [4.0, 1.0, 0.0])
    set_weights(model[2], [[0.0, 0.0, 2.0], [12.0, 1.0, 0.0]], [9.0, 9.0])
    (group,) = find_groups(model, (torch.randn(2, 2),))
    assert saliency("l2", group, dict(model.named_parameters())).tolist() == [13.0, 2.0, 2.0]


def test_ties_are_decided_by_position() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    assert neurons_kept(masks, "0.weight") == [False, False, False, True, True, True]


def test_masks_reach_every_member_of_a_group_and_nothing_else() -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    assert set(masks) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    rows, columns = masks["0.weight"].flatten(), masks["2.weight"].any(0)
    assert torch.equal(rows, masks["0.bias"]) and torch.equal(rows, columns) and int(rows.sum()) == 12
    assert torch.equal(masks["2.weight"].any(1), masks["4.weight"].flatten())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.floats(0, 0.999), st.floats(0, 1), st.sampled_from(["unstructured", "neurons"]))
def test_amount_is_the_total_share_and_something_always_stays(
    width: int, amount: float, share: float, structure: str
) -> None:
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
    config = PruneConfig(structure, amount)
    name, n = ("0.bias", width) if structure == "neurons" else ("2.weight", 2 * width)
    assume(amount == 0 or round(amount * n))
    targets = find_targets(model, config, (torch.randn(3, 2),))
    masks = compute_masks(model, targets, config, share)
    assert int((~masks[name]).sum()) == min(round(share * amount * n), n - 1)


def test_an_amount_that_prunes_nothing_raises_and_says_what_would() -> None:
    model = tiny.mlp(hidden=4)
    with pytest.raises(ValueError, match=r"prunes nothing: .* 4 neurons .* amount=0.25"):
        prune_model_(model, PruneConfig("neurons", 0.1), example_inputs=(X,))
    masks = prune_model_(model, PruneConfig("neurons", 0.25), example_inputs=(X,))
    assert int((~masks["0.bias"]).sum()) == 1
    assert all(mask.all() for mask in prune_model_(model, PruneConfig("neurons", 0.0), example_inputs=(X,)).values())


@pytest.mark.parametrize(("pattern", "amount"), [("1:3", 2 / 3), ("4:6", 1 / 3), ("1:3", 0.66666666667)])
def test_patterns_of_thirds(pattern: str, amount: float) -> None:
    model = nn.Linear(12, 4)
    masks = prune_model_(nn.Sequential(model), PruneConfig(pattern, amount))
    n, m = map(int, pattern.split(":"))
    assert (masks["0.weight"].unflatten(1, (-1, m)).sum(-1) == n).all()
    with pytest.raises(ValueError, match=rf"amount={re.escape(repr(1 - n / m))}\)"):
        PruneConfig(pattern, 0.5)


@pytest.mark.parametrize("structure", ["unstructured", "neurons"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_pruning_twice_changes_nothing(structure: str, scope: str) -> None:
    model, config = tiny.mlp(), PruneConfig(structure, 0.4, scope)
    masks = prune_model_(model, config, example_inputs=(X,))
    before = copy.deepcopy(model.state_dict())
    again = prune_model_(model, config, example_inputs=(X,))
    assert masks.keys() == again.keys() and all(torch.equal(masks[n], again[n]) for n in masks)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_rising_share_keeps_pruned_what_was_pruned() -> None:
    model, config = tiny.mlp(), PruneConfig("neurons", 0.75)
    targets, gone = find_targets(model, config, (X,)), torch.zeros(24, dtype=torch.bool)
    for share in (0.25, 0.5, 0.75, 1.0):
        masks = compute_masks(model, targets, config, share)
        apply_masks_(model, masks)
        assert not (gone & masks["0.bias"]).any()
        gone = ~masks["0.bias"]
    assert int(gone.sum()) == 18


def test_global_neurons_floor_leaves_one_neuron_in_a_layer_that_would_vanish() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].weight, 1e-3)
    nn.init.zeros_(model[0].bias)
    with torch.no_grad():
        model[2].weight.fill_(1e-3)
        model[2].bias.fill_(5.0)
    masks = prune_model_(model, PruneConfig("neurons", 0.5, "global"), example_inputs=(X,))
    assert int(masks["0.bias"].sum()) == 1 and int(masks["2.bias"].sum()) == 8


def test_overrides_change_and_exclude_layers() -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig(amount=0.5, overrides={"4": None, "2": 0.25}))
    assert {n: round(1 - m.float().mean().item(), 3) for n, m in masks.items()} == {"0.weight": 0.5, "2.weight": 0.25}
    masks = prune_model_(tiny.mlp(), PruneConfig("neurons", 0.5, overrides={"0": None}), example_inputs=(X,))
    assert set(masks) == {"2.weight", "2.bias", "4.weight"}


def test_an_override_that_matches_nothing_or_excludes_everything_raises() -> None:
    with pytest.raises(ValueError, match="'lm_head' matches no module"):
        prune_model_(tiny.mlp(), PruneConfig(overrides={"lm_head": None}))
    with pytest.raises(ValueError, match="every module is excluded"):
        prune_model_(tiny.mlp(), PruneConfig(overrides={"*": None}))


def test_a_bare_layer_can_be_pruned() -> None:
    layer = nn.Linear(10, 10)
    masks = prune_model_(layer, PruneConfig(amount=0.3))
    assert int((layer.weight == 0).sum()) == 30 and list(masks) == ["weight"]


def test_convolutions_are_pruned_by_single_weights() -> None:
    model = tiny.convnet()
    prune_model_(model, PruneConfig(amount=0.5))
    assert int((model.features[0].weight == 0).sum()) == 3 * 8 * 9 // 2


def test_nothing_to_prune_raises() -> None:
    with pytest.raises(ValueError, match="found nothing to prune in LayerNorm"):
        prune_model_(nn.LayerNorm(8), PruneConfig())
    with pytest.raises(ValueError, match="two linear layers with only activations between"):
        prune_model_(nn.Sequential(nn.Linear(8, 8)), PruneConfig("neurons"), example_inputs=(X,))
    with pytest.raises(ValueError, match=r"needs example_inputs=\(x,\)"):
        prune_model_(tiny.mlp(), PruneConfig("neurons"))


def test_masks_of_another_model_are_refused() -> None:
    masks = prune_model_(tiny.mlp(), PruneConfig())
    with pytest.raises(ValueError, match=r"name '0.weight', which ConvNet does not have"):
        apply_masks_(tiny.convnet(), masks)
    with pytest.raises(ValueError, match=r"mask of '0.weight' has shape \(24, 8\), the parameter \(20, 8\)"):
        apply_masks_(tiny.mlp(hidden=20), masks)
    with pytest.raises(ValueError, match=r"name '0.weight'"):
        shrink_model(tiny.convnet(), masks, example_inputs=(torch.randn(2, 3, 8, 8),))


def test_pruning_follows_names_through_torch_compile() -> None:
    plain, model = tiny.mlp(), torch.compile(tiny.mlp())
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    assert masks.keys() == prune_model_(plain, PruneConfig("neurons", 0.5), example_inputs=(X,)).keys()
    assert torch.equal(model._orig_mod[0].weight, plain[0].weight)
    assert count_parameters(shrink_model(model, masks, example_inputs=(X,))) == 12 * 9 + 12 * 13 + 3 * 13


def test_coverage_is_the_share_of_parameters_that_is_zero_and_names_that_of_each() -> None:
    model = tiny.mlp()
    coverage = pruning_coverage(model, prune_model_(model, PruneConfig(amount=0.25)))
    assert coverage.share_of_parameters == 0.25 * (24 * 8 + 24 * 24 + 3 * 24) / count_parameters(model)
    assert coverage.entries[0].done == "25.0% zero" and coverage.entries[1].reason == "not selected"
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    kept = count_parameters(shrink_model(model, masks, example_inputs=(X,)))
    assert pruning_coverage(model, masks).share_of_parameters == pytest.approx(1 - kept / count_parameters(model))


# --- groups -----------------------------------------------------------------------------------------------------------

TOKENS = {"input_ids": tiny.ids()}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
INNER_GPT2 = 4 * tiny.WIDTH
KINDS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "mlp": (tiny.mlp, (X,), {"0": 24, "2": 24}),
    "llama": (tiny.llama, TOKENS, {f"model.layers.{i}.mlp.gate_proj": tiny.INNER for i in range(2)}),
    "gpt2": (tiny.gpt2, TOKENS, {f"transformer.h.{i}.mlp.c_fc": INNER_GPT2 for i in range(2)}),
    "bert": (
        tiny.bert,
        TOKENS,
        {f"bert.encoder.layer.{i}.intermediate.dense": 48 for i in range(2)} | {"bert.pooler.dense": 32},
    ),
    "vit": (tiny.vit, IMAGES, {f"vit.layers.{i}.mlp.fc1": tiny.INNER for i in range(2)}),
    "convnet": (tiny.convnet, (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),), {"head.0": 24}),
}  # fmt: skip


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return tiny.logits(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_the_feed_forward_widths_are_found(kind: str) -> None:
    make, inputs, widths = KINDS[kind]
    assert {g.name: g.width for g in find_groups(make(), inputs)} == widths


@pytest.mark.parametrize(("kind", "scope"), [*((kind, "uniform") for kind in KINDS), ("bert", "global")])
def test_the_shrunk_model_computes_what_the_masked_one_does(kind: str, scope: str) -> None:
    make, inputs, widths = KINDS[kind]
    model = make()
    dense = run(model, inputs)
    masks = prune_model_(model, PruneConfig("neurons", 0.5, scope), example_inputs=inputs)
    masked, shrunk = run(model, inputs), shrink_model(model, masks, example_inputs=inputs)
    assert (masked - run(shrunk, inputs)).abs().max().item() <= 1e-5 * max(1.0, masked.abs().max().item())
    assert not torch.allclose(masked, dense, atol=1e-3), "half of the neurons did nothing"
    before, after = dict(model.named_parameters()), dict(shrunk.named_parameters())
    gone = {
        name: width - after[f"{name}.weight"].numel() * width // before[f"{name}.weight"].numel()
        for name, width in widths.items()
    }
    emptied = sum(width - gone[name] == 1 for name, width in widths.items())
    if kind != "mlp":  # there one weight lies in two groups
        assert sum(gone.values()) == sum(widths.values()) // 2 - emptied, "amount is that of all, one neuron stays"


def test_parameter_counts_of_a_shrunk_llama_by_hand() -> None:
    model = tiny.llama()
    masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=TOKENS)
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    assert count_parameters(model) - count_parameters(shrunk) == 2 * 3 * tiny.WIDTH * 36
    assert shrunk.config.intermediate_size == 12 and model.config.intermediate_size == tiny.INNER
    assert shrunk.lm_head.weight is shrunk.model.embed_tokens.weight
    mlp = shrunk.model.layers[1].mlp
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features, mlp.intermediate_size) == (12, 12, 12)


def test_a_shrunk_gpt2_records_its_widths() -> None:
    model = tiny.gpt2()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=TOKENS)
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    assert (shrunk.config.n_inner, shrunk.transformer.h[0].mlp.c_fc.nf, shrunk.transformer.h[0].mlp.c_proj.nx) == (
        64,
        64,
        64,
    )


def test_the_configuration_keeps_its_width_where_layers_differ() -> None:
    model = tiny.llama()
    config = PruneConfig("neurons", 0.5, overrides={"*.layers.0.*": None})
    shrunk = shrink_model(
        model, prune_model_(model, config, example_inputs=TOKENS), example_inputs=TOKENS
    )  # fmt: skip
    assert [layer.mlp.gate_proj.out_features for layer in shrunk.model.layers] == [48, 24]
    assert shrunk.config.intermediate_size == 48


def test_the_original_keeps_its_size_and_its_zeros() -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    before = copy.deepcopy(model.state_dict())
    shrink_model(model, masks, example_inputs=(X,))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_weights_that_were_not_masked_yet_are_masked_before_cutting() -> None:
    model = tiny.mlp()
    masks = prune_model_(copy.deepcopy(model), PruneConfig("neurons", 0.5), example_inputs=(X,))
    shrunk = shrink_model(model, masks, example_inputs=(X,))
    apply_masks_(model, masks)
    assert torch.allclose(run(shrunk, (X,)), run(model, (X,)), atol=1e-5)


def test_masks_of_single_weights_stay_zeros() -> None:
    model = tiny.llama()
    masks = prune_model_(model, PruneConfig(amount=0.5))
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), shrunk.parameters(), strict=True))


def test_neurons_and_single_weights_can_be_pruned_together() -> None:
    model = tiny.mlp()
    single = prune_model_(model, PruneConfig(amount=0.3))
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    both = {n: masks.get(n, single.get(n)) & single.get(n, masks.get(n)) for n in masks | single}
    shrunk = shrink_model(model, both, example_inputs=(X,))
    assert shrunk[0].out_features <= 12 and torch.allclose(run(shrunk, (X,)), run(model, (X,)), atol=1e-5)


def test_half_of_a_groups_masks_cannot_be_cut_and_raises() -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    with pytest.raises(ValueError, match=r"neurons of '0.weight' that cannot be cut out"):
        shrink_model(model, {"0.weight": masks["0.weight"]}, example_inputs=(X,))
    masks["4.weight"] = masks["4.weight"].roll(1, 1)
    with pytest.raises(ValueError, match="missing or disagree"):
        shrink_model(model, masks, example_inputs=(X,))


@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2"])
def test_a_model_prepared_for_quantization_is_shrunk_the_same(kind: str) -> None:
    make, inputs, _ = KINDS[kind]
    model = make()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=inputs)
    plain = shrink_model(model, masks, example_inputs=inputs)
    prepare_(model, QuantConfig("int8"))
    shrunk = shrink_model(model, masks, example_inputs=inputs)
    assert plain.state_dict().keys() == shrunk.state_dict().keys()
    assert all(torch.equal(t, shrunk.state_dict()[n]) for n, t in plain.state_dict().items())
    prepare_(plain, QuantConfig("int8"))
    assert torch.equal(run(shrunk, inputs), run(plain, inputs))


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Dropout(0.5), nn.Identity()],
    ids=lambda a: type(a).__name__,
)
def test_element_wise_activations_join_a_group(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 4)).eval()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    shrunk = shrink_model(model, masks, example_inputs=(X,))
    assert shrunk[0].out_features == 8
    assert torch.allclose(run(shrunk, (X,)), run(model, (X,)), atol=1e-5)


class Net(nn.Module):
    """Linear layers a: 8 -> 16, b: 16 -> 16, c: 16 -> 4, put together as the test says."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


NO_GROUPS: dict[str, Net] = {
    "also an output": Net(lambda m, x: (m.c(h := m.a(x).relu()), h)),
    "layer norm": Net(lambda m, x: m.c(m.n(m.a(x))), n=nn.LayerNorm(16)),
    "softmax": Net(lambda m, x: m.c(m.a(x).softmax(-1))),
    "mean over neurons": Net(lambda m, x: m.c(m.a(x) - m.a(x).mean(-1, keepdim=True))),
    "sum of neurons beside": Net(lambda m, x: m.c(h := m.a(x)) + h.sum(-1, keepdim=True)),
    "matrix product of activations": Net(lambda m, x: m.c((h := m.a(x)) @ h.t() @ h)),
    "heads": Net(lambda m, x: m.c(m.a(x).view(-1, 4, 4).flip(1).reshape(-1, 16))),
    "a constant per neuron": Net(lambda m, x: m.c(m.a(x) + torch.arange(16.0))),
    "a weight read elsewhere": Net(lambda m, x: m.c(m.a(x).relu()) + m.c.weight.sum()),
    "attention": Net(lambda m, x: m.t(h := m.a(x[:, None]).relu(), h, h)[0], t=nn.MultiheadAttention(16, 2)),
    "the input itself as width": Net(lambda m, x: m.e(x + m.d(x)), d=nn.Linear(8, 8), e=nn.Linear(8, 2)),
}


@pytest.mark.parametrize("case", NO_GROUPS)
def test_no_group_where_cutting_would_be_wrong(case: str) -> None:
    groups = [g for g in all_groups(NO_GROUPS[case], (X,)) if g.kind != "hidden"]
    assert [(g.name, g.kind, g.members) for g in groups] == []


def blocks(n: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(n)))


def check_shrunk(model: nn.Module, inputs: Any, amount: float = 0.5) -> nn.Module:
    """The model, pruned and shrunk; it must compute what the masked one does."""
    masks = prune_model_(model, PruneConfig("neurons", amount), example_inputs=inputs)
    shrunk = shrink_model(model, masks, example_inputs=inputs)
    assert torch.allclose(run(shrunk, inputs), run(model, inputs), atol=1e-5)
    return shrunk


WHOLE_UNITS: dict[str, Net] = {
    "residual stream": Net(lambda m, x: m.c(m.a(x) + m.b(m.a(x)).relu())),
    "concatenation": Net(lambda m, x: m.d(torch.cat([m.a(x), m.a(x)], -1)), d=nn.Linear(32, 4)),
    "split": Net(lambda m, x: m.d(m.a(x).chunk(2, -1)[0]), d=nn.Linear(8, 4)),
    "a module used twice": Net(lambda m, x: m.c(m.b(m.b(m.a(x)).relu()).relu())),
}


@pytest.mark.parametrize("case", WHOLE_UNITS)
def test_a_width_that_is_added_split_or_put_together_is_cut_everywhere(case: str) -> None:
    check_shrunk(WHOLE_UNITS[case], (X,))


def test_weights_tied_between_two_blocks_are_cut_alike_and_stay_tied() -> None:
    model = blocks(3)
    model[2][0].weight = model[0][0].weight
    (group,) = [g for g in find_groups(model, (X,)) if g.name == "0.0"]
    names = {"0.0.weight", "0.0.bias", "2.0.bias", "0.2.weight", "2.2.weight"}
    assert {member.name for member in group.members} == names
    shrunk = check_shrunk(model, (X,))
    assert shrunk[2][0].weight is shrunk[0][0].weight and shrunk[2][0].weight.shape == (8, 8)
    assert (shrunk[2][0].in_features, shrunk[2][0].out_features) == (8, 8), "its input is the model's"


def test_a_weight_tied_to_another_role_is_left_alone() -> None:
    model = Net(lambda m, x: m.c(m.a(x).relu()) + m.e(torch.zeros(4, dtype=torch.long)), e=nn.Embedding(4, 16))
    model.c = nn.Linear(16, 16)
    model.e.weight = nn.Parameter(torch.randn(16, 16))
    model.c.weight = model.e.weight
    assert find_groups(model, (X,)) == []


def test_a_module_called_twice_side_by_side_is_cut_once() -> None:
    shared = blocks(1)[0]
    model = Net(lambda m, x: m.s(x) + m.s(x.flip(0)), s=shared)
    assert {g.name: g.width for g in find_groups(model, (X,))} == {"s.0": 16}
    assert check_shrunk(model, (X,)).s[0].out_features == 8


def test_layers_that_share_one_feed_forward_block_are_cut_once() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = AlbertForSequenceClassification(config).eval()
    group = find_groups(model, TOKENS)[0]
    assert group.name.endswith("albert_layers.0.ffn") and group.width == 48
    shrunk = check_shrunk(model, TOKENS, 0.25)
    assert count_parameters(model) - count_parameters(shrunk) >= 12 * (2 * 32 + 1)


def test_expert_weights_in_one_3d_tensor_are_left_alone() -> None:
    model = Net(lambda m, x: x @ m.w1 @ m.w2)
    model.w1, model.w2 = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.randn(2, 16, 4))
    assert find_groups(model, (X,)) == []


def test_bare_parameters_are_cut_too() -> None:
    model = Net(lambda m, x: (x @ m.w1).relu() @ m.w2)
    model.w1, model.w2 = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16, 4))
    masks = prune_model_(model, PruneConfig("neurons", 0.25), example_inputs=(X,))
    shrunk = shrink_model(model, masks, example_inputs=(X,))
    assert (shrunk.w1.shape, shrunk.w2.shape) == ((8, 12), (12, 4))
    assert torch.allclose(run(shrunk, (X,)), run(model, (X,)), atol=1e-5)


def test_two_producers_that_are_added_are_cut_together() -> None:
    model = Net(lambda m, x: m.c(F.relu(m.a(x)) + m.d(x)), d=nn.Linear(8, 16, bias=False))
    (group,) = find_groups(model, (X,))
    places = {(member.name, member.dim) for member in group.members}
    assert places == {("a.weight", 0), ("a.bias", 0), ("d.weight", 0), ("c.weight", 1)}
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    shrunk = shrink_model(model, masks, example_inputs=(X,))
    assert torch.allclose(run(shrunk, (X,)), run(model, (X,)), atol=1e-5)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            return self.b(self.a(x).relu())
        return self.b(self.a(x))


def test_data_dependent_control_flow_is_refused_naming_the_line() -> None:
    with pytest.raises(ValueError, match=r"(?s)could not be traced.*test_prune\.py.*if x\.sum\(\) > 0") as error:
        prune_model_(Branching(), PruneConfig("neurons"), example_inputs=(X,))
    assert len(str(error.value).splitlines()) <= 6, "the advice for torch's developers is left out"
    prune_model_(Branching(), PruneConfig("unstructured"))


def test_inputs_that_the_model_rejects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)could not be traced.*example_inputs="):
        prune_model_(tiny.mlp(), PruneConfig("neurons"), example_inputs=(torch.randn(2, 5),))


def test_finding_groups_leaves_the_model_as_it_was() -> None:
    model = tiny.llama().train()
    before = copy.deepcopy(model.state_dict())
    find_groups(model, TOKENS)
    assert model.config.use_cache is True and model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
