"""An encoder-decoder language model as two programs: the encoder with the keys and values of cross-attention, run once
an input, and the decoder, which reads them beside a cache of its own, like a causal language model.

The cross keys and values, [batch, source, heads, head_dim] each, lead the decoder's list of cache tensors and are only
read. Decoder prompts have no padding: all rows of a batch stand at the same position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .capture import MAX_BATCH, Capture, call_example, capture_module, input_names
from .capture_causal import WantedRows, generation_spec, sliced_cache, use_own_attention
from .inputs import ExampleInputs, split_inputs

_LEAST = torch.finfo(torch.float32).min  # a row of padding sees nothing, and its unused result must not be NaN


def capture_seq2seq(model: Any, example_inputs: ExampleInputs, dynamic_shapes: Any = None) -> dict[str, Capture]:
    """Captures a transformers model, in eval mode, by the role of each program: `"encoder"` and `"decoder"`.

    Batch, source length (where the encoder's own is free), decoder length and cache capacity are free.

    Raises:
        ValueError: the model rejects the inputs, keeps no keys and values, or computes attention by itself.
    """
    args, kwargs = split_inputs(example_inputs)
    named = dict(zip(input_names(model, args, kwargs), (*args, *kwargs.values()), strict=True))
    source = {n: v for n, v in named.items() if isinstance(v, Tensor) and not n.startswith("decoder_")}
    own, cross = _cache_shapes(model, source)
    use_own_attention(model)
    encoder = capture_module(Encoder(model), source, dynamic_shapes)
    limit = getattr(model.get_encoder().config, "max_position_embeddings", None)  # of a table, which has no more rows
    for size in (s for spec in encoder.inputs for s in spec["shape"] if isinstance(s, dict) and s["name"] == "length"):
        size["max"] = min(size["max"], limit or size["max"])
    return {"encoder": encoder, "decoder": _decoder(model, own, cross)}


class Encoder(nn.Module):
    """Source inputs by name -> keys and values [B, E, heads, head_dim] of cross-attention, layer by layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **source: Tensor) -> list[Tensor]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        if "attention_mask" in source and "input_ids" in source:
            seen_BE = source["attention_mask"].bool()
            source = {**source, "attention_mask": torch.where(seen_BE[:, None, None], 0.0, _LEAST)}
        states_BEH = self.model.get_encoder()(**source).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # a token is decoded for the keys and values that the layers make of the states; nothing else of it is kept
        token_B1 = torch.zeros(states_BEH.shape[0], 1, dtype=torch.int64)
        self.model.get_decoder()(
            input_ids=token_B1, encoder_hidden_states=states_BEH, past_key_values=cache, use_cache=True
        )
        layers: list[Any] = cache.cross_attention_cache.layers
        return [t.transpose(1, 2).contiguous() for layer in layers for t in (layer.keys, layer.values)]


class Decoder(nn.Module):
    """(ids [B,T], mask [B,S], source mask [B,E], wanted [B,K], [*cross, *cache]) -> [logits [B,K,V]].

    Attributes:
        appends: put out the keys and values of the new tokens after the logits, and leave the cache as it is.
    """

    appends = False

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"model": model})  # weights are called as in the captured encoder: stored once
        self.layers = layers
        self.head = WantedRows(model.get_output_embeddings())

    def forward(
        self, ids: Tensor, mask: Tensor, source_mask: Tensor, wanted: Tensor, cache: list[Tensor]
    ) -> list[Tensor]:
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        model: Any = self.model["model"]
        new, filled, source = ids.shape[1], mask.shape[1], source_mask.shape[1]
        cross, own = cache[: 2 * self.layers], cache[2 * self.layers :]
        made: list[Tensor] = []
        past = EncoderDecoderCache(
            sliced_cache(own, filled, new, made if self.appends else None),
            sliced_cache([t.transpose(1, 2) for t in cross], source, 0),
        )
        past.is_updated = dict.fromkeys(range(self.layers), True)
        seen_TS = torch.arange(filled)[None] <= torch.arange(filled - new, filled)[:, None]
        allowed_BTS = seen_TS[None] & mask[:, None]
        self.head.wanted_BK = wanted
        output = model(
            decoder_input_ids=ids,
            decoder_attention_mask=torch.where(allowed_BTS[:, None], 0.0, _LEAST),
            attention_mask=torch.where(source_mask[:, None, None], 0.0, _LEAST),
            # of the encoder's states only the shape is read: their keys and values are in the cache
            encoder_outputs=BaseModelOutput(torch.zeros(*source_mask.shape, model.get_decoder().config.d_model)),
            past_key_values=past,
            use_cache=True,
        )
        self.head.wanted_BK = None
        return [output.logits, *made]


