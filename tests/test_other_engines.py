"""The engines that are extras: ONNX Runtime and OpenVINO compute what was trained, and are never taken unasked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_manifest import problems
from test_norms import Same
from test_seq2seq import MAKE
from torch import nn

from lightning_accel import QuantConfig, engines, export_model, load
from lightning_accel.artifact import ArtifactError, read_manifest, write_manifest
from lightning_accel.export import ExportReport
from lightning_accel.generate import Cache
from lightning_accel.loaded import LoadedModel
from lightning_accel.quantize.config import SCHEMES
from lightning_accel.race import ranking

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

ALL = ("portable", "onnx", "openvino")
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def wide_mlp() -> nn.Sequential:
    """Layers of 64 inputs: groups of 32 divide them, and OpenVINO shares one scale among those of a row."""
    return tiny.mlp(features=64, hidden=64, classes=16)


def export(model: nn.Module, path: Path, **options: Any) -> ExportReport:
    defaults: dict[str, Any] = {"engines": ALL, "measure": False}
    return export_model(model, path, **(defaults | options))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network in each scheme, through all of these engines."""
    found = {}
    for scheme in SCHEMES:
        found[scheme] = tmp_path_factory.mktemp(scheme) / "artifact"
        batches = list(X.split(8))
        export(wide_mlp(), found[scheme], example_inputs=(X[:4],), data=[X], quantize=QuantConfig(scheme),
               calibration=batches)  # fmt: skip
    return found


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("scheme", ["int8", "int4-weight"])
def test_a_quantized_network_has_the_outputs_of_the_portable_program(quantized, scheme, engine):
    portable, other = (load(quantized[scheme], engine=name) for name in ("portable", engine))
    assert error(other(X), portable(X)) < 1e-5, "not the same integers"


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_with_static_ranges_only_ties_are_rounded_otherwise(quantized, engine):
    # QuantizeLinear divides by the step, torch multiplies by its reciprocal: about one code of 100,000 differs
    portable, other = (load(quantized["int8-static"], engine=name)(X) for name in ("portable", engine))
    differ = (other - portable).norm(dim=1) > 1e-5 * portable.norm(dim=1)
    assert differ.float().mean() <= 0.05
    assert error(other, portable) < 5e-3


def test_onnx_runtime_is_told_of_a_cpu_without_vnni_or_refused_there(quantized, monkeypatch):
    here = load(quantized["int8"], engine="onnx")(X)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert error(load(quantized["int8"], engine="onnx")(X), here) < 1e-6
    with pytest.raises(ArtifactError, match="without VNNI its products of int8-static layers add in 16 bits"):
        load(quantized["int8-static"], engine="onnx")


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_4_bits_with_int8_activations_have_a_scale_a_block_in_place_of_one_a_row(quantized, engine):
    portable, other, weights = (
        load(quantized[scheme], engine=name)(X)
        for scheme, name in (("int4-int8", "portable"), ("int4-int8", engine), ("int4-weight", "portable"))
    )
    assert 1e-5 < error(other, portable) < 0.02
    assert error(other, weights) < 1.2 * error(portable, weights), "activations are rounded more coarsely"


