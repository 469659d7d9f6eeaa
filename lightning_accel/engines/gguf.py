"""GGUF: one file of a Llama-style model for llama.cpp, with the trained integers and the tokenizer.

4-bit layers are Q4_0 to the bit, groups of 64 or 128 as two or four of 32. int8 layers are Q8_0: the same codes, the
scale of a row repeated for each 32 inputs and rounded to float16. What is float is F16 where that loses nothing, else
F32. llama.cpp rounds activations by a rule of its own. `open` reads the file back into a model of transformers, with
float activations, which checks all that is in it; it is never timed (docs/decisions/0018-files-for-other-runtimes.md).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import files

if TYPE_CHECKING:
    from ..capture import Capture

MODELS = ("LlamaForCausalLM", "MistralForCausalLM")  # llama.cpp's architecture "llama"
GROUP = 32  # inputs that share a scale, in Q4_0 and in Q8_0
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPLIT = (  # of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


# --- build side ------------------------------------------------------------------------------------------------------


def lower(model: nn.Module) -> nn.Module:
    """The model as it is: its integers are taken when the file is written."""
    return model


def reference(model: nn.Module) -> nn.Module | None:
    """A deployed model with activations as they are; `None` where none were rounded."""
    return files.with_activations(model, _int8_linear)


def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, codes.float() * scale[:, None], bias)


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Writes `NAME.gguf`.

    Raises:
        ValueError: no Llama-style model, or layers or a tokenizer for which the format or llama.cpp has no form.
    """
    import gguf

    model: Any = capture.model
    _check(model)
    writer = gguf.GGUFWriter(directory / f"{name}.gguf", "llama")
    _write_sizes(writer, model.config)
    _write_tokenizer(writer, model, capture.assets)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor_name, module in _modules(model):
        data, kind = _tensor(tensor_name, module)
        if tensor_name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = "num_attention_heads" if "attn_q" in tensor_name else "num_key_value_heads"
            data = _interleaved(data, getattr(model.config, heads))
        writer.add_tensor(tensor_name, data.contiguous().numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"file": f"{name}.gguf", "isa": None, "weights": {}}


def _check(model: Any) -> None:
    kind = type(model).__name__
    if kind not in MODELS or type(model).__module__.partition(".")[0] != "transformers":
        raise ValueError(f"{kind} is not one of {', '.join(MODELS)}, whose architecture is written")
    config = model.config
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default" or getattr(config, "sliding_window", None) or config.hidden_act != "silu":
        raise ValueError(
            f"rope_type={rope!r}, sliding_window={getattr(config, 'sliding_window', None)}, "
            f"hidden_act={config.hidden_act!r}: only 'default', None and 'silu' are written"
        )
    if biases := [name for name in files.check_configuration(model, config).state_dict() if name.endswith(".bias")]:
        raise ValueError(f"{biases[0]}: layers with biases are not written")


