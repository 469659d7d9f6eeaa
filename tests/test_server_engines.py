"""Engines that write files for other runtimes: the trained integers, loaded there without any code of this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from test_manifest import problems
from test_seq2seq import MAKE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5ForConditionalGeneration

from lightning_accel import QuantConfig, engines, export_model, load, quantize_model
from lightning_accel.artifact import ArtifactError, check_file, read_manifest
from lightning_accel.engines.gguf import read
from lightning_accel.export import ExportReport
from lightning_accel.quantize.config import SCHEMES
from lightning_accel.quantize.layers import CONVERTED
from lightning_accel.report import describe
from lightning_accel.verify import verify_artifact

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # groups of 32 divide them


def export(model: nn.Module, path: Path, **options: Any) -> ExportReport:
    return export_model(model, path, **({"measure": False} | options))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def small(**changes: Any) -> Any:
    return tiny.llama(**(WIDE | {"vocab_size": 304, "eos_token_id": 2} | changes))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens that begins each text with one, and a template of conversations."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["[PAD]", "[BOS]", "[EOS]"]
    options: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=300, **options)
    made.train_from_iterator(["the import statement and the others"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")
    found.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A small Llama in float and in each scheme through both engines; "untied" in int8 has a head of its own."""
    found = {}
    for scheme in ("float", *SCHEMES, "untied"):
        found[scheme] = tmp_path_factory.mktemp(scheme) / "llama"
        data, options = [{"input_ids": tiny.ids(4, 20)}], {"engines": ("portable", *engines.FILES)}
        export(small(tie_word_embeddings=scheme != "untied"), found[scheme], data=data, quantize=config(scheme),
               calibration=data, processor=tokenizer, **options)  # fmt: skip
    return found


def config(scheme: str) -> QuantConfig | None:
    return None if scheme == "float" else QuantConfig("int8" if scheme == "untied" else scheme)


def deployed(scheme: str) -> Any:
    """The integers of an artifact of `served`."""
    data = [{"input_ids": tiny.ids(4, 20)}]
    return quantize_model(small(tie_word_embeddings=scheme != "untied"), config(scheme), data)


# --- transformers: a folder for servers -------------------------------------------------------------------------------


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, found = torch.tensor([[5, 9, 3, 8]]), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(ids).logits
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found[folder] = [logits, model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 4:]]
assert "lightning_accel" not in sys.modules
torch.save(found, sys.argv[1])
"""


def test_plain_transformers_loads_the_folders_in_a_process_of_its_own(served, tmp_path):
    folders = {str(path / "transformers"): path for path in served.values()}
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "found"), *folders]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    ids = torch.tensor([[5, 9, 3, 8]])
    for folder, (logits, tokens) in torch.load(tmp_path / "found", weights_only=True).items():
        ours = load(folders[folder], engine="transformers")
        assert error(ours(ids), logits) < 1e-5
        ours.entry["cache"]["suppress"] = [2]  # min_new_tokens never writes the end of text
        assert torch.equal(ours.generate(ids, 20), tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folder_holds_the_trained_integers_and_a_tied_head_once(served, scheme):
    with safe_open(served[scheme] / "transformers" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    assert not [name for name in stored if name.startswith("lm_head")]
    layers = {name: m for name, m in deployed(scheme).named_modules() if isinstance(m, CONVERTED) and name != "lm_head"}
    assert len(layers) == 15
    for name, layer in layers.items():
        codes, scale = stored[f"{name}._weight_qdata"], stored[f"{name}._weight_scale"]
        assert codes.dtype == torch.int8
        weight = (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
        assert torch.equal(weight, layer.weight)


def test_a_program_for_a_server_is_verified_as_it_rounds_and_its_distance_is_stated(served):
    for scheme in ("float", *SCHEMES):
        manifest = read_manifest(served[scheme])
        assert problems(manifest) == []
        entry = manifest["programs"][1]
        assert entry["verification"]["error_trained"] < 1e-5, "the formula is torchao's"
        assert ("activations" in entry) == (scheme not in ("float", "int4-weight"))
        if "activations" in entry:
            assert 0 < entry["activations"]["error_trained"] < 0.2
            assert verify_artifact(served[scheme])[2].startswith("transformers: golden inputs again")
    assert "transformers: the trained integers; activations are rounded by its own rule" in describe(served["int8"])


def test_float_weights_are_plain_safetensors(served):
    folder = served["float"] / "transformers"
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["use_cache"] and config["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_layers_of_several_schemes_and_of_none_are_named_one_by_one(tmp_path):
    overrides = {"*.k_proj": "int4-weight", "*.v_proj": None}
    data = [{"input_ids": tiny.ids(4, 20)}]
    options = {"quantize": QuantConfig("int8", overrides=overrides), "engines": ("portable", "transformers")}
    export(tiny.llama(), tmp_path / "a", data=data, **options)
    config = json.loads((tmp_path / "a" / "transformers" / "config.json").read_text())["quantization_config"]
    kinds = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert kinds["model.layers.0.self_attn.k_proj"]["_type"] == "IntxWeightOnlyConfig"
    assert kinds["model.layers.0.self_attn.q_proj"]["_type"] == "Int8DynamicActivationInt8WeightConfig"
    assert config["modules_to_not_convert"] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_folder_serves_encoder_decoder_models_and_others(tmp_path, scheme):
    torch.manual_seed(0)
    quantize = QuantConfig(scheme) if scheme else None
    inputs = {"input_ids": torch.randint(3, 97, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.int64)}
    options = {"engines": ("portable", "transformers"), "quantize": quantize}
    export(MAKE["t5"]().eval(), tmp_path / "t5", example_inputs=inputs, **options)
    other = load(tmp_path / "t5", engine="transformers")
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5" / "transformers")
    answers = other.generate(**inputs, max_new_tokens=12, stop=())
    theirs = plain.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 1:]
    assert torch.equal(answers, theirs)
    example = {"input_ids": tiny.ids(3, 12), "output_hidden_states": True}
    export(tiny.bert(), tmp_path / "bert", example_inputs=example, **options)
    found = load(tmp_path / "bert", engine="transformers")(tiny.ids(5, 9))
    assert found["logits"].shape == (5, 3) and len(found["hidden_states"]) == 3


def test_the_tokenizer_travels_in_the_folder(served, tokenizer):
    theirs = AutoTokenizer.from_pretrained(served["int8"] / "transformers")
    assert theirs("the others")["input_ids"] == tokenizer("the others")["input_ids"]
    assert theirs.chat_template == tokenizer.chat_template


class Wrapped(nn.Module):
    """A module of the user's around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.bert()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids).logits