FORKS = """
import os, sys, torch
from lightning_accel import load
x = torch.rand(1024, 512)
model = load(sys.argv[1], engine=sys.argv[2], threads=2)
expected = model(x).tolist()
child = os.fork()
if not child:
    found = [one(x).tolist() for one in (model, load(sys.argv[1], engine=sys.argv[2]))]
    os._exit(0 if found == [expected, expected] else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_forked_process_computes_the_same(tmp_path, engine):
    wide = tiny.mlp(features=512, hidden=512, classes=512)  # work for several threads
    export(wide, tmp_path / "m", example_inputs=(torch.rand(4, 512),), engines=(engine,))
    command = [sys.executable, "-c", FORKS, str(tmp_path / "m"), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr


def test_integers_are_stored_as_small_as_their_bits(quantized):
    parameters = sum(p.numel() for p in wide_mlp().parameters() if p.dim() > 1)

    def largest(scheme: str) -> tuple[int, int]:
        """Elements of integer weights, and their bytes."""
        graph = onnx.load(quantized[scheme] / "forward.onnx").graph
        kinds = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
        codes = [t for t in graph.initializer if t.data_type in kinds and len(t.dims) > 1]
        return sum(int(np.prod(t.dims)) for t in codes), sum(len(t.raw_data) for t in codes)

    for scheme in ("int8", "int8-static"):
        assert largest(scheme) == (parameters, parameters)
    assert largest("int4-weight") == (parameters // 2, parameters // 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_onnx_file_passes_the_checker_and_runs_in_plain_onnxruntime(quantized, scheme):
    file = quantized[scheme] / "forward.onnx"
    onnx.checker.check_model(str(file), full_check=scheme == "int8-static")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    (output,) = session.run(None, {name: X[:7].numpy()})
    assert error(torch.from_numpy(output), load(quantized[scheme], engine="onnx")(X[:7])) == 0.0


def test_an_input_may_have_the_name_of_an_operation(tmp_path):
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x, (1, 1)) * pad

    inputs = {"x": torch.randn(3, 4), "pad": torch.randn(3, 1)}
    export(Padded(), tmp_path / "a", example_inputs=inputs, engines=("portable", "onnx"))
    assert torch.equal(load(tmp_path / "a", engine="onnx")(**inputs), Padded()(**inputs))


def test_the_manifest_has_the_versions_of_the_engines_it_was_made_with(quantized):
    found = load(quantized["int8"]).manifest["versions"]
    assert found["onnxruntime"] == onnxruntime.__version__ and found["openvino"] == version("openvino")
    assert "gguf" not in found


def test_the_onnx_file_does_not_say_where_it_was_made(quantized):
    for file in quantized["int8"].glob("forward.*"):
        if file.suffix in (".onnx", ".xml"):
            assert str(Path(__file__).parent.parent).encode() not in file.read_bytes()


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_convolutions_with_static_ranges_have_the_outputs_of_the_portable_program(tmp_path, engine):
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"quantize": QuantConfig("int8-static"), "calibration": list(x.split(2)), "engines": ("portable", engine)}
    export(tiny.convnet(), tmp_path / "a", example_inputs=(x[:2],), data=[x], **options)
    portable, other = (load(tmp_path / "a", engine=name) for name in ("portable", engine))
    assert error(other(x), portable(x)) < 5e-3, "more than a few codes differ"
    assert other(x[:5]).shape == (5, 5)


class Groups(nn.Module):
    """A depthwise convolution, one in groups of several channels, and one that pads at one end, as TensorFlow does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = Same(3, 16, 3, stride=2)
        self.depthwise, self.groups = nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Conv2d(16, 8, 3, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(nn.functional.relu6(self.stem(x)))
        return self.head(self.groups(nn.functional.relu6(x)).mean((2, 3)))


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_convolutions_in_groups_and_with_uneven_padding_have_the_outputs_of_the_portable_program(tmp_path, engine):
    x = torch.rand(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    options = {"quantize": QuantConfig("int8-static"), "calibration": list(x.split(2)), "engines": ("portable", engine)}
    export(Groups().eval(), tmp_path / "a", example_inputs=(x[:2],), data=[x], **options)
    portable, other = (load(tmp_path / "a", engine=name) for name in ("portable", engine))
    assert error(other(x), portable(x)) < 5e-3, "more than a few codes differ"


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_language_model_writes_the_same_tokens_with_its_cache(tmp_path, engine):
    export(tiny.llama(), tmp_path / "a", data=[{"input_ids": tiny.ids(3, 20)}], engines=("portable", engine))
    portable, other = (load(tmp_path / "a", engine=name) for name in ("portable", engine))
    prompts = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8]]
    assert torch.equal(other.generate(prompts, 24, stop=()), portable.generate(prompts, 24, stop=()))
    cache = other.new_cache(capacity=40)
    first = other.generate([[5, 9, 3]], 5, stop=(), cache=cache)
    second = other.generate([[11, 4]], 6, stop=(), cache=cache)
    whole = torch.cat([torch.tensor([[5, 9, 3]]), first, torch.tensor([[11, 4]])], 1)
    assert torch.equal(second, portable.generate(whole, 6, stop=()))