def _decoder(model: Any, own: list[tuple[int, int]], cross: list[tuple[int, int]]) -> Capture:
    config = model.get_decoder().config
    limits = (getattr(config, n, None) for n in ("max_target_positions", "max_position_embeddings", "n_positions"))
    limit = int(next((n for n in limits if n), 2048))
    batch, capacity, filled, new, wanted, source = 2, min(16, limit), 9, 5, 3, 7
    cache = [torch.zeros(batch, source, *shape) for shape in cross] + [torch.zeros(batch, capacity, *s) for s in own]
    example = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.ones(batch, filled, dtype=torch.bool),
        torch.ones(batch, source, dtype=torch.bool),
        torch.zeros(batch, wanted, dtype=torch.int64),
        cache,
    )
    b, t, s, e, k, c = (
        Dim(n, max=m)
        for n, m in (("batch", MAX_BATCH), ("new", limit), ("filled", limit), ("source", 2**20), ("wanted", limit),
                     ("capacity", limit))
    )  # fmt: skip
    caches = [{0: b, 1: e}] * len(cross) + [{0: b, 1: c}] * len(own)
    dynamic = ({0: b, 1: t}, {0: b, 1: s}, {0: b, 1: e}, {0: b, 1: k}, caches)
    dims = {"b": {"name": "batch", "min": 1, "max": MAX_BATCH}, "t": {"name": "length", "min": 1, "max": limit}}
    inputs = [{"name": "decoder_input_ids", "dtype": "int64", "shape": [dims["b"], dims["t"]]}]
    spec = {
        "shapes": [list(shape) for shape in (*cross, *own)],
        "cross": len(cross),
        "dtype": "float32",
        "max_length": limit,
        "max_batch": MAX_BATCH,
        "vocabulary": model.get_output_embeddings().weight.shape[0],
        **generation_spec(model),
        "start": _start(model),
    }
    return Capture(Decoder(model, len(own) // 2), example, dynamic, inputs, {"type": "tensor", "index": 0}, spec)


def _start(model: Any) -> list[int]:
    """Tokens that begin an answer; of an English Whisper, that there are no timestamps too."""
    config = model.generation_config
    start = getattr(config, "decoder_start_token_id", None)
    found = [start] if isinstance(start, int) else list(start or [])
    plain = getattr(config, "no_timestamps_token_id", None)
    return [*found, plain] if plain is not None and not getattr(config, "is_multilingual", False) else found


def _cache_shapes(model: Any, source: dict[str, Tensor]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(heads, head_dim) of keys and values of each layer, in turn: of the decoder's own attention, and of the other."""
    rows = next(iter(source.values())).shape[0] if source else 0
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    output = call_example(model, {**source, "decoder_input_ids": ids, "use_cache": True})
    past = getattr(output, "past_key_values", None)
    found = []
    for name in ("self_attention_cache", "cross_attention_cache"):
        layers = getattr(getattr(past, name, None), "layers", ())
        if not layers or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
            raise ValueError(
                f"{type(model).__name__} keeps no keys and values for each layer; an encoder-decoder model must take "
                "its attention from transformers' AttentionInterface, as Whisper and T5 do"
            )
        found.append([(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)])
    return found[0], found[1]