def _write_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that have a weight, under their names in the file; a tied head is the embedding."""
    yield "token_embd.weight", model.model.embed_tokens
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in LAYER.items():
            yield f"blk.{index}.{ours}.weight", layer.get_submodule(theirs)
    yield "output_norm.weight", model.model.norm
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head


def _tensor(name: str, module: Any) -> tuple[Tensor, str]:
    """Rows of a tensor as they are stored, and their type in the file."""
    from ..quantize.int4 import unpack
    from ..quantize.layers import CONVERTED, Int4Embedding, Int4Linear, Int8StaticLinear

    if not isinstance(module, CONVERTED):
        weight = module.weight.detach()
        half = weight.dim() > 1 and torch.equal(weight.half().float(), weight)
        return (weight.half(), "F16") if half else (weight, "F32")
    if module.weight.shape[1] % GROUP:
        raise ValueError(f"{name} has {module.weight.shape[1]} inputs, which groups of {GROUP} do not divide")
    if isinstance(module, Int4Linear | Int4Embedding):
        codes, scales = unpack(module.codes, module.scale, len(module.weight))
        scales = scales.repeat_interleave(codes.shape[2] // GROUP, 1)
        return _blocks(_nibbles(codes.flatten(1)), scales.squeeze(-1)), "Q4_0"
    scale = module.scale / module.input_scale if isinstance(module, Int8StaticLinear) else module.scale
    change = ((scale.half().float() / scale - 1.0).abs() * module.codes.any(1)).max()
    if change > 2.0**-10:
        raise ValueError(f"{name} has rows whose scales are too small for float16, which changes them by {change:.1%}")
    codes = module.codes.unflatten(1, (-1, GROUP)).view(torch.uint8)
    return _blocks(codes, scale[:, None].expand(-1, codes.shape[1])), "Q8_0"


def _nibbles(codes: Tensor) -> Tensor:
    """Codes in [-8, 7], [rows, n], as bytes [rows, n / 32, 16]: inputs j and j + 16 of a group share one."""
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    return low | high << 4


def _blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """uint8 [rows, bytes]: of each group the float16 scale and the codes, from [rows, groups, n] and [rows, groups]."""
    steps = scales.half().contiguous().view(torch.uint8).unflatten(1, (-1, 2))
    return torch.cat([steps, codes], 2).flatten(1)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, [heads * size, ...], in the order of llama.cpp: the two that are rotated together follow
    each other, where transformers has them half a head apart."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _write_tokenizer(writer: Any, model: Any, assets: Mapping[str, Any]) -> None:
    """Tokens, merges and the kind of byte-level BPE; without a tokenizer among the assets only that there is none."""
    if "tokenizer.json" not in assets:
        writer.add_tokenizer_model("no_vocab")
        return
    import gguf

    from ..chat import template_and_config

    made = json.loads(Path(assets["tokenizer.json"]).read_text())
    words = {**made["model"]["vocab"], **{token["content"]: token["id"] for token in made["added_tokens"]}}
    size = model.config.vocab_size
    if made["model"]["type"] != "BPE" or len(words) > size:
        raise ValueError(
            f"the tokenizer is {made['model']['type']} of {len(words)} tokens; only byte-level BPE of at most the "
            f"model's {size} is written"
        )
    kinds = {token["id"]: ("CONTROL" if token["special"] else "USER_DEFINED") for token in made["added_tokens"]}
    tokens, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for word, index in words.items():
        tokens[index], types[index] = word, gguf.TokenType[kinds.get(index, "NORMAL")]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_kind(made))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)
    _write_ends(writer, model, made)
    template, _ = template_and_config(assets)
    if template is not None:
        writer.add_chat_template(template)


def _kind(made: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a text is split before its tokens are merged.

    Raises:
        ValueError: it has none, or it is not known here.
    """
    pre = made["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    names = [step.get("type") for step in steps]
    last = steps[-1]
    words, regex = made["model"], last.get("use_regex", True)
    plain = not made["normalizer"] and not words.get("byte_fallback") and not last.get("add_prefix_space")
    plain, whole = plain and not words.get("ignore_merges"), plain and words.get("ignore_merges")
    if plain and names == ["ByteLevel"] and regex:
        return "gpt-2"
    if plain and names == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and regex:
        return "smollm"
    if whole and names == ["Split", "ByteLevel"] and steps[0]["pattern"] == {"Regex": _SPLIT} and not regex:
        return "llama-bpe"
    raise ValueError(
        f"the tokenizer splits texts by {', '.join(map(str, names))}, and of llama.cpp's ways only those of GPT-2, "
        "SmolLM and Llama 3 are written"
    )


def _write_ends(writer: Any, model: Any, made: Mapping[str, Any]) -> None:
    """The tokens that begin and end a text, and whether the tokenizer begins each text with the former."""
    from ..capture_causal import end_of_text

    begin = model.config.bos_token_id
    if begin is not None:
        writer.add_bos_token_id(begin)
    if ends := end_of_text(model):
        writer.add_eos_token_id(ends[0])
    post = made["post_processor"] or {}
    single = [s for p in post.get("processors", [post]) for s in p.get("single", [])]
    special = {name: token["ids"] for p in post.get("processors", [post]) for name, token in
               p.get("special_tokens", {}).items()}  # fmt: skip
    first = single[0].get("SpecialToken", {}).get("id") if single else None
    writer.add_add_bos_token(first is not None and special[first] == [begin])


# --- run side --------------------------------------------------------------------------------------------------------


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the file cannot be read back here."""
    missing = [name for name in ("gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'lightning-accel[gguf]'"
    return None


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Reads the file back: a model of transformers with the decoded weights, and activations in float32."""
    from ..capture_causal import CausalLM

    module, caches = CausalLM(read(path)), len(entry["cache"]["shapes"])

    @torch.no_grad()
    def run(inputs: list[Tensor]) -> list[Tensor]:
        return module(*inputs[:-caches], inputs[-caches:])

    return run


def read(path: Path) -> Any:
    """A LlamaForCausalLM with the decoded weights of a file that `build` wrote."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(f"llama.{name}")
        assert found is not None, name
        return found.contents()

    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).float() for t in reader.tensors}
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("attention.key_length"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )
    embedding = tensors["token_embd.weight"]
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": tensors["output_norm.weight"]}
    for index in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            tensor = tensors[f"blk.{index}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):  # halves of a head apart again
                tensor = tensor.unflatten(0, (heads if theirs == "attn_q" else kv_heads, -1, 2)).transpose(1, 2)
                tensor = tensor.flatten(0, 2)
            state[f"model.layers.{index}.{ours}.weight"] = tensor
    state["lm_head.weight"] = tensors.get("output.weight", embedding)
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
