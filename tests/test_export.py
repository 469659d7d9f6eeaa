"""Exports as a whole: drift is caught, the last good artifact stays, sizes and speeds are said as they are."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compiled import Built
from torch import Tensor, nn

from lightning_accel import (
    DriftError,
    ExportError,
    PruneConfig,
    QuantConfig,
    artifact,
    build,
    engines,
    export_model,
    load,
    prepare_,
    prune_model_,
)
from lightning_accel.engines import aoti, portable
from lightning_accel.finalize import finalize
from lightning_accel.loaded import LoadedModel
from lightning_accel.quantize import unprepare_
from lightning_accel.select import count_flops
from lightning_accel.verify import verify, verify_artifact

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
INT8 = QuantConfig("int8")


def export(model: nn.Module, directory: Path, **options: Any) -> Any:
    defaults = {"example_inputs": (X[:4],), "data": [X], "engines": ("portable",), "measure": False}
    return export_model(model, directory, **(defaults | options))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def corrupt(weight: Tensor) -> Tensor:
    """The weight with its first tile of 16 channels by 4 inputs turned around."""
    damaged = weight.clone()
    damaged.view(-1)[:64].copy_(-weight.view(-1)[:64]) if weight.dim() == 4 else damaged[:16, :4].neg_()
    return damaged


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


# --- drift ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, INT8], ids=["float", "int8"])
def test_a_damaged_tile_of_weights_is_drift_and_the_last_good_artifact_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: QuantConfig | None
) -> None:
    export(tiny.mlp(), tmp_path / "a", quantize=quantize)
    good, save = files(tmp_path / "a"), artifact.save_weights

    def save_damaged(tensors: dict[str, Tensor], path: Path) -> None:
        name = next(n for n in tensors if n.endswith(("2.weight", "2.codes")) or path.name != artifact.WEIGHTS)
        save({**tensors, name: corrupt(tensors[name])} if path.name == artifact.WEIGHTS else tensors, path)

    monkeypatch.setattr(artifact, "save_weights", save_damaged)
    with pytest.raises(DriftError, match="the portable program drifted"):
        export(tiny.mlp(seed=1), tmp_path / "a", quantize=quantize)
    assert files(tmp_path / "a") == good and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.aoti
@pytest.mark.parametrize("name", ["llama_int8", "bert_int8"])
def test_a_damaged_tile_of_a_compiled_program_is_drift(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    built = request.getfixturevalue(name)
    directory = tmp_path / "damaged"
    shutil.copytree(built.directory, directory)
    tensors = {n: t.clone() for n, t in artifact.load_weights(directory / artifact.WEIGHTS).items()}
    layer = next(n for n in tensors if n.endswith(("layers.1.self_attn.v_proj.codes", "layer.1.output.dense.codes")))
    assert tensors[layer].dtype == torch.int8 and tensors[layer].dim() == 4
    tensors[layer] = corrupt(tensors[layer])
    artifact.save_weights(tensors, directory / artifact.WEIGHTS)
    manifest = manifest_of(directory)
    manifest["weights"]["sha256"] = artifact.sha256(directory / artifact.WEIGHTS)
    artifact.write_manifest(directory, manifest)
    inputs = [{"input_ids": tiny.ids(8, 20, seed=s)} for s in range(4)]
    if name == "bert_int8":
        inputs = [{**i, "attention_mask": torch.ones_like(i["input_ids"])} for i in inputs]
    trained, plain = copy.deepcopy(built.eager).eval(), unprepare_(copy.deepcopy(built.eager)).eval()
    if name == "bert_int8":
        prepare_(trained, INT8)
    good, bad = load(built.directory), load(directory)
    verify(inputs, lambda x: good(**x), lambda x: trained(**x), lambda x: plain(**x), "aoti")
    with pytest.raises(DriftError, match="aoti program"):
        verify(inputs, lambda x: bad(**x), lambda x: trained(**x), lambda x: plain(**x), "aoti")
    with pytest.raises(DriftError, match="aoti program drifted"):
        verify_artifact(directory)


def test_a_model_trained_to_nan_is_refused_by_name_and_the_last_good_artifact_stays(tmp_path: Path) -> None:
    export(tiny.mlp(), tmp_path / "a")
    good, model = files(tmp_path / "a"), tiny.mlp()
    with torch.no_grad():
        model[2].bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"2\.bias holds NaN or infinite values; the training diverged"):
        export(model, tmp_path / "a")
    assert files(tmp_path / "a") == good


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / (x[:, :1] - X[7, :1])


def test_a_program_that_puts_out_infinities_on_held_out_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DriftError, match="NaN or infinite values on held-out inputs"):
        export(Exploding(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- the task metric --------------------------------------------------------------------------------------------------


class Metric:
    """1.0 for modules, `1 + worse` for the artifact."""

    def __init__(self, worse: float, higher_is_better: bool = False) -> None:
        self.worse, self.higher_is_better = worse, higher_is_better
        self.__name__ = "score"

    def __call__(self, model: Any, batches: Any) -> float:
        assert model(batches[0]).shape == (64, 3)
        return 1.0 + self.worse if isinstance(model, LoadedModel) else 1.0


@pytest.mark.parametrize(("worse", "higher"), [(0.02, False), (-0.02, True), (float("nan"), False)])
def test_a_metric_more_than_a_percent_worse_is_drift(tmp_path: Path, worse: float, higher: bool) -> None:
    with pytest.raises(DriftError, match=r"score of the artifact is .*, of the trained model .*: more than 1% worse"):
        export(tiny.mlp(), tmp_path / "a", metric=Metric(worse, higher))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("worse", "higher"), [(0.009, False), (-0.009, True), (-0.5, False), (0.5, True)])
def test_a_metric_within_a_percent_or_better_is_written_beside_the_speed(
    tmp_path: Path, worse: float, higher: bool
) -> None:
    report = export(tiny.mlp(), tmp_path / "a", metric=Metric(worse, higher), quantize=INT8)
    rows = {m["name"]: (m["value"], m["direction"], m["n"]) for m in manifest_of(tmp_path / "a")["metrics"]}
    direction = "higher" if higher else "lower"
    assert rows == {
        "score (float)": (1.0, direction, 1),
        "score (trained)": (1.0, direction, 1),
        "score (artifact)": (1.0 + worse, direction, 1),
    }
    assert f"score (artifact): {1 + worse:.4f}" in str(report)


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model as an artifact."""
    directory = tmp_path_factory.mktemp("reference") / "float"
    export(tiny.mlp(), directory)
    return directory


