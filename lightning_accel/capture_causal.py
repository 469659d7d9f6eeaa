"""A causal language model as one program for prefill, decoding and evaluation.

Its cache is a list of explicit inputs, [batch, capacity, heads, head_dim] each, written in place; the number of filled
slots is carried by the shape of the mask, so that attention reads the filled slots only; logits are computed at the
wanted indices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from ._warn import warn
from .capture import CAUSAL_HINT, MAX_BATCH, Capture
from .quantize.attend import NOT_SUPPORTED, added_mask

_NOT_DONE = (  # of a generation configuration; 0, 1 and None mean none of it
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "guidance_scale",
)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over the filled slots; key and value heads are shared by groups of query heads, not copied."""
    unknown = [name for name in NOT_SUPPORTED if options.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} wants attention with {unknown[0]}, which is not supported")
    mask = added_mask(attention_mask, position_bias)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def use_own_attention(model: Any) -> None:
    """Has a transformers model compute attention with `attend`."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("lightning_accel", attend)
    model.set_attn_implementation("lightning_accel")


class WantedRows:
    """Has the head of a model see the wanted positions [B, K] of its input only: logits are computed there alone."""

    def __init__(self, head: nn.Module) -> None:
        self.wanted_BK: Tensor | None = None
        head.register_forward_pre_hook(self._gather)

    def _gather(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BTE, wanted_BK = inputs[0], self.wanted_BK
        assert wanted_BK is not None
        return (hidden_BTE.gather(1, wanted_BK[..., None].expand(-1, -1, hidden_BTE.shape[-1])),)


def sliced_cache(cache: Sequence[Tensor], filled: int, new: int, made: list[Tensor] | None = None) -> Any:
    """A transformers cache over the caller's tensors, which reads the first `filled` slots.

    Args:
        made: gets the keys and values of the new tokens, [batch, new, heads, head_dim] each, in place of the tensors.
    """
    from transformers.cache_utils import Cache, StaticLayer

    class Sliced(StaticLayer):
        keys: Tensor
        values: Tensor

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__(max_cache_len=filled)
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if made is not None:
                states = key_states.transpose(1, 2), value_states.transpose(1, 2)
                made.extend(states)
                old = self.keys[:, : filled - new], self.values[:, : filled - new]
                keys, values = (torch.cat([a, b], 1).transpose(1, 2) for a, b in zip(old, states, strict=True))
                return keys, values
            self.keys[:, filled - new : filled].copy_(key_states.transpose(1, 2))
            self.values[:, filled - new : filled].copy_(value_states.transpose(1, 2))
            return self.keys[:, :filled].transpose(1, 2), self.values[:, :filled].transpose(1, 2)

        def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
            return filled, 0

        def get_seq_length(self) -> int:
            return filled - new

    return Cache(layers=[Sliced(k, v) for k, v in zip(cache[::2], cache[1::2], strict=True)])


class CausalLM(nn.Module):
    """(ids [B,T], positions [B,T], mask [B,S], wanted [B,K], cache) -> [logits [B,K,V]], S slots filled afterwards.

    Attributes:
        appends: put out the keys and values of the new tokens after the logits, and leave the cache as it is.
    """

    appends = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        use_own_attention(model)
        self.model = model
        self.window = getattr(model.config, "sliding_window", None)
        self.kinds = set(getattr(model.config, "layer_types", None) or ())
        if self.kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"{type(model).__name__} has layers of the kinds {sorted(self.kinds)}; {CAUSAL_HINT}")
        self.head = WantedRows(model.get_output_embeddings())

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor, cache: list[Tensor]
    ) -> list[Tensor]:
        new, filled = ids.shape[1], mask.shape[1]
        made: list[Tensor] = []
        self.head.wanted_BK = wanted
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._biases(positions, mask, new, filled),
            use_cache=True,
            past_key_values=sliced_cache(cache, filled, new, made if self.appends else None),
        )
        self.head.wanted_BK = None
        return [output.logits, *made]

    def _biases(self, positions_BT: Tensor, mask_BS: Tensor, new: int, filled: int) -> Any:
        """What is added to attention scores [B,1,T,S]; a dict by kind of layer where the model has several."""
        seen_TS = torch.arange(filled)[None] <= torch.arange(filled - new, filled)[:, None]
        allowed = {"full_attention": seen_TS[None] & mask_BS[:, None]}
        if self.window is not None:
            distance_BTS = positions_BT[:, :, None] - (mask_BS.cumsum(1) - 1)[:, None]
            allowed["sliding_attention"] = allowed["full_attention"] & (distance_BTS < self.window)
        # a finite minimum: a row of padding sees nothing, and its unused result must not be NaN
        biases = {k: torch.where(a[:, None], 0.0, torch.finfo(torch.float32).min) for k, a in allowed.items()}
        if "sliding_attention" in self.kinds:
            return biases
        return biases["full_attention" if self.kinds or self.window is None else "sliding_attention"]


def capture_causal_lm(model: Any) -> Capture:
    """Captures a transformers model, in eval mode; batch, length and cache capacity are free.

    Raises:
        ValueError: the model keeps no keys and values, or computes attention by itself.
    """
    shapes = _cache_shapes(model)
    config = model.config
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    vocabulary = model.get_output_embeddings()(torch.zeros(1, model.get_input_embeddings().embedding_dim)).shape[-1]
    batch, capacity = 2, min(16, limit)
    filled = min(9, capacity - 1)
    new, wanted = min(5, filled - 1), min(3, filled - 1)
    cache = [torch.zeros(batch, capacity, *shape) for shape in shapes]
    example = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.arange(filled - new, filled).expand(batch, new).contiguous(),
        torch.ones(batch, filled, dtype=torch.bool),
        torch.zeros(batch, wanted, dtype=torch.int64),
        cache,
    )
    b, c, t, s, k = (
        Dim(n, max=m)
        for n, m in (("batch", MAX_BATCH), ("capacity", limit), ("new", limit), ("filled", limit), ("wanted", limit))
    )
    dynamic = ({0: b, 1: t}, {0: b, 1: t}, {0: b, 1: s}, {0: b, 1: k}, [{0: b, 1: c}] * len(cache))
    dims = {"b": {"name": "batch", "min": 1, "max": MAX_BATCH}, "t": {"name": "length", "min": 1, "max": limit}}
    inputs = [{"name": "input_ids", "dtype": "int64", "shape": [dims["b"], dims["t"]]}]
    spec = {
        "shapes": [list(shape) for shape in shapes],
        "dtype": "float32",
        "max_length": limit,
        "max_batch": MAX_BATCH,
        "vocabulary": vocabulary,
        **generation_spec(model),
    }
    return Capture(CausalLM(model), example, dynamic, inputs, {"type": "tensor", "index": 0}, spec)


def generation_spec(model: Any) -> dict[str, Any]:
    """How a text begins and ends and what is never written, for the manifest; a warning names what is left out."""
    config = model.generation_config
    ends = end_of_text(model)
    barred = [word for word in getattr(config, "bad_words_ids", None) or () if word not in [[end] for end in ends]]
    _warn_of_others(model, any(len(word) > 1 for word in barred))
    never = [*(getattr(config, "suppress_tokens", None) or ()), *(word[0] for word in barred if len(word) == 1)]
    spec: dict[str, Any] = {"stop": ends}
    for name, ids in (("suppress", never), ("suppress_first", getattr(config, "begin_suppress_tokens", None))):
        if ids:
            spec[name] = list(ids)
    for name, which in (("forced_first", "bos"), ("forced_last", "eos")):
        if (token := getattr(config, f"forced_{which}_token_id", None)) is not None:
            spec[name] = token[0] if isinstance(token, list) else token
    return spec


def _warn_of_others(model: Any, several: bool) -> None:
    """Names what a generation configuration asks for and no artifact does.

    Args:
        several: it bars words of several tokens.
    """
    config = model.generation_config
    asked = {name: value for name in _NOT_DONE if (value := getattr(config, name, None)) not in (None, 0, 1.0)}
    asked |= {"bad_words_ids": "of several tokens"} if several else {}
    if asked:
        said = ", ".join(f"{name}={value}" for name, value in asked.items())
        warn(
            f"the generation configuration of {type(model).__name__} says {said}, which an artifact's generate does "
            "not do, so that it writes other texts than transformers; if that is well, set it to None before the export"
        )


def end_of_text(model: Any) -> list[int]:
    """Token ids that end a text, as transformers' `generate` takes them from the model's configurations."""
    configs = (getattr(model, "generation_config", None), model.config)
    ids: Any = next((e for config in configs if (e := getattr(config, "eos_token_id", None)) is not None), [])
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, head_dim) of the keys and of the values of each layer, in turn, as the model really makes them."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    if not layers or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise ValueError(f"{type(model).__name__} keeps no keys and values for each layer; {CAUSAL_HINT}")
    return [(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)]