@pytest.mark.parametrize(("scheme", "kind", "bytes_"), [("int8", "INT8", 1), ("int4-weight", "UINT8", 0.5)])
def test_a_quantized_tied_head_is_stored_once_and_gives_the_same_tokens(tmp_path, scheme, kind, bytes_):
    data = [{"input_ids": tiny.ids(4, 24)}]
    export(tiny.gpt2(), tmp_path / "a", data=data, quantize=QuantConfig(scheme), engines=("portable", "onnx"))
    portable, other = (load(tmp_path / "a", engine=name) for name in ("portable", "onnx"))
    ids = tiny.ids(2, 12)
    assert error(other(ids), portable(ids)) < 1e-5
    assert torch.equal(other.generate(ids, 20, stop=()), portable.generate(ids, 20, stop=()))
    table, kind = tiny.VOCABULARY * tiny.WIDTH * bytes_, getattr(onnx.TensorProto, kind)
    graph = onnx.load(tmp_path / "a" / "decoder.onnx").graph
    assert sum(t.data_type == kind and int(np.prod(t.dims)) == table for t in graph.initializer) == 1


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_an_encoder_decoder_model_gives_the_same_answers(tmp_path, engine):
    torch.manual_seed(0)
    model = MAKE["t5"]().eval()
    inputs = {"input_ids": torch.randint(3, 97, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.int64)}
    export(model, tmp_path / "a", example_inputs=inputs, engines=("portable", engine))
    portable, other = (load(tmp_path / "a", engine=name) for name in ("portable", engine))
    for beams in (1, 3):
        answers = [m.generate(**inputs, max_new_tokens=12, stop=(), num_beams=beams) for m in (portable, other)]
        assert torch.equal(*answers)


# --- decoders of OpenVINO, whose cache is a state ---------------------------------------------------------------------

DECODERS = {
    "gpt2": (tiny.gpt2, {}, None),
    "llama": (tiny.llama, {}, None),
    "int8": (tiny.llama, {"intermediate_size": tiny.WIDTH}, "int8"),
}
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8]]


@pytest.fixture(scope="module", params=DECODERS)
def decoders(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """A portable and an OpenVINO program; of int8 with all layers of 32 inputs, so that they round alike."""
    path = tmp_path_factory.mktemp(request.param) / "artifact"
    make, shape, scheme = DECODERS[request.param]
    options = {"quantize": QuantConfig(scheme)} if scheme else {}
    export(make(**shape), path, data=[{"input_ids": tiny.ids(3, 20)}], engines=("portable", "openvino"), **options)
    return load(path, engine="portable"), load(path, engine="openvino")


def slots(cache: Cache) -> set[int]:
    """How many slots the states hold."""
    return {variable.state.shape[2] for variable in cache.state._request.query_state()}


def test_the_plugin_computes_attention_and_cache_in_one_node_for_each_layer(decoders):
    compiled = decoders[1]._run._compiled
    assert [port.any_name for port in compiled.inputs] == ["input_ids", "position_ids", "mask", "wanted", "rows"]
    assert [port.any_name for port in compiled.outputs] == ["logits"]
    kinds = Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())
    assert kinds["ScaledDotProductAttention"] == tiny.LAYERS
    assert kinds["MemoryInput"] == kinds["MemoryOutput"] == 2 * tiny.LAYERS
    assert kinds["Softmax"] == 0
    assert compiled.get_property("KV_CACHE_PRECISION").to_string() == "f32"


