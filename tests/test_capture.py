"""What is captured from any module: inputs, outputs, free sizes, errors; through the portable program."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from compiled import Built
from test_manifest import problems
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification, T5Config, T5EncoderModel
from transformers.modeling_outputs import ModelOutput

from lightning_accel import ArtifactError, QuantConfig, artifact, export_model, load, quantize_model
from lightning_accel.capture import capture, flatten_output
from lightning_accel.loaded import LoadedModel
from lightning_accel.quantize import unprepare_
from lightning_accel.verify import KL_FRACTION

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def portable(tmp_path: Path) -> Callable[..., LoadedModel]:
    """Exports a model to a portable program and loads it."""

    def export(model: nn.Module, example_inputs: Any, **options: Any) -> LoadedModel:
        export_model(
            model, tmp_path / "a", example_inputs=example_inputs, engines=("portable",), measure=False, **options
        )
        return load(tmp_path / "a")

    return export


def shapes(loaded: LoadedModel) -> dict[str, list[Any]]:
    return {s["name"]: [d if isinstance(d, int) else d["name"] for d in s["shape"]] for s in loaded.entry["inputs"]}


@dataclass
class Held:
    """A tensor that torch's pytree does not see."""

    tensor: Tensor


class Call(nn.Module):
    """A module whose forward is a given function of a linear layer and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)
        self._function = function

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return self._function(self.linear, x, *rest, **named)


# --- equal to the model, at every size --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("example", [1, 3])
def test_an_mlp_at_every_batch_whatever_the_example(
    portable: Callable[..., LoadedModel], batch: int, example: int
) -> None:
    model, x = tiny.mlp(), torch.randn(batch, 8)
    loaded = portable(model, (torch.randn(example, 8),))
    assert shapes(loaded) == {"input": ["batch", 8]}
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


@torch.no_grad()
def test_bert_takes_named_inputs_and_gives_named_outputs_at_every_size(portable: Callable[..., LoadedModel]) -> None:
    model = tiny.bert()
    example = {"input_ids": tiny.ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    loaded = portable(model, example)
    assert shapes(loaded) == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    for batch, length in ((1, 1), (3, 5), (2, tiny.POSITIONS)):
        ids, mask = tiny.ids(batch, length), torch.ones(batch, length, dtype=torch.int64)
        mask[0, length // 2 + 1 :] = 0
        output = loaded(attention_mask=mask, input_ids=ids)
        assert list(output) == ["logits"]
        assert torch.allclose(output.logits, model(ids, attention_mask=mask).logits, atol=1e-5)
    with pytest.raises(ValueError, match="length 65, allowed is 1 to 64"):
        loaded(tiny.ids(1, 65), torch.ones(1, 65, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("BertModel", ["last_hidden_state", "pooler_output"]),
        ("BertForTokenClassification", ["logits"]),
        ("BertForQuestionAnswering", ["start_logits", "end_logits"]),
    ],
)
def test_embeddings_classes_of_tokens_and_spans_come_with_segments_and_masks(
    portable: Callable[..., LoadedModel], kind: str, outputs: list[str]
) -> None:
    model, ids = tiny.bert(kind=kind), tiny.ids(3, 11)
    inputs = {"input_ids": ids, "token_type_ids": (ids > 50).long(), "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 4:] = 0
    found = portable(model, {name: tensor[:2, :7] for name, tensor in inputs.items()})(**inputs)
    expected = model(**inputs)
    assert list(found) == outputs
    for name in outputs:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    other = model(**inputs | {"token_type_ids": torch.zeros_like(ids)})
    assert not torch.allclose(other[outputs[0]], expected[outputs[0]], atol=1e-2)


@torch.no_grad()
def test_without_a_mask_nothing_is_padding_and_a_mask_of_ones_says_no_more(tmp_path: Path) -> None:
    model, ids, ones = tiny.bert(), tiny.ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    loaded = {}
    for name, example in {"masked": {"input_ids": ids, "attention_mask": ones}, "plain": {"input_ids": ids}}.items():
        export_model(model, tmp_path / name, example_inputs=example, engines=("portable",), measure=False)
        loaded[name] = load(tmp_path / name)
    padded = ones.clone()
    padded[0, 4:] = 0
    expected = model(ids).logits
    for output in (loaded["masked"](ids), loaded["masked"](input_ids=ids, attention_mask=None)):
        assert torch.allclose(output.logits, expected, atol=1e-5)
    assert torch.allclose(loaded["masked"](ids, padded).logits, model(ids, attention_mask=padded).logits, atol=1e-5)
    for mask in (ones, ones.bool(), None):
        assert torch.allclose(loaded["plain"](ids, attention_mask=mask).logits, expected, atol=1e-5)
    for mask in (padded, ones[:2]):
        with pytest.raises(ValueError, match=r"exported without attention_mask.*example_inputs={'input_ids': ids"):
            loaded["plain"](ids, attention_mask=mask)
    for model in loaded.values():
        with pytest.raises(ValueError, match="input 'input_ids' is missing"):
            model(attention_mask=ones)
    with pytest.raises(ValueError, match=r"'input_ids' is a list; write torch\.tensor"):
        loaded["masked"](input_ids=[[1, 2]])


def test_a_mask_of_unknown_meaning_is_not_filled_in(portable: Callable[..., LoadedModel]) -> None:
    class Masked(nn.Module):
        """As in torch's own layers, 1 says that a key is masked."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table(input_ids) * ~attention_mask[..., None]

    ids = torch.arange(6)[None]
    ours = portable(Masked(), {"input_ids": ids, "attention_mask": ids > 3})
    with pytest.raises(ValueError, match="input 'attention_mask' is missing"):
        ours(ids)


