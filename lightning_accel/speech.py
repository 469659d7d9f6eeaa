"""Speech in, text out, over a loaded artifact: Whisper's features and prompts, with torch and `tokenizers` alone, and
models that give letters for frames (CTC, as wav2vec2), with torch alone.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .text import answer
from .vision import PREPROCESSOR

if TYPE_CHECKING:
    from .loaded import LoadedModel


def transcribe(
    model: LoadedModel,
    audio: str | Path | Tensor,
    *,
    sampling_rate: int | None = None,
    language: str | None = None,
    task: str = "transcribe",
    max_new_tokens: int | None = None,
    stream: bool = False,
    **options: Any,
) -> str | Iterator[str]:
    """The text of a recording; Whisper reads longer ones in pieces of 30 seconds.

    A CTC model's likeliest letter of each frame, repetitions once and blanks left out (Graves et al. 2006,
    doi:10.1145/1143844.1143891); it takes no other arguments than the recording. It hears a recording at its own
    length, or in pieces of the length that it was exported for where that is fixed, the last filled up with silence.

    Args:
        audio: path of a WAV file (PCM, 16 bits), or mono samples [n] in [-1, 1].
        sampling_rate: of samples, in Hz; a file says it itself. It must be the model's, 16,000 of Whisper.
        language: of a multilingual model, such as `"en"`.
        task: of a multilingual model, `"transcribe"` or `"translate"`.
        max_new_tokens: of each piece, at least 1; by default as many as fit.
        stream: of Whisper; return an iterator over the pieces of the text instead, as they come.
        options: of sampling, as in `generate`.

    Raises:
        ValueError: the model is no speech model, or the audio is empty, not finite or of another rate.
    """
    from .loaded import LoadedSeq2Seq

    names = model.input_names
    if names[0] == "input_values":
        if language is not None or task != "transcribe" or max_new_tokens is not None or stream or options:
            raise ValueError("a CTC model writes down what it hears; write transcribe(audio) without other options")
        return _transcribe_ctc(model, audio, sampling_rate)
    if not isinstance(model, LoadedSeq2Seq) or names[0] != "input_features":
        raise ValueError(
            f"this model takes {', '.join(names)}, no speech; transcribe needs an artifact of Whisper, or of a CTC "
            "model such as wav2vec2"
        )
    config = json.loads(model.asset(PREPROCESSOR).read_text())
    samples = _samples(audio, sampling_rate, config["sampling_rate"])
    begin = _begin(model, language, task)
    room = model.entry["cache"]["max_length"] - len(begin) + 1
    count = room if max_new_tokens is None else max_new_tokens
    if stream:
        return _stream(model, samples.split(config["n_samples"]), config, begin, count, options)
    ends, texts = set(model.entry["cache"]["stop"]), []
    for piece in samples.split(config["n_samples"]):
        features = log_mel(piece, config)[None]
        (ids,) = model.generate(features, decoder_input_ids=begin, max_new_tokens=count, **options).tolist()
        texts.append(model.tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True).strip())
    return " ".join(text for text in texts if text)


def _stream(
    model: LoadedModel, pieces: Sequence[Tensor], config: dict[str, Any], begin: list[int], count: int, options: Any
) -> Iterator[str]:
    """The text of recordings as it comes, which together is what `transcribe` gives of them."""
    between = ""
    for piece in pieces:
        features, held, begun = log_mel(piece, config)[None], "", False
        tokens: Any = model.generate(features, decoder_input_ids=begin, max_new_tokens=count, stream=True, **options)
        for new in answer(model, tokens):
            text = held + new if begun else new.lstrip()
            said = text.rstrip()
            held = text[len(said) :]  # blanks at the end are left out
            if said:
                yield said if begun else between + said
                between, begun = " ", True


def _transcribe_ctc(model: LoadedModel, audio: Any, sampling_rate: int | None) -> str:
    config = json.loads(model.asset(PREPROCESSOR).read_text())
    samples = _samples(audio, sampling_rate, config["sampling_rate"])
    if config["do_normalize"]:
        samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    (length,) = (spec["shape"][1] for spec in model.entry["inputs"] if spec["name"] == "input_values")
    if isinstance(length, int):
        pieces, least = samples.split(length), length
    else:
        pieces, least = samples.chunk(-(-len(samples) // length["max"])), length["min"]
    words, tokenizer = (json.loads(model.asset(name).read_text()) for name in ("vocab.json", "tokenizer_config.json"))
    blank = letter_ids(words, tokenizer)[tokenizer.get("pad_token", "<pad>")]
    ids: list[int] = []
    for piece in pieces:
        ids += [blank, *_frames(model, piece, least)]  # repetitions are not merged across a cut
    return ctc_text(ids, words, tokenizer)


def _frames(model: LoadedModel, samples: Tensor, least: int) -> list[int]:
    """The likeliest token of each frame of a piece, filled up with silence to at least so many samples."""
    size = max(least, len(samples))
    filled = torch.nn.functional.pad(samples, (0, size - len(samples)))[None]
    inputs = {"input_values": filled}
    for spec in model.entry["inputs"]:
        if spec["name"] == "attention_mask":  # int32 of transformers' feature extractor
            inputs["attention_mask"] = (torch.arange(size) < len(samples)).to(getattr(torch, spec["dtype"]))[None]
    output = model(**inputs)
    logits = output["logits"] if isinstance(output, dict) else output
    count = max(1, logits.shape[1] * len(samples) // size)
    return logits[0, :count].argmax(-1).tolist()


def ctc_text(ids: list[int], words: dict[str, Any], config: dict[str, Any]) -> str:
    """The text of the likeliest token of each frame.

    Args:
        words: token -> id, a `vocab.json`, or one such mapping for each language.
        config: a `tokenizer_config.json`; its padding token is CTC's blank, its `target_lang` the language, and its
            unknown token stands for an id without a name.

    >>> ctc_text([1, 1, 0, 1, 2, 2, 1, 0], {"<pad>": 0, "A": 1, "|": 2}, {"word_delimiter_token": "|"})
    'AA A'
    """
    names = {i: word for word, i in letter_ids(words, config).items()}
    blank, between = config.get("pad_token", "<pad>"), config["word_delimiter_token"]
    letters = [names.get(i, config.get("unk_token", "<unk>")) for i, _ in groupby(ids)]
    text = "".join(" " if letter == between else letter for letter in letters if letter != blank).strip()
    return text.lower() if config.get("do_lower_case") else text


def letter_ids(words: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Token -> id, of a `vocab.json` and of what a `tokenizer_config.json` adds to it."""
    added = {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    return added | of_language(words, config)


def of_language(words: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a `vocab.json`, whose `target_lang` says which where it holds several languages (MMS).

    Raises:
        ValueError: it holds several, and the tokenizer does not say which.
    """
    if all(isinstance(i, int) for i in words.values()):
        return words
    language = config.get("target_lang")
    if language not in words:
        raise ValueError(
            f"vocab.json holds {len(words)} languages and the tokenizer's target_lang={language!r} is none of them; "
            f"write tokenizer.set_target_lang({next(iter(words))!r}), load that language's adapter, and export again"
        )
    return words[language]


def _begin(model: LoadedModel, language: str | None, task: str) -> list[int]:
    """The tokens that tell Whisper what to write."""
    start = list(model.entry["cache"]["start"])
    if len(start) != 1:  # an English model, whose prompt is complete
        if language not in (None, "en", "english") or task != "transcribe":
            raise ValueError(f"this model transcribes English only, not language={language!r}, task={task!r}")
        return start
    if language is None:
        raise ValueError("this model knows many languages; write transcribe(..., language='en')")
    named = [f"<|{language}|>", f"<|{task}|>", "<|notimestamps|>"]
    found = [model.tokenizer.token_to_id(name) for name in named]
    if None in found:
        raise ValueError(f"the tokenizer has no token {named[found.index(None)]!r}; write a code such as language='de'")
    return [*start, *found]


def _samples(audio: Any, sampling_rate: int | None, expected: int) -> Tensor:
    """Mono samples [n], float32, of a file or a tensor at the expected rate."""
    if isinstance(audio, str | Path):
        samples, sampling_rate = read_wav(audio)
    else:
        samples = torch.as_tensor(audio)
        if samples.dim() != 1 or not samples.is_floating_point():
            raise ValueError(f"audio is {samples.dtype} {list(samples.shape)}, expected float samples [n], one channel")
    if sampling_rate != expected:
        known = f"of {sampling_rate} Hz" if sampling_rate else "of an unknown rate"
        raise ValueError(f"the audio is {known}, the model takes {expected} Hz; resample it, sampling_rate={expected}")
    if not samples.numel() or not torch.isfinite(samples).all():
        raise ValueError(f"the audio holds {'NaN or infinite values' if samples.numel() else 'no samples'}")
    return samples.float()


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Samples [n] in [-1, 1], the mean of the channels, and the rate in Hz of a WAV file of 16 bits."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise ValueError(f"{path} has {8 * file.getsampwidth()} bits a sample; write it with 16")
            count, channels, rate = file.getnframes(), file.getnchannels(), file.getframerate()
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of PCM samples ({error}); convert it") from error
    endless = 2 * channels * (count + 1) > 2**31 - 2**16  # what a program writes that did not know the length
    if len(data) % (2 * channels) or (len(data) < 2 * channels * count and not endless):
        raise ValueError(f"{path} is cut off: it holds {len(data)} of {2 * channels * count} bytes; write it again")
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16) if data else torch.zeros(0, dtype=torch.int16)
    return samples.view(-1, channels).float().mean(1) / 32768, rate


def log_mel(samples: Tensor, config: dict[str, Any]) -> Tensor:
    """log10 mel spectrogram [mels, frames] of samples [n], cut or filled up with zeros to the model's length.

    Source: Radford et al. 2022, arXiv:2212.04356, section 2.2; filters as in Slaney's Auditory Toolbox.
    """
    samples = torch.nn.functional.pad(samples, (0, config["n_samples"] - len(samples)))
    window = torch.hann_window(config["n_fft"])
    spectrum = torch.stft(samples, config["n_fft"], config["hop_length"], window=window, return_complex=True)
    power = spectrum[:, :-1].abs().square()
    mel = mel_filters(config["feature_size"], config["n_fft"], config["sampling_rate"]) @ power
    log = mel.clamp_min(1e-10).log10()
    return (log.clamp_min(log.max() - 8.0) + 4.0) / 4.0


@lru_cache
def mel_filters(mels: int, n_fft: int, sampling_rate: int) -> Tensor:
    """Triangles [mels, n_fft / 2 + 1] of equal area, evenly spaced in mel: linear to 1000 Hz, logarithmic above."""
    step = torch.tensor(6.4, dtype=torch.float64).log() / 27  # 27 steps from 1000 to 6400 Hz
    top = 15 + (torch.tensor(sampling_rate / 2, dtype=torch.float64) / 1000).log() / step
    mel = torch.linspace(0, float(top), mels + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * (step * (mel - 15)).exp())
    bins = torch.linspace(0, sampling_rate // 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return (torch.minimum(rising, falling).clamp_min(0) * (2 / (edges[2:] - edges[:-2]))[:, None]).float()