def test_the_float_reference_is_reused_and_every_figure_is_written(tmp_path: Path, reference: Path) -> None:
    said: list[str] = []
    before = files(reference)
    report = export(tiny.mlp(), tmp_path / "a", quantize=INT8, measure=True, reference=reference, progress=said.append)
    assert said.count("building the portable program") == 1, "the artifact's own, not the reference"
    assert files(reference) == before
    manifest = manifest_of(tmp_path / "a")
    rows = {row["name"]: row for row in manifest["timings"]}
    assert set(rows) == {"artifact.forward", "float.forward"}
    assert all(row["seconds"] > 0 and row["spread"]["n"] == 15 and row["engine"] == "portable" for row in rows.values())
    ratio = rows["float.forward"]["seconds"] / rows["artifact.forward"]["seconds"]
    assert manifest["speedup"]["over_float_same_engine"] == {"forward": ratio} == report.speedup
    first = str(report).splitlines()[0]
    assert first.startswith("SLOWER than the float model") == (ratio < 1)


def test_a_language_model_is_timed_with_a_prompt_of_the_examples_length(tmp_path: Path) -> None:
    model = tiny.llama()
    example = {"input_ids": tiny.ids(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    export_model(model, tmp_path / "a", example_inputs=example, engines=("portable",))
    shapes = {row["name"]: row["shape"] for row in manifest_of(tmp_path / "a")["timings"]}
    assert shapes["artifact.prefill"] == shapes["float.prefill"] == "input_ids [1, 5]"


def test_too_little_speed_raises_and_the_last_good_artifact_stays(tmp_path: Path, reference: Path) -> None:
    export(tiny.mlp(), tmp_path / "a")
    good = files(tmp_path / "a")
    with pytest.raises(ExportError, match=r"not 1000000.0 x as fast as the float model: forward \d+\.\d+ x"):
        export(tiny.mlp(), tmp_path / "a", quantize=INT8, measure=True, reference=reference, min_speedup=1e6)
    assert files(tmp_path / "a") == good and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_tied_embedding_is_stored_once_in_one_byte_a_parameter(tmp_path: Path, make: Any) -> None:
    model = make()
    directory = tmp_path / "a"
    export(model, directory, example_inputs=None, data=None, quantize=INT8)
    weights = artifact.load_weights(directory / artifact.WEIGHTS)
    matrices = {id(p): p for p in model.parameters() if p.dim() == 2}.values()
    assert sum(t.numel() for t in weights.values() if t.dtype == torch.int8) == sum(p.numel() for p in matrices)
    floats = sum(t.nbytes for t in weights.values() if t.is_floating_point())
    names = [n for n, p in model.named_parameters() if p.dim() == 1]
    scales = sum(t.numel() for n, t in weights.items() if n.endswith(".scale"))
    buffers = sum(t.nbytes for n, t in weights.items() if n.endswith("inv_freq"))
    assert floats == 4 * (sum(model.get_parameter(n).numel() for n in names) + scales) + buffers
    header = (directory / artifact.WEIGHTS).stat().st_size - sum(t.nbytes for t in weights.values())
    assert 0 < header < 400 * len(weights)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4-weight", 4), ("int4-int8", 4)])
def test_an_artifact_is_as_small_as_its_bits(scheme: str, bits: int, tmp_path: Path) -> None:
    model = tiny.llama(vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    export_model(model, tmp_path / "a", example_inputs={"input_ids": tiny.ids()}, quantize=QuantConfig(scheme),
                 engines=("portable",), measure=False)  # fmt: skip
    weights = [p for p in model.parameters() if p.dim() == 2]  # a tied head once
    expected = sum(p.numel() * bits // 8 + (4 * len(p) if bits == 8 else 2 * p.numel() // 32) for p in weights)
    expected += sum(4 * p.numel() for p in model.parameters() if p.dim() == 1)
    assert expected < manifest_of(tmp_path / "a")["sizes"]["default_load_bytes"] <= 1.1 * expected


@pytest.mark.aoti
@pytest.mark.parametrize("name", ["llama_int8", "bert_int8", "gpt2_fp32", "residual_fp32"])
def test_sizes_of_a_compiled_artifact_are_those_of_the_files_that_it_reads(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    built: Built = request.getfixturevalue(name)
    sizes, manifest = manifest_of(built.directory)["sizes"], manifest_of(built.directory)
    default = manifest["programs"][0]
    assert default["engine"] == "aoti"
    needed = {"manifest.json", default["file"]} | ({"weights.safetensors"} if default["weights"] else set())
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in needed:
        shutil.copy(built.directory / file, alone)
    assert load(alone).engine == "aoti", "nothing else is read"
    assert sizes["default_load_bytes"] == sum((alone / file).stat().st_size for file in needed)
    others = {p.name for p in built.directory.iterdir()} - needed - {"golden.safetensors"}
    assert sizes["portable_bytes"] == sum((built.directory / file).stat().st_size for file in others)


@pytest.mark.aoti
def test_compiled_and_portable_share_one_copy_of_int8_weights(llama_int8: Built) -> None:
    weights = artifact.load_weights(llama_int8.directory / artifact.WEIGHTS)
    stored = sum(t.numel() for t in weights.values() if t.dtype == torch.int8)
    pruned = 3 * tiny.WIDTH * tiny.LAYERS * tiny.INNER // 2
    matrices = sum(p.numel() for p in tiny.llama().parameters() if p.dim() == 2) - pruned
    padding = (-tiny.VOCABULARY % 16) * tiny.WIDTH + tiny.LAYERS * 2 * (-tiny.INNER // 2 % 16) * tiny.WIDTH
    assert stored == matrices + padding, "tiles hold 16 rows"
    portable = (llama_int8.directory / "decoder.portable.pt2").stat().st_size
    assert portable < stored, "the portable program holds no weights"


# --- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.aoti
def test_the_manifest_says_what_was_pruned_and_what_share_of_the_work_is_int8(llama_int8: Built) -> None:
    pruning, quantization = manifest_of(llama_int8.directory)["coverage"]
    halved = {e["name"]: e["done"] for e in pruning["entries"] if e["done"]}
    assert len(halved) == 6 and set(halved.values()) == {"50.0% zero"}
    model = tiny.llama(intermediate_size=tiny.INNER // 2)
    flops = count_flops(model, (), {"input_ids": tiny.ids(2, 16)})
    attention = tiny.LAYERS * 4 * 2 * 16 * 16 * tiny.WIDTH
    assert quantization["share_of_flops"] == pytest.approx(1 - attention / flops[""], abs=1e-12)


def test_masks_from_training_are_cut_out_of_the_artifact(tmp_path: Path) -> None:
    model = tiny.mlp()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(X,))
    export(model, tmp_path / "a", masks=masks)
    weights = artifact.load_weights(tmp_path / "a" / artifact.WEIGHTS)
    assert sorted(list(t.shape) for t in weights.values()) == [[3], [3, 12], [12], [12], [12, 8], [12, 12]]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "a")(X), model(X), atol=1e-5)


# --- no compiler ------------------------------------------------------------------------------------------------------


def no_compiler(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    if how == "none found":
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    else:
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "/nowhere/g++")


@pytest.mark.parametrize("how", ["none found", "not there"])
def test_without_a_compiler_the_portable_program_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    no_compiler(monkeypatch, how)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler.*install.*the aoti program is left out"):
        export(tiny.mlp(), tmp_path / "a", engines=("aoti", "portable"))
    assert [p["engine"] for p in manifest_of(tmp_path / "a")["programs"]] == ["portable"]
    assert load(tmp_path / "a").engine == "portable"


def test_without_a_compiler_and_a_portable_program_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, "none found")
    with pytest.warns(UserWarning), pytest.raises(ExportError, match=r"write engines=\('portable',\)"):
        export(tiny.mlp(), tmp_path / "a", engines=("aoti",))
    assert not list(tmp_path.iterdir())


def test_auto_leaves_out_a_program_that_cannot_be_compiled_and_a_named_one_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(capture: Any, directory: Path, name: str) -> dict[str, Any]:
        (directory / "half.so").touch()
        raise RuntimeError("no lowering of this operator\nat length")

    monkeypatch.setattr(aoti, "build", fail)
    monkeypatch.setattr(engines, "not_installed", lambda name: None if name in engines.OWN else "not installed")
    with pytest.warns(UserWarning, match="the aoti program is left out: not built: RuntimeError: no lower") as said:
        report = export(tiny.mlp(), tmp_path / "a", engines="auto")
    assert said[0].filename == __file__
    assert [p["engine"] for p in report.manifest["programs"]] == ["portable"]
    assert "engine aoti: not built: RuntimeError: no lowering of this operator" in str(report)
    assert not (tmp_path / "a" / "half.so").exists() and load(tmp_path / "a").engine == "portable"
    with pytest.raises(RuntimeError, match="no lowering"):
        export(tiny.mlp(), tmp_path / "b", engines=("aoti", "portable"))
    monkeypatch.setattr(portable, "build", fail)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="no lowering"):
        export(tiny.mlp(), tmp_path / "b", engines="auto")
    assert not (tmp_path / "b").exists()


def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no space in the inn' >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ could not compile the kernels.*no space in the inn"):
        aoti._kernels(str(broken))


def test_kernels_are_compiled_once_for_the_same_sources_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, builds, build = tmp_path / "kernels", [], aoti._build_kernels
    sources.mkdir()
    (sources / "one.cpp").write_text("int one() { return 1; }")
    monkeypatch.setattr(aoti, "_KERNELS", sources)
    monkeypatch.setattr(aoti, "_build_kernels", lambda *arguments: (builds.append(arguments), build(*arguments)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    folders = [aoti._kernels(aoti._compiler(), flags) for flags in (None, None, ["-O1"], ["-O1"])]
    assert folders[0] == folders[1] != folders[2] == folders[3] and len(builds) == 2
    assert [file.name for file in folders[0].iterdir()] == [aoti._LIBRARY]
    (sources / "one.h").write_text("")
    assert aoti._kernels(aoti._compiler()) not in folders and len(builds) == 3
    (sources / "one.cpp").write_text("int one() { return }")
    for _ in range(2):  # what failed is not found as done
        with pytest.raises(RuntimeError, match="could not compile the kernels"):
            aoti._kernels(aoti._compiler())


def test_an_unknown_engine_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown engine 'tensorrt'; write one of "):
        export(tiny.mlp(), tmp_path / "a", engines=("tensorrt",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8)])
def test_a_bare_layer_is_exported_from_float_and_from_training(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x: Callable[[], Tensor] = lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))  # noqa: E731
    layer = nn.Linear(8, 4)
    export(layer, tmp_path / "a", example_inputs=(x(),), data=None, quantize=INT8)
    prepare_(layer, INT8)
    export(layer, tmp_path / "b", example_inputs=(x(),), data=None)
    assert torch.equal(load(tmp_path / "a")(x()), load(tmp_path / "b")(x()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_and_inputs_of_another_float_format_are_exported_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.mlp().to(dtype)
    export(model, tmp_path / "a", example_inputs=(X[:4].to(dtype),), data=[X.to(dtype)])
    assert torch.allclose(load(tmp_path / "a")(X), copy.deepcopy(model).float()(X), atol=1e-6)
    assert model[0].weight.dtype == dtype


# --- options, checks before anything is computed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": ("onyx",)}, "unknown engine 'onyx'"),
        ({"engines": "portable"}, r"engines='portable' is no list of engines; write engines=\('aoti', 'portable'\)"),
        ({"engines": ()}, "is no list of engines"),
        ({"min_speedup": 1.5}, "min_speedup=1.5 needs measure=True"),
        ({"assets": {"tokenizer.json": "absent.json"}}, "the asset 'tokenizer.json' is no file: absent.json"),
    ],
)
def test_options_that_cannot_work_are_refused_first(
    tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_accel.export.finalize", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=message):
        export(tiny.mlp(), tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


def test_a_reference_without_the_engine_is_refused_first(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(ValueError, match=r"has no aoti program to be compared with, only \['portable'\]"):
        export(tiny.mlp(), tmp_path / "a", engines=("aoti",), measure=True, reference=reference)


def test_the_engine_named_first_is_the_default_and_the_weights_are_in_the_compiled_programs_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiling(capture: Any, directory: Path, name: str) -> dict[str, Any]:
        (directory / f"{name}.aoti.so").write_bytes(b"")
        return {"file": f"{name}.aoti.so", "isa": [], "arch": "", "weights": {n: n for n in capture.weights()}}

    monkeypatch.setattr(aoti, "build", without_compiling)
    final = finalize(tiny.mlp(), (X[:4],), None, INT8)
    manifest = build.write(tmp_path, final, (X[:4],), None, ("portable", "aoti"), {}, lambda message: None)
    portable, compiled = manifest["programs"]
    assert (portable["engine"], compiled["engine"]) == ("portable", "aoti")
    assert compiled["layouts"] == {} and list(portable["layouts"].values()) == [[24, 8], [24, 24], [3, 24]]
    weights = artifact.load_weights(tmp_path / artifact.WEIGHTS)
    assert all(weights[n].dim() == 4 for n in compiled["weights"].values() if weights[n].dtype == torch.int8)


def test_a_program_that_decodes_wrongly_with_its_cache_is_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sequences are right, single tokens attend to a slot too few."""
    from lightning_accel import generate

    step = generate.Cache.step

    def forgetful(self: Any, ids: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
        if self.filled:
            self.mask_BS[:, -1] = False
        return step(self, ids, valid, wanted)

    monkeypatch.setattr(generate.Cache, "step", forgetful)
    data = [{"input_ids": tiny.ids(4, 12)}]
    with pytest.raises(DriftError, match=r"the portable \(with the cache\) program drifted"):
        export_model(tiny.llama(), tmp_path / "a", data=data, engines=("portable",), measure=False)


def test_a_causal_models_other_inputs_are_refused_not_dropped(tmp_path: Path) -> None:
    inputs = {"input_ids": tiny.ids(2, 8), "pixel_values": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(ValueError, match="its input 'pixel_values' would be lost"):
        export_model(tiny.llama(), tmp_path / "a", example_inputs=inputs, engines=("portable",), measure=False)


def test_golden_inputs_of_a_causal_model_are_two_short_rows(tmp_path: Path) -> None:
    inputs = {"input_ids": tiny.ids(6, 64)}
    model = tiny.llama(max_position_embeddings=128)
    export_model(model, tmp_path / "a", example_inputs=inputs, engines=("portable",), measure=False)
    golden = artifact.load_weights(tmp_path / "a" / "golden.safetensors")
    assert golden["input.input_ids"].shape == (2, 64)


def test_a_checkpoint_of_several_such_models_needs_the_name_of_one(tmp_path: Path) -> None:
    both = {f"{name}.{key}": value for name in ("ema", "model") for key, value in tiny.mlp().state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"holds the weights of several such models; give module='ema', or another of"):
        export(tiny.mlp(), tmp_path / "a", checkpoint=tmp_path / "last.ckpt")
    export(tiny.mlp(1), tmp_path / "a", checkpoint=tmp_path / "last.ckpt", module="model")
    assert torch.allclose(load(tmp_path / "a")(X), tiny.mlp()(X), atol=1e-6)


def test_a_checkpoint_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.mlp().state_dict(), "hyper_parameters": {"path": tmp_path}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain types"):
        export(tiny.mlp(), tmp_path / "a", checkpoint=tmp_path / "last.ckpt")


def test_slower_than_eager_is_said_first_too(tmp_path: Path) -> None:
    from lightning_accel.report import ExportReport

    export(tiny.mlp(), tmp_path / "a")
    report = ExportReport(tmp_path / "a", manifest_of(tmp_path / "a"), {"forward": 2.0}, {"forward": 0.5})
    assert str(report).startswith("SLOWER than the float model run eagerly on this machine: forward 2.00 x its time")


def test_a_weight_used_without_its_module_is_named_as_the_likely_cause_and_the_override_helps(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(50, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.linear(self.embedding(ids)), self.embedding.weight)

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 50, (8, 6))
    options: dict[str, Any] = {"example_inputs": (ids,), "engines": ("portable",), "measure": False}
    with pytest.raises(DriftError, match=r"drifted: .* uses the weight of a quantized module .* write overrides="):
        export_model(model, tmp_path / "a", quantize=QuantConfig("int8"), **options)
    export_model(model, tmp_path / "a", quantize=QuantConfig("int8", overrides={"embedding": None}), **options)