@torch.no_grad()
@pytest.mark.parametrize("mask", [True, False])
def test_positions_that_the_model_counts_itself_end_with_their_table(
    portable: Callable[..., LoadedModel], mask: bool
) -> None:
    """RoBERTa's first position is that after its padding's; torch.export sees no bound there."""
    config = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "max_position_embeddings": 34, "pad_token_id": 1}
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**config)).eval()
    ids = torch.randint(3, 50, (2, 32), generator=torch.Generator().manual_seed(0))
    named = [{"input_ids": x} | ({"attention_mask": torch.ones_like(x)} if mask else {}) for x in (ids[:, :7], ids)]
    loaded = portable(model, named[0] | {"input_ids": named[0]["input_ids"].clone().fill_(1)})  # all padding
    with torch.no_grad():
        assert torch.allclose(loaded(**named[1])["logits"], model(**named[1]).logits, atol=1e-5)
    longer = {name: torch.cat((x, x[:, :1]), 1) for name, x in named[1].items()}
    with pytest.raises(ValueError, match=r"length.* 33"), torch.no_grad():
        loaded(**longer)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(**longer)


def test_a_table_beside_an_input_without_dimensions(portable: Callable[..., LoadedModel]) -> None:
    table = nn.Embedding(20, 8)
    model = Call(lambda linear, ids, scale: linear(table(ids)) * scale)
    model.table = table
    loaded = portable(model, {"x": torch.arange(6)[None], "scale": torch.tensor(2.0)})
    with torch.no_grad():
        expected = model(torch.arange(9)[None], torch.tensor(2.0))
    assert torch.allclose(loaded(torch.arange(9)[None], torch.tensor(2.0)), expected, atol=1e-6)


def test_a_table_of_distances_that_ends_is_no_bound(portable: Callable[..., LoadedModel]) -> None:
    config = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**config, relative_attention_num_buckets=8)).eval()
    loaded = portable(model, {"input_ids": torch.arange(4)[None]})
    long = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = loaded(input_ids=long), model(long).last_hidden_state
    assert torch.allclose(found["last_hidden_state"], expected, atol=1e-5)


def test_a_convolutional_network(portable: Callable[..., LoadedModel]) -> None:
    model, x = tiny.convnet(), torch.randn(5, 3, 8, 8)
    assert torch.allclose(portable(model, (x[:2],))(x), model(x), atol=1e-6)


@torch.no_grad()
def test_a_module_with_two_names_and_a_tied_weight(portable: Callable[..., LoadedModel]) -> None:
    """torch's functional_call leaves a module that has two names with the tensors that it put into it."""
    twice, first, second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
    second.weight = first.weight
    model, x = nn.Sequential(twice, nn.GELU(), twice, first, nn.GELU(), second).eval(), torch.randn(5, 8)
    before = model(x)
    loaded = portable(model, (x[:2],))
    assert torch.allclose(loaded(x), before, atol=1e-6) and torch.equal(model(x), before)
    weights = artifact.load_weights(loaded.directory / "weights.safetensors")
    assert sorted(tensor.numel() for tensor in weights.values()) == [8, 8, 64, 64]


