"""Recordings in, text out, against transformers' feature extractor and `generate`."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers import WhisperProcessor as Processor

from lightning_accel import export_model, load
from lightning_accel.speech import ctc_text, log_mel, mel_filters, read_wav

RATE, VOCABULARY = 16000, 60
START, PLAIN, END = 57, 58, 59  # start of transcript, no timestamps, end of text
EXTRACTOR = WhisperFeatureExtractor(feature_size=16, chunk_length=1)


def speech(seconds: float = 1.5, seed: int = 0) -> Tensor:
    """Tones that come and go."""
    t = torch.arange(int(seconds * RATE)) / RATE
    generator = torch.Generator().manual_seed(seed)
    pitches = 200 + 2000 * torch.rand(8, 1, generator=generator)
    return 0.1 * (torch.sin(6.2832 * pitches * t) * (torch.sin(pitches / 50 * t) > 0)).sum(0)


def write_wav(path: Path, samples: Tensor, rate: int = RATE, channels: int = 1, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A small English Whisper, its processor, and its portable programs."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16}
    ids = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}
    limits = {"max_target_positions": 40, "max_source_positions": 50, "vocab_size": VOCABULARY}
    never = {"suppress_tokens": [3, 4], "begin_suppress_tokens": [5, END]}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **ids, **limits, **never)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    config: Any = model.generation_config
    config.no_timestamps_token_id, config.is_multilingual = PLAIN, False
    config.suppress_tokens, config.begin_suppress_tokens = never.values()
    names = [*(f"w{i}" for i in range(START)), "<|startoftranscript|>", "<|notimestamps|>", "<|end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "w0")), eos_token="<|end|>",
        additional_special_tokens=["<|startoftranscript|>", "<|notimestamps|>"],
    )  # fmt: skip
    processor = Processor(EXTRACTOR, tokenizer)
    folder = tmp_path_factory.mktemp("speech") / "m"
    example = {"input_features": torch.randn(2, 16, 100)}
    options: dict[str, Any] = {"engines": ("portable",), "measure": False}
    export_model(model, folder, example_inputs=example, processor=processor, **options)
    return model, processor, load(folder)


def test_filters_and_features_are_those_of_transformers_to_the_bit() -> None:
    samples = speech(0.7)
    for extractor in (EXTRACTOR, WhisperFeatureExtractor()):
        expected = extractor(samples.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"][0]
        assert torch.equal(log_mel(samples, extractor.to_dict()), torch.as_tensor(expected))
        filters = torch.from_numpy(extractor.mel_filters.T).float()
        assert torch.equal(mel_filters(extractor.feature_size, 400, RATE), filters)


@torch.no_grad()
def test_a_recording_is_written_down_as_by_transformers(whisper: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, processor, ours = whisper
    samples = speech(1.5)
    texts = []
    for piece in samples.split(RATE):  # a second each here, in place of thirty
        features = processor.feature_extractor(piece.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
        ids = model.generate(features, do_sample=False, max_new_tokens=30)
        texts.append(processor.tokenizer.decode(ids[0], skip_special_tokens=True))
    expected = " ".join(texts)
    found = ours.transcribe(samples, sampling_rate=RATE, max_new_tokens=30)
    assert found == expected and len(set(found.split())) > 5 and not {"w3", "w4"} & set(found.split())
    rounded, rate = read_wav(write_wav(tmp_path / "a.wav", samples))
    assert rate == RATE and (rounded - samples).abs().max() < 1e-4
    assert ours.transcribe(tmp_path / "a.wav") == ours.transcribe(rounded, sampling_rate=RATE)
    stereo = torch.stack([samples, samples], 1).flatten()
    assert ours.transcribe(write_wav(tmp_path / "b.wav", stereo, channels=2)) == ours.transcribe(tmp_path / "a.wav")


def test_a_bad_recording_says_what_to_write(whisper: tuple[Any, Any, Any], tmp_path: Path, decoder: Path) -> None:
    _, _, ours = whisper
    good = speech(0.2)
    for audio, options, message in (
        (good, {}, "the audio is of an unknown rate, the model takes 16000 Hz"),
        (good, {"sampling_rate": 8000}, "the audio is of 8000 Hz, the model takes 16000 Hz; resample it"),
        (torch.tensor([0.1, float("nan")]), {"sampling_rate": RATE}, "NaN or infinite values"),
        (torch.zeros(0), {"sampling_rate": RATE}, "no samples"),
        (torch.zeros(2, 9), {"sampling_rate": RATE}, r"expected float samples \[n\], one channel"),
        (write_wav(tmp_path / "c.wav", good, rate=8000), {}, "the audio is of 8000 Hz"),
        (write_wav(tmp_path / "d.wav", good, width=1), {}, "8 bits a sample; write it with 16"),
        (write_wav(tmp_path / "e.wav", good[:0]), {}, "no samples"),
        (good, {"sampling_rate": RATE, "language": "de"}, "transcribes English only, not language='de'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.transcribe(audio, **options)
    (tmp_path / "f.wav").write_bytes(b"no wave")
    with pytest.raises(ValueError, match="is no WAV file"):
        ours.transcribe(tmp_path / "f.wav")
    with pytest.raises(ValueError, match="takes input_ids, attention_mask, no speech"):
        load(decoder).transcribe(good, sampling_rate=RATE)


def test_speech_needs_torch_and_tokenizers_alone(whisper: tuple[Any, Any, Any], tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", torch.from_numpy(np.sin(np.arange(4000)) * 0.1))
    code = (
        "import sys, lightning_accel; lightning_accel.load(sys.argv[1]).transcribe(sys.argv[2], max_new_tokens=3)\n"
        "loaded = {'transformers', 'lightning', 'torchao', 'PIL'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code, str(whisper[2].directory), str(path)], check=True)


# --- CTC --------------------------------------------------------------------------------------------------------------

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJ"]


@pytest.fixture(scope="module")
def hearer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A small wav2vec2, its processor, and a folder of its portable program for pieces of half a second."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, vocab_size=len(LETTERS), pad_token_id=0)
    model = Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    folder = tmp_path_factory.mktemp("ctc")
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), do_lower_case=True)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer)
    options: dict[str, Any] = {"engines": ("portable",), "measure": False, "processor": processor}
    export_model(model, folder / "m", example_inputs={"input_values": torch.randn(2, RATE // 2)}, **options)
    return model, processor, folder / "m"


@torch.no_grad()
def test_frames_become_letters_as_by_transformers(hearer: tuple[Any, Any, Path]) -> None:
    model, processor, folder = hearer
    ours = load(folder)
    for seed in range(3):
        samples = speech(0.5, seed)
        given = processor(samples.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]
        ids = model(given).logits.argmax(-1)
        expected = processor.batch_decode(ids)[0]
        assert ours.transcribe(samples, sampling_rate=RATE) == expected
        assert len(set(expected)) > 2


def test_longer_recordings_are_read_in_pieces_and_shorter_ones_filled_up(hearer: tuple[Any, Any, Path]) -> None:
    ours = load(hearer[2])
    for seconds in (0.2, 1.3):
        assert ours.transcribe(speech(seconds), sampling_rate=RATE)
    for options in ({"language": "en"}, {"max_new_tokens": 3}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="a CTC model writes down what it hears"):
            ours.transcribe(speech(0.2), sampling_rate=RATE, **options)
    with pytest.raises(ValueError, match="the audio is of 8000 Hz"):
        ours.transcribe(speech(0.2), sampling_rate=8000)


def test_repetitions_collapse_unless_a_blank_is_between() -> None:
    words = {letter: i for i, letter in enumerate(LETTERS)}
    config = {"pad_token": "<pad>", "word_delimiter_token": "|"}
    assert ctc_text([6, 6, 0, 6, 4, 4, 5, 5, 4], words, config) == "BB A"
    assert ctc_text([0, 0], words, config) == "" and ctc_text([], words, config) == ""
    assert ctc_text([1, 5, 2], words, config | {"do_lower_case": True}) == "<s>a</s>", "only the blank is left out"
