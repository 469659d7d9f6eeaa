"""Whole residual blocks: found, masked where that is the same as leaving them out, left out, saved as plain models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_prune_units import TARGETS, built, logits, t5
from torch import Tensor, nn

from lightning_accel import PruneConfig, export_model, load, prune_model_, shrink_model
from lightning_accel.prune import find_groups

TOKENS = {"input_ids": tiny.ids()}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
HALF = PruneConfig("layers", 0.5)


def llama(layers: int = 4, **changes: Any) -> Any:
    return tiny.llama(num_hidden_layers=layers, **changes)


class Block(nn.Module):
    """x + f(x), of images; its activation lets nothing negative through, as in a ResNet."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(4, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.out(torch.relu(self.norm(self.conv(x)))))


def resnet(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(*map(Block, widths)), nn.Conv2d(4, 2, 1)).eval()


CASES: dict[str, tuple[Any, Any, str]] = {
    "llama": (llama, TOKENS, "model.layers"),
    "gpt2": (lambda: tiny.gpt2(n_layer=4), TOKENS, "transformer.h"),
    "vit": (tiny.vit, IMAGES, "vit.layers"),
    "blocks of images": (lambda: resnet(6, 6, 5, 6), (torch.randn(2, 3, 4, 4),), "2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("saliency", ["block-influence", "l2", "random"])
def test_a_model_without_the_blocks_computes_what_it_did_with_them_masked(case: str, saliency: str) -> None:
    make, inputs, name = CASES[case]
    model = make()
    (group,) = find_groups(model, inputs, "layers")
    assert (group.name, group.exact) == (name, True)
    config = PruneConfig("layers", 0.5, saliency=saliency)
    dense = logits(model, inputs)
    masks = prune_model_(model, config, example_inputs=inputs, calibration=[inputs])
    masked, shrunk = logits(model, inputs), shrink_model(model, masks, example_inputs=inputs)
    assert len(shrunk.get_submodule(name)) == group.width // 2 and len(model.get_submodule(name)) == group.width
    assert (masked - logits(shrunk, inputs)).abs().max() <= 1e-5 * masked.abs().max()
    assert (masked - dense).abs().max() > 1e-3 * masked.abs().max()
    again = prune_model_(model, config, example_inputs=inputs, calibration=[inputs])
    assert masks.keys() == again.keys() and torch.equal(masked, logits(model, inputs))


@pytest.mark.parametrize(("case", "exact"), [("whisper", True), ("mobilenet", True), ("convnext", True), ("swin", True),
                                             ("distilbert", False), ("wav2vec2", False), ("bart", False)])  # fmt: skip
def test_layers_of_other_architectures_are_left_out(case: str, exact: bool) -> None:
    model, inputs, _ = built(case)
    groups = find_groups(model, inputs, "layers")
    assert groups and {group.exact for group in groups} == {exact}
    before, dense = {group.name: len(model.get_submodule(group.name)) for group in groups}, logits(model, inputs)
    masks = prune_model_(model, PruneConfig("layers", 0.5), example_inputs=inputs, calibration=[inputs])
    shrunk = shrink_model(model, masks, example_inputs=inputs)
    assert all(len(shrunk.get_submodule(g.name)) == before[g.name] - g.width // 2 for g in groups)
    if exact:
        masked = logits(model, inputs)
        assert (logits(shrunk, inputs) - masked).abs().max() <= 1e-5 * masked.abs().max()
        assert (masked - dense).abs().max() > 1e-3 * masked.abs().max()


def test_the_block_that_changes_its_input_least_goes() -> None:
    model = llama()
    for parameter in model.model.layers[2].parameters():
        parameter.data *= 0.1
    masks = prune_model_(model, PruneConfig("layers", 0.25), example_inputs=TOKENS, calibration=[TOKENS])
    assert {name.split(".")[2] for name, mask in masks.items() if not mask.any()} == {"2"}


def test_indices_of_caches_follow_and_decoding_with_a_cache_stays_the_same() -> None:
    model = llama(layer_types=["full_attention"] * 4)
    masks = prune_model_(model, PruneConfig("layers", 0.25, overrides={"model.layers.0": None}, seed=1),
                         example_inputs=TOKENS, calibration=[TOKENS])  # fmt: skip
    shrunk, ids = shrink_model(model, masks, example_inputs=TOKENS), TOKENS["input_ids"]
    assert [layer.self_attn.layer_idx for layer in shrunk.model.layers] == [0, 1, 2]
    assert shrunk.config.num_hidden_layers == len(shrunk.config.layer_types or [1] * 3) == 3
    assert model.config.num_hidden_layers == 4
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, expected = shrunk.generate(ids, use_cache=True, **options), ids
    for _ in range(8):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, expected)


def test_layers_neurons_and_heads_are_cut_out_together_and_exported(tmp_path: Path) -> None:
    model = llama(num_key_value_heads=2)
    config = PruneConfig(("neurons", "heads", "layers"), 0.5)
    masks = prune_model_(model, config, example_inputs=TOKENS, calibration=[TOKENS])
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    layer = shrunk.model.layers[1]
    assert len(shrunk.model.layers) == 2
    assert (layer.mlp.up_proj.out_features, layer.self_attn.k_proj.out_features) == (tiny.INNER // 2, 8)
    assert (logits(shrunk, TOKENS) - logits(model, TOKENS)).abs().max() <= 1e-5
    ids = TOKENS["input_ids"]
    expected = shrunk.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]
    export_model(model, tmp_path / "model", masks=masks, data=[TOKENS], engines=("portable",), measure=False)
    assert torch.equal(load(tmp_path / "model").generate(ids, max_new_tokens=6), expected)


@pytest.mark.parametrize("saliency", ["block-influence", "l2"])
def test_blocks_that_normalize_behind_the_sum_are_left_out_though_masked_they_compute_something_else(saliency) -> None:
    model = tiny.bert()
    expected = copy.deepcopy(model)
    (group,) = find_groups(model, TOKENS, "layers")
    assert not group.exact and group.units == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    config = PruneConfig("layers", 0.5, saliency=saliency, overrides={"bert.encoder.layer": 0.5})
    masks = prune_model_(model, config, example_inputs=TOKENS, calibration=[TOKENS])
    (gone,) = {int(name.split(".")[3]) for name, mask in masks.items() if not mask.any()}
    shrunk = shrink_model(model, masks, example_inputs=TOKENS)
    del expected.bert.encoder.layer[gone]
    assert torch.equal(logits(shrunk, TOKENS), logits(expected, TOKENS)) and shrunk.config.num_hidden_layers == 1


def test_a_block_that_others_depend_on_stays() -> None:
    torch.manual_seed(0)
    model, inputs = t5().eval(), TOKENS | TARGETS
    model.encoder.block.append(copy.deepcopy(model.encoder.block[1]))
    (group,) = find_groups(model, inputs, "layers")  # the first holds the table of relative positions
    assert group.units == ("encoder.block.1", "encoder.block.2")


def test_layers_that_are_no_residual_blocks_are_not_found() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with pytest.raises(ValueError, match=r"layers pruning found nothing to prune .* residual blocks of one class"):
        prune_model_(plain, HALF, example_inputs=(torch.randn(3, 8),), calibration=[torch.randn(3, 8)])


def test_one_block_stays_and_data_are_asked_for() -> None:
    model = llama()
    masks = prune_model_(model, PruneConfig("layers", 0.99), example_inputs=TOKENS, calibration=[TOKENS])
    assert len(shrink_model(model, masks, example_inputs=TOKENS).model.layers) == 1
    with pytest.raises(ValueError, match=r"'block-influence' is measured on data; write calibration=\[batch, ...\]"):
        prune_model_(llama(), HALF, example_inputs=TOKENS)


def test_the_width_of_the_residual_stream_is_in_a_plain_checkpoint_where_that_of_a_head_is(tmp_path: Path) -> None:
    model = llama(2)
    masks = prune_model_(model, PruneConfig("hidden", 0.5), example_inputs=TOKENS)
    shrunk: Any = shrink_model(model, masks, example_inputs=TOKENS)
    shrunk.save_pretrained(tmp_path)
    again = type(shrunk).from_pretrained(tmp_path)
    assert torch.equal(logits(again, TOKENS), logits(shrunk, TOKENS)) and again.config.hidden_size == 16


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_what_the_configuration_can_say_is_saved_as_a_plain_checkpoint(case: str, tmp_path: Path) -> None:
    model = {"llama": llama, "gpt2": lambda: tiny.gpt2(n_layer=4), "bert": tiny.bert}[case]()
    config = PruneConfig(
        ("neurons", "heads", "layers") if case == "llama" else ("neurons", "layers"), 0.5,
        overrides={"*pooler*": None} if case == "bert" else {},
    )  # fmt: skip
    masks = prune_model_(model, config, example_inputs=TOKENS, calibration=[TOKENS])
    shrunk: Any = shrink_model(model, masks, example_inputs=TOKENS)
    shrunk.save_pretrained(tmp_path)
    again = type(shrunk).from_pretrained(tmp_path)
    assert torch.equal(logits(again, TOKENS), logits(shrunk, TOKENS))