def test_a_state_gives_the_tokens_of_a_cache_among_the_inputs(decoders):
    portable, other = decoders
    for prompt in (PROMPTS, PROMPTS[:1]):
        assert torch.equal(other.generate(prompt, 40, stop=()), portable.generate(prompt, 40, stop=()))
    ids = tiny.ids(3, 30)
    assert error(other(ids), portable(ids)) < 1e-5
    for capacity in (43, tiny.POSITIONS):
        cache = other.new_cache(capacity, batch=3)
        assert torch.equal(other.generate(ids, 14, stop=(), cache=cache), portable.generate(ids, 14, stop=()))
    with pytest.raises(ValueError, match=r"the cache holds 8 tokens and has 0; 9 more do not fit"):
        other.generate(tiny.ids(1, 5), 5, cache=other.new_cache(8))


def test_a_conversation_reads_what_is_new_and_goes_back_where_it_is_told(decoders):
    other, answers = decoders[1], []
    for model in decoders:
        cache = model.new_cache(capacity=60)
        answers.append([model.generate([[5, 9, 3]], 5, stop=(), cache=cache)])
        answers[-1].append(model.generate([[11, 4]], 6, stop=(), cache=cache))
        assert cache.filled == 15
        if model is other:
            assert slots(cache) == {15}
        cache.keep(6)
        if model is other:
            assert slots(cache) == {6}
        answers[-1].append(model.generate([[2, 4]], 20, stop=(), cache=cache))
        cache.keep(0)
        answers[-1].append(model.generate([[5, 9, 3]], 5, stop=(), cache=cache))
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(answers[1][0], answers[1][3]), "what was forgotten is still there"


def test_rows_of_a_state_are_put_in_another_order(decoders):
    ids, order = tiny.ids(3, 9), torch.tensor([2, 0, 0])
    logits = []
    for model in decoders:
        cache, valid = model.new_cache(20, batch=3), torch.ones(3, 9, dtype=torch.bool)
        cache.step(ids, valid, torch.full((3, 1), 8))
        cache.reorder(torch.tensor([1, 2, 0]))
        cache.reorder(order)
        logits.append(cache.step(ids[:, :1], valid[:, :1], torch.zeros(3, 1, dtype=torch.int64)))
        cache.keep(9)  # after a reordering
        logits.append(cache.step(ids[:, 1:3], valid[:, :2], torch.ones(3, 1, dtype=torch.int64)))
    assert error(logits[2], logits[0]) < 1e-5 and error(logits[3], logits[1]) < 1e-5
    assert error(logits[2][:1], logits[2][1:2]) > 0.01, "the rows are alike"


def test_callers_of_a_stateful_program_do_not_see_each_other(decoders):
    _, model = decoders
    prompts = [tiny.ids(1 + n, 4 + n, seed=n) for n in range(3)]
    alone = [model.generate(prompt, 12, stop=()) for prompt in prompts]
    next(model.generate(prompts[2], 12, stop=(), stream=True))  # and is abandoned
    streams = [model.generate(prompt, 12, stop=(), stream=True) for prompt in prompts]
    for index, row in enumerate(zip(*streams, strict=True)):
        assert all(torch.equal(tokens, whole[:, index]) for tokens, whole in zip(row, alone, strict=True))
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, 12, stop=()), prompts * 3))
    assert all(torch.equal(*pair) for pair in zip(together, alone * 3, strict=True))


def test_a_decoder_without_a_state_and_another_graph_of_the_cache_are_refused(quantized):
    import openvino
    from openvino import opset13

    engine, entry = engines.get("openvino"), {"cache": {"shapes": [[2, 8]]}, "options": {"activation_group": 0}}
    with pytest.raises(ValueError, match="its cache is no state, as in earlier versions"):
        engine.open(quantized["int8"] / "forward.xml", entry, {})
    ids, cache = opset13.parameter([-1, -1], np.int64), opset13.parameter([-1, -1, 2, 8], np.float32)
    new = opset13.relu(cache)
    cache.set_friendly_name("cache.0")
    for node, name in ((ids, "input_ids"), (cache, "cache.0"), (new, "new.0")):
        node.output(0).set_names({name})
    model = openvino.Model([opset13.result(new)], [ids, cache])
    with pytest.raises(ValueError, match=r"in the graph of the cache, cache.0 is read by \['Relu'\], not by one Slice"):
        engine._keep_state(model, entry["cache"])
    capacity = opset13.gather(opset13.shape_of(cache), opset13.constant([1]), opset13.constant(0))
    read = opset13.relu(opset13.add(cache, opset13.convert(capacity, "f32")))
    read.output(0).set_names({"new.0"})
    model = openvino.Model([opset13.result(read)], [ids, cache])
    with pytest.raises(ValueError, match="reads more than its batch: this version of OpenVINO"):
        engine._keep_state(model, entry["cache"])