def test_inputs_that_share_a_batch_must_share_it_in_every_call(portable: Callable[..., LoadedModel]) -> None:
    """torch.export sees no relation here, because one row could be broadcast; a compiled program reads past its end."""
    loaded = portable(Call(lambda linear, x, y: linear(x) * y), (torch.randn(3, 8), torch.randn(3, 4)))
    assert loaded(torch.randn(5, 8), torch.randn(5, 4)).shape == (5, 4)
    with pytest.raises(ValueError, match="batch 2, another input has 5"):
        loaded(torch.randn(5, 8), torch.randn(2, 4))


def test_a_first_dimension_that_is_no_batch_keeps_its_size(portable: Callable[..., LoadedModel]) -> None:
    loaded = portable(Call(lambda linear, x, table: linear(x) + table), (torch.randn(3, 8), torch.randn(1, 4)))
    assert list(shapes(loaded).values()) == [["batch", 8], [1, 4]]
    assert loaded(torch.randn(6, 8), torch.randn(1, 4)).shape == (6, 4)


def test_an_example_that_is_a_view_limits_nothing(portable: Callable[..., LoadedModel]) -> None:
    model, whole = Call(lambda linear, x: linear(x) / (x[:, :1] - 1.0)), torch.randn(6, 16)
    loaded, x = portable(model, (whole[:3, ::2],)), torch.randn(20, 8)
    assert torch.equal(loaded(x), model(x))


def test_a_model_made_for_one_row_keeps_it(portable: Callable[..., LoadedModel]) -> None:
    model, x = Call(lambda linear, x: linear(x).reshape(1, 4)), torch.randn(1, 8)
    loaded = portable(model, (x,))
    assert shapes(loaded) == {"x": [1, 8]} and torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"has shape \[2, 8\], expected \[1, 8\]"):
        loaded(torch.randn(2, 8))