def narrowed() -> Any:
    """A layer of another width than the configuration says."""
    model = tiny.llama()
    block = model.model.layers[1].mlp
    block.gate_proj, block.up_proj = (nn.Linear(tiny.WIDTH, 40, bias=False) for _ in range(2))
    block.down_proj = nn.Linear(40, tiny.WIDTH, bias=False)
    return model


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (tiny.mlp, {"example_inputs": (torch.randn(4, 8),)}, "Sequential is no model of transformers, so from_pretra"),
        (Wrapped, {"example_inputs": (tiny.ids(),)}, "Wrapped is no model of transformers"),
        (tiny.gpt2, {"quantize": QuantConfig("int8")}, "transformer.h.0.attn.c_attn is a Conv1D, and other runtimes"),
        (narrowed, {}, r"mlp.down_proj.weight is \[32, 40\], by the configuration \[32, 48\]: what pruning left"),
    ],
)
def test_what_from_pretrained_cannot_load_is_left_out_with_the_reason(tmp_path, make, options, reason):
    report = export(make(), tmp_path / "a", engines=("portable", "transformers"), **options)
    (row,) = report.manifest["ranking"]
    assert row["engine"] == "transformers" and re.search(f"not built: ValueError: .*{reason}", row["why"])
    assert not (tmp_path / "a" / "transformers").exists()


def test_a_damaged_folder_is_refused(served, tmp_path):
    shutil.copytree(served["int8"], tmp_path / "a")
    file = tmp_path / "a" / "transformers" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"transformers/model.safetensors is damaged"):
        load(tmp_path / "a", engine="transformers")
    assert load(tmp_path / "a").engine == "portable"
    for name in ("transformers/..", "transformers/../a", "transformers/", "other/config.json", "/transformers/a"):
        with pytest.raises(ArtifactError, match="outside the artifact"):
            check_file(tmp_path / "a", name, "0")


# --- gguf: a file for llama.cpp ---------------------------------------------------------------------------------------