# --- which one is taken -----------------------------------------------------------------------------------------------


def test_load_takes_an_engine_of_torch_whatever_else_was_built(quantized):
    assert load(quantized["int8"]).engine == "portable"
    assert [p["engine"] for p in read_manifest(quantized["int8"])["programs"]] == list(ALL)


def test_an_artifact_without_programs_of_torch_is_loaded_by_name_only(tmp_path):
    def mean(model: Any, batches: Any) -> float:
        return float(torch.cat([model(batch) for batch in batches]).mean())

    report = export(wide_mlp(), tmp_path / "a", example_inputs=(X[:4],), engines=("onnx",), data=[X], metric=mean)
    assert [row["name"] for row in report.manifest["metrics"]][-1] == "mean (artifact)"
    with pytest.raises(ArtifactError, match=r"needs torch alone, only \['onnx'\]; write load\(dir, engine='onnx'\)"):
        load(tmp_path / "a")
    assert load(tmp_path / "a", engine="onnx")(X).shape == (64, 16)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raced") / "artifact"
    export(wide_mlp(), directory, example_inputs=(X[:4],), engines=("openvino", "onnx", "portable"), measure=True)
    return directory


def test_the_race_is_timed_and_every_loser_is_named(raced):
    manifest = read_manifest(raced)
    rows = manifest["ranking"]
    assert sorted(row["engine"] for row in rows) == sorted(ALL)
    assert rows[0]["slower"] == 1.0 and [r["slower"] for r in rows] == sorted(r["slower"] for r in rows)
    assert rows[0]["why"].startswith("the fastest here: forward ")
    assert f"x the time of {rows[0]['engine']}" in rows[1]["why"]
    assert {row["name"] for row in manifest["timings"]} >= {"artifact.forward", "onnx.forward", "openvino.forward"}
    assert problems(manifest) == []
    assert load(raced, engine="fastest").engine == rows[0]["engine"]


def ranked(directory: Path, target: Path, *names: str) -> Path:
    """A copy of an artifact whose ranking is `names`."""
    import shutil

    shutil.copytree(directory, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["ranking"] = [{"engine": name, "slower": 1.0 + i, "why": "said so"} for i, name in enumerate(names)]
    write_manifest(target, {k: v for k, v in manifest.items() if k != "digest"})
    return target


def test_the_fastest_that_runs_here_is_taken(raced, tmp_path):
    assert load(ranked(raced, tmp_path / "a", "onnx", "portable"), engine="fastest").engine == "onnx"


def test_one_that_answers_otherwise_here_is_passed_over_with_a_warning(raced, tmp_path):
    directory = ranked(raced, tmp_path / "a", "onnx", "portable")
    other = tmp_path / "b"
    export(tiny.mlp(seed=1, features=64, hidden=64, classes=16), other, example_inputs=(X[:4],), engines=("onnx",))
    manifest = json.loads((directory / "manifest.json").read_text())
    (entry,) = (p for p in manifest["programs"] if p["engine"] == "onnx")
    entry["sha256"] = read_manifest(other)["programs"][0]["sha256"]
    (directory / "forward.onnx").write_bytes((other / "forward.onnx").read_bytes())
    write_manifest(directory, {k: v for k, v in manifest.items() if k != "digest"})
    with pytest.warns(UserWarning, match="the onnx program is passed over: the onnx program drifted"):
        assert load(directory, engine="fastest").engine == "portable"


def test_one_that_is_not_installed_is_passed_over_with_the_command(raced, tmp_path, monkeypatch):
    directory = ranked(raced, tmp_path / "a", "openvino", "portable")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else found(name, *a))
    with pytest.warns(UserWarning, match=r"openvino is not installed: pip install 'lightning-accel\[openvino\]'"):
        assert load(directory, engine="fastest").engine == "portable"