class Third(nn.Module):
    """Reads the third token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[:, 2]


class Second(Third):
    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[:, 1]


@pytest.mark.parametrize(("model", "least"), [(Third(), 3), (Second(), 2)])
def test_a_size_that_the_model_needs_is_the_least_allowed(
    portable: Callable[..., LoadedModel], model: nn.Module, least: int
) -> None:
    loaded = portable(model, (torch.randint(0, 10, (2, 6)),))
    ids = torch.randint(0, 10, (1, least))
    assert torch.equal(loaded(ids), model(ids))
    with pytest.raises(ValueError, match=f"length {least - 1}, allowed is {least} to"):
        loaded(ids[:, 1:])


def test_dynamic_shapes_of_the_user_are_kept(portable: Callable[..., LoadedModel]) -> None:
    model, x = Call(lambda linear, x: linear(x).mean(1)), torch.randn(2, 5, 8)
    loaded = portable(model, (x,), dynamic_shapes={"x": {1: Dim("time", min=2, max=9)}})
    assert shapes(loaded) == {"x": [2, "length", 8]}
    y = torch.randn(2, 9, 8)
    assert torch.allclose(loaded(y), model(y), atol=1e-6)
    with pytest.raises(ValueError, match="length 10, allowed is 1 to 9"):
        loaded(torch.randn(2, 10, 8))


# --- inputs and outputs -----------------------------------------------------------------------------------------------


@dataclass
class Boxes(ModelOutput):
    scores: Tensor | None = None
    boxes: tuple[Tensor, Tensor] | None = None
    loss: Tensor | None = None


def test_named_and_nested_outputs_come_back_as_they_were(portable: Callable[..., LoadedModel]) -> None:
    def forward(linear: nn.Module, x: Tensor) -> Boxes:
        y = linear(x)
        return Boxes(scores=y, boxes=(y.relu(), -y))

    model = Call(forward)
    ours, theirs = portable(model, (X,))(X), model(X)
    assert list(ours) == ["scores", "boxes"] and isinstance(ours["boxes"], tuple)
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.boxes[1], theirs.boxes[1])
    with pytest.raises(AttributeError, match="no output 'loss'; this model has scores, boxes"):
        _ = ours.loss


@dataclass
class Found:
    scores: Tensor
    parts: Any
    mask: Tensor | None = None


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


def test_dataclasses_come_back_by_name_and_named_tuples_as_such(
    portable: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    def forward(linear: nn.Module, x: Tensor) -> Found:
        y = linear(x)
        return Found(scores=y, parts=[Pair(y - 1, y + 1), Found(y * 2, None)])

    model = Call(forward)
    ours, theirs = portable(model, (X,))(X), model(X)
    assert list(ours) == ["scores", "parts"]
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.parts[1].scores, theirs.parts[1].scores)
    low, high = ours.parts[0]
    assert torch.equal(low, theirs.parts[0].low) and torch.equal(high, theirs.parts[0].high)
    assert ours.parts[0].high is high and isinstance(ours.parts[0], tuple)
    again = pickle.loads(pickle.dumps(ours.parts[0]))
    assert type(again) is type(ours.parts[0]) and torch.equal(again.low, low)
    assert problems(artifact.read_manifest(tmp_path / "a")) == []


def test_named_results_of_torch_keep_their_names(portable: Callable[..., LoadedModel]) -> None:
    model = Call(lambda linear, x: linear(x).topk(2))
    ours, theirs = portable(model, (X,))(X), model(X)
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.indices, theirs.indices)


@pytest.mark.parametrize(
    "build",
    [
        lambda y: (y, [y + 1, {"a": y - 1, "none": None}], None),
        lambda y: [y],
        lambda y: {"a": (y,), "b": y.argmax(-1)},
        lambda y: y,
    ],
    ids=["nested", "list", "dict", "tensor"],
)
def test_the_structure_of_outputs_is_kept(portable: Callable[..., LoadedModel], build: Any) -> None:
    model = Call(lambda linear, x: build(linear(x)))
    ours, theirs = portable(model, (X,))(X), model(X)
    flat = [flatten_output(output) for output in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(flat[0][0], flat[1][0], strict=True))
    assert flat[0][1] == flat[1][1] and (type(ours) is type(theirs) or isinstance(theirs, dict))


def test_keyword_inputs_and_constants(portable: Callable[..., LoadedModel]) -> None:
    model = tiny.Residual(8)
    loaded = portable(model, {"x": X, "gain": torch.full((4, 8), 2.0)})
    x, gain = torch.randn(2, 8), torch.randn(2, 8)
    for output in (loaded(x, gain), loaded(gain=gain, x=x), loaded(x, gain=gain)):
        assert torch.allclose(output.logits, model(x, gain)["logits"], atol=1e-6)
    assert output.parts[1] is None


def test_an_input_that_is_no_tensor_is_as_in_the_example(portable: Callable[..., LoadedModel]) -> None:
    def forward(linear: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        return linear(x) * scale

    model = Call(forward)
    assert torch.equal(portable(model, {"x": X, "scale": 3.0})(X), model(X, scale=3.0))


def test_a_model_with_one_output_of_one_dimension(portable: Callable[..., LoadedModel]) -> None:
    model = Call(lambda linear, x: linear(x).sum(-1))
    quantized = quantize_model(model, QuantConfig("int8"))
    assert torch.equal(portable(model, (X,), quantize=QuantConfig("int8"))(X), quantized(X))


def test_the_callers_inputs_are_not_written_to(portable: Callable[..., LoadedModel]) -> None:
    model, x = Call(lambda linear, x: linear(F.relu_(x))), X.clone()
    loaded = portable(model, (x,))
    assert torch.equal(x, X), "nor by the export"
    assert torch.equal(loaded(x), model(X.clone())) and torch.equal(x, X)


# --- the model stays as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert])
def test_an_export_leaves_the_live_model_alone(portable: Callable[..., LoadedModel], make: Any) -> None:
    model = make().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes, cache = [m.training for m in model.modules()], getattr(model.config, "use_cache", None)
    attention, types = model.config._attn_implementation, [type(m) for m in model.modules()]
    portable(model, {"input_ids": tiny.ids()}, quantize=QuantConfig("int8"))
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [type(m) for m in model.modules()] == types
    assert (getattr(model.config, "use_cache", None), model.config._attn_implementation) == (cache, attention)
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- refusals ---------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.mean() > 0:  # the line to be named
            return y
        return -y


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = int((x[:, 0] > 0).sum().item())
        return self.linear(x[:rows])


def test_a_data_dependent_branch_is_refused_naming_the_line() -> None:
    line = r"test_capture\.py.*if y\.mean\(\) > 0"
    with pytest.raises(ValueError, match=rf"(?s)torch.export cannot capture.*{line}") as error:
        capture(Branching(), (X,))
    assert "torch.where" in str(error.value) and len(str(error.value).splitlines()) <= 8


def test_a_number_computed_from_a_tensor_is_refused_naming_the_line() -> None:
    with pytest.raises(ValueError, match=r"(?s)torch.export cannot capture.*rows = int\("):
        capture(Counting(), (X,))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 5),), r"rejects the example inputs \[\[2, 5\]\].*mat1 and mat2"),
        ((X, X), "rejects the example inputs"),
        ({"pixels": X}, "unexpected keyword argument 'pixels'"),
        ((), "rejects the example inputs"),
    ],
)
def test_example_inputs_that_the_model_rejects(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}.*give example_inputs=\(x,\)"):
        capture(tiny.mlp(), inputs)


@pytest.mark.parametrize("extra", [{"m": X}, [X], (1, {"deep": [X]}), [Held(X)]])
def test_tensors_within_an_input_are_refused_as_they_would_stay_those_of_the_example(extra: Any) -> None:
    model = Call(lambda linear, x, extra: linear(x) if isinstance(extra, int) else linear(x + X))
    with pytest.raises(ValueError, match=r"the input 'extra' is a \w+ with tensors in it.*takes each tensor by itself"):
        capture(model, {"x": X, "extra": extra})


def test_outputs_that_cannot_be_exported_are_named() -> None:
    with pytest.raises(ValueError, match="puts out a str; export tensors"):
        capture(Call(lambda linear, x: {"y": linear(x), "name": "a"}), (X,))
    with pytest.raises(ValueError, match="none of the outputs is a tensor"):
        capture(Call(lambda linear, x: None), (X,))
    with pytest.raises(ValueError, match="none of the example inputs is a tensor"):
        capture(Call(lambda linear, x: linear(torch.ones(2, 8) * x)), (2.0,))


# --- causal language models -------------------------------------------------------------------------------------------


def test_a_sliding_window_is_kept_beyond_its_length(portable: Callable[..., LoadedModel]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = tiny.llama().config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options = {k: config[k] for k in (*keys, "num_key_value_heads", "max_position_embeddings")}
    model = MistralForCausalLM(MistralConfig(**options, sliding_window=5)).eval()
    loaded, ids = portable(model, None, data=[{"input_ids": tiny.ids(2, 20)}]), tiny.ids(2, 30)
    with torch.no_grad():
        assert torch.allclose(loaded(ids), model(ids).logits, atol=1e-5)
        far = ids.clone()
        far[:, 0] = 5
        assert torch.allclose(loaded(far)[:, -1], loaded(ids)[:, -1], atol=1e-6), "two layers see 9 tokens back"


def test_a_language_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM keeps no keys and values"):
        capture(model, {"input_ids": tiny.ids()})


def test_attention_with_options_of_its_own_is_refused_by_name() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = tiny.llama().config
    sizes = {k: getattr(config, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    captured = capture(model, {"input_ids": tiny.ids()})["decoder"]
    with pytest.raises(ValueError, match="Gemma2Attention wants attention with softcap, which is not supported"):
        captured.export(captured.module)


def test_a_model_of_few_positions_is_captured(portable: Callable[..., LoadedModel]) -> None:
    model, ids = tiny.llama(max_position_embeddings=6), tiny.ids(2, 4)
    loaded = portable(model, None)
    with torch.no_grad():
        assert torch.allclose(loaded(ids), model(ids).logits, atol=1e-4)
    assert loaded.generate(ids, 3).shape == (2, 3)


# --- the compiled programs against the portable ones and the models ---------------------------------------------------


def spread(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


@pytest.mark.aoti
@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (5, 33), (1, 64)])
def test_compiled_fp32_logits_are_the_models(gpt2_fp32: Built, batch: int, length: int) -> None:
    ids = tiny.ids(batch, length, seed=batch)
    theirs, ours = gpt2_fp32.eager(ids).logits, gpt2_fp32.load()(ids)
    assert spread(ours - theirs) <= 1e-5 * spread(theirs)


@pytest.mark.aoti
@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (5, 33), (1, 64)])
def test_compiled_int8_logits_are_those_trained(llama_int8: Built, batch: int, length: int) -> None:
    ids, plain = tiny.ids(batch, length, seed=batch), unprepare_(copy.deepcopy(llama_int8.eager)).eval()
    theirs, ours, portable = (
        llama_int8.eager.eval()(ids).logits,
        llama_int8.load()(ids),
        llama_int8.load("portable")(ids),
    )
    allowed = KL_FRACTION**0.5 * spread(theirs - plain(ids).logits)  # a share of quantization's own error
    assert spread(ours - theirs) <= allowed and spread(ours - portable) <= allowed


@pytest.mark.aoti
@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 12), (4, 7), (1, 64)])
def test_a_compiled_classifier_at_every_size(bert_int8: Built, batch: int, length: int) -> None:
    ids, mask = tiny.ids(batch, length), torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 + 1 :] = 0
    plain = bert_int8.eager(ids, attention_mask=mask).logits
    eager = quantize_model(bert_int8.eager, QuantConfig("int8"))(ids, attention_mask=mask).logits
    ours, portable = bert_int8.load()(ids, mask), bert_int8.load("portable")(ids, mask)
    assert torch.equal(portable.logits, eager)
    assert spread(ours.logits - eager) <= KL_FRACTION**0.5 * spread(eager - plain)
    with pytest.raises(ValueError, match="another input has"):
        bert_int8.load()(torch.cat([ids, ids]), mask)


@pytest.mark.aoti
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_compiled_residuals_do_not_overwrite_the_callers_inputs(residual_fp32: Built, batch: int) -> None:
    image, x = torch.randn(batch, 3, 8, 8), torch.randn(batch, 16)
    copies = image.clone(), x.clone()
    ours, theirs = residual_fp32.load()(image, x), residual_fp32.eager(*copies)
    assert torch.equal(image, copies[0]) and torch.equal(x, copies[1])
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1].logits, theirs[1]["logits"], atol=1e-5)
    assert torch.allclose(ours[1].parts[0], theirs[1]["parts"][0], atol=1e-5) and ours[1].parts[1] is None
    transposed = torch.randn(16, batch).t()
    ours, theirs = residual_fp32.load()(image, transposed), residual_fp32.eager(image, transposed)
    assert torch.allclose(ours[1].logits, theirs[1]["logits"], atol=1e-5)


@pytest.mark.aoti
@torch.no_grad()
def test_a_compiled_program_replaced_in_one_process_is_the_new_one_and_the_loaded_one_stays(
    residual_fp32: Built, tmp_path: Path
) -> None:
    directory = tmp_path / "artifact"
    shutil.copytree(residual_fp32.directory, directory)
    image, x = torch.randn(4, 3, 8, 8), torch.randn(4, 16)
    old, model = load(directory), copy.deepcopy(residual_fp32.eager)
    before = old(image, x)[0]
    for parameter in model.parameters():
        parameter.add_(0.1)
    export_model(model, directory, example_inputs={"image": image, "x": x}, engines=("aoti",), measure=False)
    assert torch.allclose(load(directory)(image, x)[0], model(image, x)[0], atol=1e-5)
    assert torch.equal(old(image, x)[0], before) and not torch.allclose(before, model(image, x)[0], atol=1e-2)


@pytest.mark.aoti
def test_a_constant_of_another_dtype_than_the_library_takes_is_refused(int8_layers: Built, altered: Any) -> None:
    directory = altered(int8_layers.directory)
    tensors = artifact.load_weights(directory / artifact.WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    artifact.save_weights({**tensors, name: tensors[name].view(torch.uint8)}, tmp := directory / "new")
    tmp.rename(directory / artifact.WEIGHTS)  # the old file is still mapped
    manifest = artifact.read_manifest(directory)
    manifest["weights"]["sha256"] = artifact.sha256(directory / artifact.WEIGHTS)
    artifact.write_manifest(directory, manifest)
    with pytest.raises(ArtifactError, match=rf"{name} is stored as torch.uint8, .*aoti.so takes torch.int8"):
        load(directory, engine="aoti")


@pytest.mark.aoti
def test_compiled_int8_layers_are_the_same_on_one_thread_and_two(int8_layers: Built) -> None:
    ids, x = torch.randint(0, 37, (16, 40)), torch.randn(700, 5, 12)
    loaded, before, outputs = int8_layers.load(), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(loaded(ids, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


@pytest.mark.aoti
def test_threads_that_call_a_compiled_program_at_once_take_turns(int8_layers: Built) -> None:
    loaded = int8_layers.load()
    inputs = [(torch.randint(0, 37, (n + 1, 9)), torch.randn(40 * n + 1, 5, 12)) for n in range(4)]
    alone = [loaded(*i) for i in inputs]
    wrong: list[tuple[int, str]] = []

    def call(n: int) -> None:
        for _ in range(20):
            output = loaded(*inputs[n])
            wrong.extend((n, name) for name in output if not torch.equal(output[name], alone[n][name]))

    workers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