def stored(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors of a GGUF file, by name."""
    reader = gguf.GGUFReader(path)
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_a_file_that_is_read_back_writes_the_tokens_of_the_artifact(served):
    ids = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8]]
    for scheme in ("float", "int4-weight"):  # the others round activations
        portable, other = load(served[scheme]), load(served[scheme], engine="gguf")
        assert torch.equal(other.generate(ids, 24, stop=()), portable.generate(ids, 24, stop=()))
    for scheme in SCHEMES:
        entry = read_manifest(served[scheme])["programs"][2]
        assert entry["engine"] == "gguf" and ("activations" in entry) == (scheme != "int4-weight")


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "untied"])
def test_int8_codes_are_those_of_q8_0_and_scales_are_rounded_to_float16(served, scheme):
    model = deployed(scheme).model
    _, tensors = stored(served[scheme] / "decoder.gguf")
    assert ("output.weight" in tensors) == (scheme == "untied")
    for name, layer in (("blk.1.ffn_down", model.layers[1].mlp.down_proj),
                        ("token_embd", model.embed_tokens)):  # fmt: skip
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type.name == "Q8_0"
        blocks = torch.from_numpy(tensor.data.copy()).unflatten(1, (-1, 34))
        assert torch.equal(blocks[..., 2:].flatten(1).view(torch.int8), layer.codes)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert ((weight - layer.weight).abs() <= 2**-11 * layer.weight.abs()).all()


@pytest.mark.parametrize("group", [32, 64])
def test_4_bit_weights_are_those_of_q4_0_to_the_bit(tmp_path, group):
    model = small(intermediate_size=128)
    export(model, tmp_path / "a", quantize=QuantConfig("int4-weight", group_size=group), engines=("gguf",))
    integers = quantize_model(model, QuantConfig("int4-weight", group_size=group))
    _, tensors = stored(tmp_path / "a" / "decoder.gguf")
    for name, layer in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = tensors[f"blk.0.{name}.weight"]
        assert tensor.tensor_type.name == "Q4_0"
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(weight, integers.model.layers[0].get_submodule(layer).weight)


def test_float_weights_are_halved_where_nothing_is_lost(tmp_path):
    model = small()
    model.model.layers[0].mlp.up_proj.half().float()
    export(model, tmp_path / "a", engines=("gguf",))
    kinds = {name: tensor.tensor_type.name for name, tensor in stored(tmp_path / "a" / "decoder.gguf")[1].items()}
    assert {kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_gate.weight"]} == {"F16", "F32"}
    assert kinds["output_norm.weight"] == "F32"


def test_the_file_holds_the_tokenizer_and_the_template_of_conversations(served, tokenizer):
    fields, _ = stored(served["int8"] / "decoder.gguf")
    words = tokenizer.get_vocab()
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {tokens[i]: i for i in range(len(words))} == words and len(tokens) == 304
    assert types[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] and types[-1] == gguf.TokenType.UNUSED
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == [
        list(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.chat_template"] == tokenizer.chat_template


def split_otherwise() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def tiny_rows() -> Any:
    """A layer whose int8 scales float16 does not hold."""
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
    return model


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (tiny.mlp, {"example_inputs": (torch.randn(4, 8),)}, "Sequential is not one of LlamaForCausalLM, Mistral"),
        (tiny.gpt2, {}, "GPT2LMHeadModel is not one of LlamaForCausalLM, MistralForCausalLM"),
        (narrowed, {}, r"mlp.down_proj.weight is \[32, 40\], by the configuration \[32, 48\]: what pruning left"),
        (tiny.llama, {"quantize": QuantConfig("int8")}, "ffn_down.weight has 48 inputs, which groups of 32 do not div"),
        (small, {"processor": split_otherwise}, "the tokenizer splits texts by Whitespace, and of llama.cpp's ways"),
        (tiny_rows, {"quantize": QuantConfig("int8")}, "blk.0.ffn_up.weight has rows whose scales are too small for"),
        (lambda: small(attention_bias=True), {}, "q_proj.bias: layers with biases are not written|k_proj.bias"),
        (lambda: small(hidden_act="relu"), {}, "hidden_act='relu': only 'default', None and 'silu' are written"),
    ],
)
def test_what_the_format_cannot_say_is_left_out_with_the_reason(tmp_path, make, options, reason):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    report = export(make(), tmp_path / "a", engines=("portable", "gguf"), **options)
    (row,) = report.manifest["ranking"]
    assert row["engine"] == "gguf" and re.search(f"not built: ValueError: .*({reason})", row["why"]), row["why"]
    assert not list((tmp_path / "a").glob("*.gguf"))


def test_a_file_is_not_timed_and_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"gguf is not timed: llama.cpp runs it.*; write measure=False, or engines="):
        export(small(), tmp_path / "a", engines=("gguf",), measure=True)
    assert engines.UNTIMED.keys() <= set(engines.FILES) <= set(engines.NAMES)


def test_a_folder_is_timed_and_the_fastest_is_one_that_computes_what_was_trained(tmp_path):
    options = {"quantize": QuantConfig("int8"), "engines": ("portable", *engines.FILES), "measure": True}
    ranking = export(small(), tmp_path / "a", **options).manifest["ranking"]
    slower = {row["engine"]: row["slower"] for row in ranking}
    assert slower.keys() == {"portable", *engines.FILES} and slower["gguf"] is None and slower["transformers"]
    assert {row["engine"]: row["why"] for row in ranking}["gguf"].startswith("not timed: llama.cpp runs it")
    assert load(tmp_path / "a", engine="fastest").engine == "portable"


def test_llama_cpp_writes_the_tokens_of_the_decoded_weights(served):
    llama_cpp = pytest.importorskip("llama_cpp", reason="built from source as docs/benchmarks/peers.md says")
    from llama import greedy

    prompt = [1, 5, 9, 30, 44, 7]
    for scheme, directory in served.items():
        tokens, logits = greedy(llama_cpp, directory / "decoder.gguf", prompt, 30)
        with torch.no_grad():
            whole = read(directory / "decoder.gguf")(torch.tensor([prompt + tokens[:-1]])).logits[0]
        expected = whole[len(prompt) - 1 :]
        gaps = expected.topk(2).values.diff().abs().flatten()
        same = torch.tensor(tokens) == expected.argmax(-1)
        assert same[gaps > 2 * (logits - expected).abs().amax(-1)].all(), scheme
        assert error(logits, expected) < (0.01 if scheme == "float" else 0.1)
        assert scheme != "float" or same.all()