def test_the_fastest_of_engines_that_were_not_timed_is_not_guessed(quantized):
    assert read_manifest(quantized["int8"])["ranking"] == []
    with pytest.raises(ArtifactError, match=r"not timed; export with measure=True, or write load\(dir, engine='por"):
        load(quantized["int8"], engine="fastest")


def test_the_only_engine_is_the_fastest(tmp_path):
    export(wide_mlp(), tmp_path / "a", example_inputs=(X[:4],), engines=("onnx",))
    assert load(tmp_path / "a", engine="fastest").engine == "onnx"


def test_an_engine_whose_process_dies_is_not_in_the_race():
    from lightning_accel.measure import Target
    from lightning_accel.race import _failing

    assert _failing({"onnx": Target("no_such_module:workloads")}) == {
        "onnx": "not timed: ModuleNotFoundError: No module named 'no_such_module'"
    }


def test_ranking_weighs_all_workloads_alike():
    rows = ranking({"a": {"prefill": 1.0, "decode": 1.0}, "b": {"prefill": 4.0, "decode": 0.5}})
    assert [row["engine"] for row in rows] == ["a", "b"]
    assert rows[1]["slower"] == pytest.approx(2**0.5)


# --- what cannot be built ---------------------------------------------------------------------------------------------


def test_auto_builds_what_is_installed_and_says_what_is_not(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else found(name, *a))
    names, left_out = engines.chosen("auto")
    assert names == ("aoti", "portable", "onnx", "transformers", "gguf")
    assert left_out == {"openvino": "openvino not installed: pip install 'lightning-accel[openvino]'"}
    with pytest.raises(ValueError, match="openvino cannot be built: openvino not installed: pip install 'light"):
        engines.chosen(("aoti", "openvino"))


class Eigenvalues(nn.Module):
    """torch exports it, ONNX has no such operator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(self.linear(x).unflatten(-1, (3, 3)))


def test_an_engine_that_cannot_convert_the_model_is_named_and_the_others_are_written(tmp_path):
    torch.manual_seed(0)
    report = export(Eigenvalues(), tmp_path / "a", example_inputs=(torch.randn(4, 9),))
    assert [p["engine"] for p in report.manifest["programs"]] == ["portable"]
    assert {row["engine"]: row["why"].partition(":")[0] for row in report.manifest["ranking"]} == {
        "onnx": "not built", "openvino": "not built",
    }  # fmt: skip
    assert "engine onnx: not built: " in str(report)
    assert problems(read_manifest(tmp_path / "a")) == []
    assert not list((tmp_path / "a").glob("*.onnx"))
    assert all("\n" not in row["why"] and len(row["why"]) < 400 for row in report.manifest["ranking"])
    assert load(tmp_path / "a", engine="fastest").engine == "portable", "only torch's own are left"
    with pytest.raises(Exception, match="ONNX"):
        export(Eigenvalues(), tmp_path / "b", example_inputs=(torch.randn(4, 9),), engines=("onnx",))
    assert not (tmp_path / "b").exists()


def test_an_engine_that_does_not_compute_what_was_trained_is_left_out_with_the_reason(tmp_path):
    inputs = {"input_ids": tiny.ids(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.int64)}
    options = {"example_inputs": inputs, "quantize": QuantConfig("int8"), "engines": ("portable", "openvino")}
    data = [{"input_ids": tiny.ids(8, 20, seed=s), "attention_mask": torch.ones(8, 20).long()} for s in range(2)]
    report = export(tiny.bert(), tmp_path / "a", data=data, **options)
    (row,) = report.manifest["ranking"]
    assert row["engine"] == "openvino" and row["why"].startswith("left out: the openvino program drifted: KL(")
    assert "A likely cause" not in row["why"]
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".json", ".pt2", ".safetensors", ".safetensors"]
