"""Recordings with transcripts, and Whisper tiny.en.

The recordings are Asterisk's English prompts (CC-BY-SA-3.0), one voice; `real_data.py` fetches them and the model.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_data import folder
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from word_errors import words

from lightning_accel.speech import read_wav

RATE = 16_000  # Hz, of Whisper; the recordings have half of it
PROMPT, END = (50257, 50362), 50256  # start of transcript and no timestamps; end of text


# --- recordings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A recording and what is said in it.

    Attributes:
        name: of the file, without its suffix.
        text: as the transcript has it.
        samples: mono [n] in [-1, 1] at 16 kHz.
    """

    name: str
    text: str
    samples: Tensor


def clips(longest: float = 30.0) -> list[Clip]:
    """The clips in which something is said, in the order of their names.

    Args:
        longest: seconds; longer clips are left out, as Whisper hears 30 of them at once.
    """
    found = []
    for name, text in sorted(_transcripts().items()):
        path = folder("speech") / f"{name}.wav"
        if path.exists() and words(text):
            samples = _resampled(*read_wav(path))
            if len(samples) <= longest * RATE:
                found.append(Clip(name, text, samples))
    return found


def _transcripts() -> dict[str, str]:
    """Name of a clip -> its transcript."""
    lines = gzip.decompress((folder("speech-text") / "core-sounds-en.txt.gz").read_bytes()).decode().splitlines()
    pairs = (line.partition(":") for line in lines if not line.startswith(";"))
    return {name.strip(): text.strip() for name, colon, text in pairs if colon}


def _resampled(samples: Tensor, rate: int) -> Tensor:
    from scipy.signal import resample_poly

    if RATE % rate:
        raise ValueError(f"{rate} Hz is no whole part of {RATE} Hz")
    return torch.from_numpy(resample_poly(samples.numpy(), RATE // rate, 1).astype(np.float32))


# --- Whisper tiny.en from CTranslate2 ---------------------------------------------------------------------------------


def whisper() -> WhisperForConditionalGeneration:
    """Whisper tiny.en (Radford et al. 2022, arXiv:2212.04356; MIT), 37.8 M parameters, as float32 of float16."""
    path = folder("whisper")
    tensors, said = read_ct2(path / "model.bin"), json.loads((path / "config.json").read_text())
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    heads, layers = int(tensors["encoder/num_heads"]), sum("ffn/layer_norm/gamma" in n for n in tensors) // 2
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))}  # fmt: skip
    never = {"suppress_tokens": said["suppress_ids"], "begin_suppress_tokens": said["suppress_ids_begin"]}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)
    config = WhisperConfig(vocab_size=vocabulary, d_model=width, **sizes, **ids, decoder_start_token_id=PROMPT[0])
    model = WhisperForConditionalGeneration(config).eval()
    state = {f"model.{name}": torch.from_numpy(array.astype(np.float32)) for name, array in _renamed(tensors)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["proj_out.weight"] and not unexpected, (missing, unexpected)  # tied to the embedding
    generation: Any = model.generation_config
    generation.update(**ids, **never, decoder_start_token_id=PROMPT[0])
    generation.no_timestamps_token_id, generation.is_multilingual = PROMPT[1], False
    return model


def whisper_processor() -> WhisperProcessor:
    """Its features, log-mel spectrograms [80, 3000] of 30 seconds, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder("whisper") / "tokenizer.json"),
                                        eos_token="<|endoftext|>")  # fmt: skip
    return WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


@lru_cache(1)
def _extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor()


def features(samples: Sequence[Tensor]) -> Tensor:
    """Log-mel spectrograms [batch, 80, 3000] of mono samples [n] at 16 kHz, 30 seconds at most."""
    return _extractor()([s.numpy() for s in samples], sampling_rate=RATE, return_tensors="pt").input_features


def read_ct2(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a CTranslate2 model by name; aliases are resolved.

    The format: version, name and revision of the specification, the number of variables, and of each its name, its
    rank and shape, a byte for its type, its bytes; then pairs of names that share one.
    """
    data, at = path.read_bytes(), 0
    types = (np.float32, np.int8, np.int16, np.int32, np.float16)

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at - 1].decode()

    number("I"), text(), number("I")
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = np.dtype(types[number("B")])
        size = number("I")
        found[name] = np.frombuffer(data, kind, size // kind.itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias, name = text(), text()
        found[alias] = found[name]
    return found


def _renamed(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Names of transformers, below `model.`, and the tensors; query, key and value are one matrix in CTranslate2."""
    plain = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm"}
    for name, array in tensors.items():
        side, _, rest = name.partition("/")
        if side not in ("encoder", "decoder") or array.ndim == 0:
            continue
        if rest == "embeddings/weight":
            yield "decoder.embed_tokens.weight", array
        elif rest == "position_encodings/encodings":
            yield f"{side}.embed_positions.weight", array
        elif (first := rest.split("/")[0]) in plain:
            yield f"{side}.{first}.{_kind(rest)}", array
        elif found := re.fullmatch(r"layer_(\d+)/(\w+)/(\w+)/(\w+)", rest):
            index, block, part, _ = found.groups()
            yield from _of_block(f"{side}.layers.{index}", block, part, _kind(rest), array)


def _kind(name: str) -> str:
    return {"gamma": "weight", "beta": "bias"}.get(kind := name.rpartition("/")[2], kind)


def _of_block(layer: str, block: str, part: str, kind: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Of one block: `self_attention`, `attention` (to the encoder) or `ffn`; keys have no bias."""
    norms = {"self_attention": "self_attn", "attention": "encoder_attn", "ffn": "final"}
    if part == "layer_norm":
        yield f"{layer}.{norms[block]}_layer_norm.{kind}", array
    elif block == "ffn":
        yield f"{layer}.{'fc1' if part == 'linear_0' else 'fc2'}.{kind}", array
    else:
        own = block == "self_attention"
        parts = {("self_attention", "linear_0"): "qkv", ("self_attention", "linear_1"): "o", ("attention", "linear_0"):
                 "q", ("attention", "linear_1"): "kv", ("attention", "linear_2"): "o"}[block, part]  # fmt: skip
        for letter, piece in zip(parts, np.split(array, len(parts)), strict=True):
            name = "out_proj" if letter == "o" else f"{letter}_proj"
            if (letter, kind) != ("k", "bias"):
                yield f"{layer}.{'self_attn' if own else 'encoder_attn'}.{name}.{kind}", piece
