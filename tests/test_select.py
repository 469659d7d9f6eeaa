"""Names, selectors, coverage and FLOPs."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_accel import select
from lightning_accel.quantize import QuantConfig, quantization_coverage, quantize_model
from lightning_accel.select import Coverage, Entry


def wrapped() -> nn.Module:
    """An MLP whose first layer is checkpointed, the whole compiled (not run)."""
    model = tiny.mlp()
    model[0] = checkpoint_wrapper(model[0])
    return torch.compile(nn.Sequential(model, torch.compile(nn.Linear(3, 3))))


PLAIN = nn.Sequential(tiny.mlp(), nn.Linear(3, 3))


def test_wrappers_do_not_show_in_names() -> None:
    model = wrapped()
    assert dict(select.named_modules(model)).keys() == dict(PLAIN.named_modules()).keys()
    assert select.named_parameters(model).keys() == dict(PLAIN.named_parameters()).keys()


def test_a_wrapped_module_is_found_as_the_users_own() -> None:
    model = wrapped()
    for name, kind in (("0.0", nn.Linear), ("1", nn.Linear), ("0", nn.Sequential), ("", nn.Sequential)):
        assert type(select.get_module(model, name)) is kind
    assert select.get_module(model, None) is model._orig_mod


def test_each_module_is_listed_once_though_shared() -> None:
    layer = nn.Linear(4, 4)
    assert [n for n, _ in select.named_modules(nn.Sequential(layer, nn.ReLU(), layer))] == ["", "0", "1"]


def test_a_tied_parameter_is_listed_under_its_first_name() -> None:
    names = select.named_parameters(tiny.llama())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_an_unknown_module_lists_near_names() -> None:
    with pytest.raises(ValueError, match=r"no module 'transformer'.*module='model'.*lm_head"):
        select.get_module(tiny.llama(), "transformer")


def test_the_first_pattern_that_matches_wins_and_none_excludes() -> None:
    names = ["a.fc1", "a.fc2", "b.fc1", "b.fc2", "head"]
    overrides = {"b.*": None, "*.fc1": 0.25}
    assert select.assign(names, overrides, 0.5) == {
        "a.fc1": 0.25,
        "a.fc2": 0.5,
        "b.fc1": None,
        "b.fc2": None,
        "head": 0.5,
    }


def test_a_pattern_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"'encoder' matches no module; write 'encoder\.\*'; names are"):
        select.assign(["encoder.0", "head"], {"encoder": None}, 1.0)
    with pytest.raises(ValueError, match=r"'head' matches no module; write '\*\.head'; names are"):
        select.assign(["model.head"], {"head": None}, 1.0)
    with pytest.raises(ValueError, match=r"'lm_head' matches no module; names are.*'a', 'b'"):
        select.assign(["a", "b"], {"lm_head": None}, 1.0)


def test_coverage_shares_and_reasons() -> None:
    coverage = Coverage("pruning", [Entry("a", "Linear", 60, done="half", flops=10)])
    coverage.entries += [Entry("b", "Conv2d", 40, reason="no int8 form", flops=30), Entry("c", "bmm", 0, flops=10)]
    assert coverage.share_of_parameters == 0.6
    assert coverage.share_of_flops == 0.2
    assert "pruning: 60.0% of parameters, 20.0% of FLOPs" in str(coverage)
    assert "skipped b (Conv2d, 40 parameters, 60.0% of FLOPs): no int8 form" in str(coverage)
    assert coverage.as_dict()["entries"][0]["done"] == "half"


def test_coverage_of_a_technique_that_touches_parts_of_entries_is_the_share_of_the_parts() -> None:
    coverage = Coverage("pruning", [Entry("a", "parameter", 60, done="half"), Entry("b", "parameter", 40)], touched=30)
    assert coverage.share_of_parameters == 0.3 and "touched" not in coverage.as_dict()


def test_coverage_without_counted_flops_says_nothing_of_them() -> None:
    coverage = Coverage("pruning", [Entry("a", "Linear", 60, done="half")])
    assert coverage.share_of_flops is None and "FLOPs" not in str(coverage)


def test_nothing_touched_raises_with_the_reasons() -> None:
    coverage = Coverage("int8 fake quantization", [Entry("a", "Conv2d", 60, reason="no int8 form")])
    with pytest.raises(ValueError, match=r"touched nothing; use Linear \(a: no int8 form\)"):
        coverage.require_any("use Linear")


# --- FLOPs, against a count by hand -----------------------------------------------------------------------------------

BATCH, LENGTH = 2, 10


def llama_flops(inner: int = tiny.INNER) -> tuple[int, int]:
    """(linear layers and head, attention products) of a forward, two for a multiply and an add."""
    key_value = tiny.WIDTH // tiny.HEADS * 2
    layer = 2 * tiny.WIDTH * tiny.WIDTH + 2 * tiny.WIDTH * key_value + 3 * tiny.WIDTH * inner
    tokens = BATCH * LENGTH
    linear = 2 * tokens * (tiny.LAYERS * layer + tiny.WIDTH * tiny.VOCABULARY)
    return linear, tiny.LAYERS * 2 * 2 * BATCH * LENGTH * LENGTH * tiny.WIDTH


def test_flops_of_llama_are_those_counted_by_hand_attention_included() -> None:
    model = tiny.llama()
    counted = select.count_flops(model, (), {"input_ids": tiny.ids(BATCH, LENGTH)})
    linear, attention = llama_flops()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert sum(counted[name] for name in layers) == linear
    assert counted[""] == linear + attention
    assert counted["lm_head"] == 2 * BATCH * LENGTH * tiny.WIDTH * tiny.VOCABULARY


def test_flops_of_bert_are_those_counted_by_hand() -> None:
    counted = select.count_flops(tiny.bert(), (), {"input_ids": tiny.ids(BATCH, LENGTH)})
    linear = 2 * BATCH * LENGTH * tiny.LAYERS * (4 * tiny.WIDTH**2 + 2 * tiny.WIDTH * tiny.INNER)
    attention = tiny.LAYERS * 4 * BATCH * LENGTH**2 * tiny.WIDTH
    head = 2 * BATCH * (tiny.WIDTH**2 + 3 * tiny.WIDTH)
    assert counted[""] == linear + attention + head


@pytest.mark.parametrize(
    ("model", "shape", "flops"),
    [
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16), 20 * 2048 + 4 * 2 * 25 * 16),
        (nn.LSTM(8, 16, batch_first=True), (2, 5, 8), 20 * (8 * 64 + 16 * 64)),
        (nn.Conv2d(3, 4, 3, bias=False), (1, 3, 8, 8), 2 * 3 * 4 * 9 * 36),
        (nn.Linear(8, 4), (8,), 2 * 8 * 4),
    ],
    ids=["fused encoder layer", "LSTM", "convolution", "one row"],
)
def test_fused_operators_are_counted(model: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert select.count_flops(model.eval(), (torch.randn(shape),), {})[""] == flops
    assert (fast, mkldnn) == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)


def test_attention_between_activations_is_reported_as_not_quantized() -> None:
    model = tiny.llama()
    flops = select.count_flops(model, (), {"input_ids": tiny.ids(BATCH, LENGTH)})
    coverage = quantization_coverage(quantize_model(model, QuantConfig("int8")), flops)
    linear, attention = llama_flops()
    rest = coverage.entries[-1]
    assert rest.name.startswith("(attention") and rest.done is None
    assert rest.flops == attention
    assert coverage.share_of_flops == linear / (linear + attention)
    normalized = (2 * tiny.LAYERS + 1) * tiny.WIDTH
    assert coverage.share_of_parameters == 1 - normalized / select.count_parameters(model)
