"""What an export is given: padding is not compared, batches and example inputs are not written to."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from lightning_accel import DriftError, QuantConfig, artifact, export_model, load
from lightning_accel.verify import verify, verify_artifact

PORTABLE = {"engines": ("portable",), "measure": False}


def padded(side: str) -> dict[str, torch.Tensor]:
    """Three rows of twelve tokens, one of them with five of padding, as a collate function gives them."""
    ids, mask = tiny.ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if side == "left" else mask, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("make", "side", "quantize"),
    [
        (tiny.llama, "right", QuantConfig("int8")),
        (tiny.llama, "left", None),
        (tiny.gpt2, "right", None),
    ],
)
def test_padded_batches_are_compared_where_there_are_tokens(tmp_path, make, side, quantize):
    batch = padded(side)
    report = export_model(make(), tmp_path / "a", example_inputs=batch, data=[batch], quantize=quantize, **PORTABLE)
    figures = report.manifest["programs"][0]["verification"]
    assert figures["positions"] == 31
    assert figures["error_trained"] < (1e-5 if quantize is None else 0.5 * figures["error_plain"])
    assert len(verify_artifact(tmp_path / "a")) == 2


def test_an_error_at_a_token_is_found_beside_padding_and_one_at_padding_is_not():
    torch.manual_seed(0)
    batch, right = padded("right"), torch.randn(3, 12, 7)
    at_padding, at_token = right.clone(), right.clone()
    at_padding[1, -1] += 1.0
    at_token[1, 0] += 1.0
    assert verify([batch], lambda x: at_padding, lambda x: right, None, "tried").error_trained == 0.0
    with pytest.raises(DriftError, match=r"the tried program drifted: relative error 0\.1"):
        verify([batch], lambda x: at_token, lambda x: right, None, "tried")


class InPlace(nn.Module):
    """Begins with operations that write to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu_(x))


@pytest.mark.parametrize("quantize", [None, QuantConfig("int8")], ids=["float", "int8"])
def test_example_inputs_and_batches_are_not_written_to(tmp_path, quantize):
    torch.manual_seed(0)
    x, batch = torch.randn(4, 8), torch.randn(6, 8)
    kept = x.clone(), batch.clone()
    export_model(InPlace(), tmp_path / "a", example_inputs=(x,), data=[batch], quantize=quantize, **PORTABLE)
    assert torch.equal(x, kept[0]) and torch.equal(batch, kept[1])
    golden = artifact.load_weights(tmp_path / "a" / "golden.safetensors")
    assert torch.equal(golden["input.x"], x)


def test_a_batch_size_that_cannot_vary_is_exported_as_it_is(tmp_path):
    model = tiny.mlp()
    export_model(model, tmp_path / "a", example_inputs=(torch.randn(3, 8),), dynamic_shapes=(None,), **PORTABLE)
    loaded, x = load(tmp_path / "a"), torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"input '\w+' has shape \[2, 8\], expected \[3, 8\]"):
        loaded(x[:2])


def test_inputs_of_a_module_with_open_arguments_are_numbered(tmp_path):
    class Sum(nn.Module):
        def forward(self, *parts: torch.Tensor) -> torch.Tensor:
            return parts[0] + 2.0 * parts[1]

    export_model(Sum(), tmp_path / "a", example_inputs=(torch.randn(4, 3), torch.randn(4, 3)), **PORTABLE)
    loaded, a, b = load(tmp_path / "a"), torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(loaded(a, input_1=b), a + 2.0 * b)
    assert len(verify_artifact(tmp_path / "a")) == 2


def test_a_metric_that_is_nan_for_the_artifact_is_drift(tmp_path):
    def metric(model, batches) -> float:
        return 1.0 if isinstance(model, nn.Module) else float("nan")

    with pytest.raises(DriftError, match=r"metric of the artifact is nan, of the trained model 1\.0000"):
        export_model(
            tiny.mlp(), tmp_path / "a", example_inputs=(torch.randn(3, 8),), data=[torch.randn(3, 8)], metric=metric,
            **PORTABLE,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_complex_weights_are_exported(tmp_path):
    class Rotate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.turn).flatten(-2)

    model, x = Rotate(), torch.randn(5, 8)
    export_model(model, tmp_path / "a", example_inputs=(x,), **PORTABLE)
    assert torch.equal(load(tmp_path / "a")(x), model(x))


def test_verify_runs_a_model_with_several_named_outputs_again(network, altered):
    directory = altered(network)
    golden = {n: t.clone() for n, t in artifact.load_weights(directory / "golden.safetensors").items()}
    assert set(golden) == {"input.x", "input.gain", "output.0", "output.1"}
    golden["output.0"][0, 0] += 1.0
    artifact.save_weights(golden, directory / "golden.safetensors")
    manifest = artifact.read_manifest(directory)
    manifest["golden"]["sha256"] = artifact.sha256(directory / "golden.safetensors")
    artifact.write_manifest(directory, manifest)
    with pytest.raises(DriftError, match="the portable program drifted"):
        verify_artifact(directory)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_id_that_no_row_of_the_table_has_is_refused_by_name(tmp_path, wrong):
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.kinds = nn.Embedding(11, 4), nn.Embedding(3, 4)

        def forward(self, ids: torch.Tensor, kinds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            return self.table(ids) + self.kinds(kinds) + counts[..., None]

    inputs = {"ids": tiny.ids(2, 5) % 11, "kinds": tiny.ids(2, 5) % 3, "counts": tiny.ids(2, 5)}
    export_model(Lookup(), tmp_path / "a", example_inputs=inputs, **PORTABLE, quantize=QuantConfig("int8"))
    model = load(tmp_path / "a")
    assert [i.get("below") for i in model.entry["inputs"]] == [11, 3, None]
    model(**{**inputs, "counts": inputs["counts"] * 1000 - 7})
    with pytest.raises(ValueError, match=rf"input 'ids' holds {wrong}, allowed is 0 to 10: rows of an embedding"):
        model(**{**inputs, "ids": torch.full((2, 5), wrong)})
    with pytest.raises(ValueError, match="input 'kinds' holds 3, allowed is 0 to 2"):
        model(**{**inputs, "kinds": torch.full((2, 5), 3)})


def test_a_cache_among_the_outputs_is_left_out(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    ids = tiny.ids(3, 9) % 36 + 1
    export_model(model, tmp_path / "a", example_inputs={"input_ids": ids}, **PORTABLE)
    output = load(tmp_path / "a")(input_ids=ids)
    assert list(output) == ["logits"]
    assert torch.allclose(output[0], model(input_ids=ids).logits, atol=1e-5) and model.config.use_cache


def test_portable_programs_load_in_several_threads_at_once(tmp_path, network):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(network), range(8)))
    x, gain = torch.randn(4, 16), torch.rand(4, 16)
    assert all(torch.equal(m(x, gain)[0], models[0](x, gain)[0]) for m in models)


def test_the_quality_of_the_unpruned_model_stands_beside_the_pruned_ones(tmp_path):
    from lightning_accel import PruneConfig, prune_model_

    def size(model, batches) -> float:
        return float(model(batches[0]).abs().mean())

    model, x = tiny.mlp(), torch.randn(16, 8)
    masks = prune_model_(tiny.mlp(), PruneConfig("neurons", 0.75), example_inputs=(x,))
    report = export_model(model, tmp_path / "a", example_inputs=(x,), masks=masks, data=[x], metric=size, **PORTABLE)
    rows = {m["name"]: m["value"] for m in report.manifest["metrics"]}
    assert list(rows) == ["size (float, unpruned)", "size (float, pruned)", "size (trained)", "size (artifact)"]
    assert rows["size (float, unpruned)"] == pytest.approx(size(model, [x]))
    assert rows["size (float, pruned)"] == pytest.approx(rows["size (artifact)"], rel=1e-5)
    assert rows["size (float, pruned)"] != pytest.approx(rows["size (float, unpruned)"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, r"write QuantConfig\('int8'\)"),
        ({"metric": lambda model, batches: None, "data": [torch.randn(2, 8)]}, "gave a NoneType, expected a float"),
    ],
)
def test_plausible_wrong_options_say_what_to_write(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_model(tiny.mlp(), tmp_path / "a", example_inputs=(torch.randn(2, 8),), **PORTABLE, **options)


def test_a_nan_in_a_buffer_and_a_plain_state_dict_are_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].running_mean[2] = float("nan")
    with pytest.raises(ValueError, match=r"the buffer 1\.running_mean holds NaN"):
        export_model(model, tmp_path / "a", example_inputs=(torch.randn(2, 8),), **PORTABLE)
    torch.save(tiny.mlp().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is no Lightning checkpoint"):
        export_model(
            tiny.mlp(), tmp_path / "a", example_inputs=(torch.randn(2, 8),), checkpoint=tmp_path / "weights.pt",
            **PORTABLE,
        )  # fmt: skip
