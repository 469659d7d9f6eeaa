"""Recordings in, text out, against transformers' feature extractor and `generate`."""

from __future__ import annotations

import copy
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import run_alone
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

from lightning_accel import QuantConfig, engines, export_model, load
from lightning_accel.build import processor_files
from lightning_accel.speech import ctc_text, letter_ids, log_mel, mel_filters, read_wav

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


@pytest.fixture(scope="module")
def several(whisper: tuple[Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The same of two languages and two tasks."""
    model = copy.deepcopy(whisper[0])
    named = {"<|en|>": 50, "<|de|>": 51, "<|transcribe|>": 52, "<|translate|>": 53}
    config: Any = model.generation_config
    config.is_multilingual = True
    config.lang_to_id = {name: named[name] for name in ("<|en|>", "<|de|>")}
    config.task_to_id = {"transcribe": 52, "translate": 53}
    config.suppress_tokens = [*config.suppress_tokens, *named.values()]
    names = [*(f"w{i}" for i in range(50)), *named, "w54", "w55", "w56"]
    special = ["<|startoftranscript|>", "<|notimestamps|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({n: i for i, n in enumerate([*names, *special, "<|end|>"])}, "w0")
        ),
        eos_token="<|end|>", additional_special_tokens=[*named, *special],
    )  # fmt: skip
    folder, processor = tmp_path_factory.mktemp("several") / "m", Processor(EXTRACTOR, tokenizer)
    options: dict[str, Any] = {"engines": ("portable",), "measure": False, "processor": processor}
    export_model(model, folder, example_inputs={"input_features": torch.randn(2, 16, 100)}, **options)
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


def test_other_widths_and_cut_files_are_named(tmp_path: Path) -> None:
    write_wav(tmp_path / "24.wav", speech(0.1)[:1200], width=3)
    good = write_wav(tmp_path / "good.wav", speech(0.1), channels=2).read_bytes()
    float_format = good[:20] + (3).to_bytes(2, "little") + good[22:34] + (32).to_bytes(2, "little") + good[36:]
    for name, data, message in (
        ("24.wav", None, "24.wav has 24 bits a sample; write it with 16"),
        ("float.wav", float_format, "float.wav is no WAV file of PCM samples .*3.*; convert it"),
        ("within.wav", good[:-3], "within.wav is cut off: it holds 3197 of 3200 bytes"),
        ("between.wav", good[:-400], "between.wav is cut off: it holds 2800 of 3200 bytes"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_wav(tmp_path / name)
    unknown = good[:40] + b"\xff\xff\xff\xff" + good[44:]  # of a program that wrote to a pipe
    (tmp_path / "pipe.wav").write_bytes(unknown)
    assert torch.equal(read_wav(tmp_path / "pipe.wav")[0], read_wav(tmp_path / "good.wav")[0])


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


@torch.no_grad()
@pytest.mark.parametrize(("language", "task"), [("en", "transcribe"), ("de", "transcribe"), ("de", "translate")])
def test_languages_and_tasks_are_begun_as_by_transformers(
    several: tuple[Any, Any, Any], language: str, task: str
) -> None:
    model, processor, ours = several
    samples = speech(0.9)
    features = EXTRACTOR(samples.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
    ids = model.generate(features, language=language, task=task, do_sample=False, max_new_tokens=12)
    found = ours.transcribe(samples, sampling_rate=RATE, language=language, task=task, max_new_tokens=12)
    assert found == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip() and len(found.split()) > 5


def test_a_language_must_be_said_and_known(several: tuple[Any, Any, Any]) -> None:
    ours = several[2]
    for options, message in (
        ({}, r"knows many languages; write transcribe\(..., language='en'\)"),
        ({"language": "fr"}, "no token '<|fr|>'"),
        ({"language": "de", "task": "sing"}, "no token '<|sing|>'"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            ours.transcribe(speech(0.2), sampling_rate=RATE, **options)


def test_a_text_comes_in_pieces_that_make_the_whole(whisper: tuple[Any, Any, Any]) -> None:
    _, _, ours = whisper
    options: dict[str, Any] = {"sampling_rate": RATE, "max_new_tokens": 12}
    pieces = list(ours.transcribe(speech(1.5), stream=True, **options))
    assert "".join(pieces) == ours.transcribe(speech(1.5), **options) and len(pieces) > 5
    for stream in (False, True):
        with pytest.raises(ValueError, match="max_new_tokens=0 must be an int of at least 1"):
            list(ours.transcribe(speech(0.2), sampling_rate=RATE, max_new_tokens=0, stream=stream))


def test_speech_needs_torch_and_tokenizers_alone(
    whisper: tuple[Any, Any, Any], installed: Path, tmp_path: Path
) -> None:
    path = write_wav(tmp_path / "a.wav", torch.from_numpy(np.sin(np.arange(4000)) * 0.1))
    code = "print(json.dumps(lightning_accel.load(sys.argv[1]).transcribe(sys.argv[2], max_new_tokens=9)))"
    said = run_alone(installed, tmp_path, code, whisper[2].directory, path, beside=["tokenizers"])
    assert said == whisper[2].transcribe(path, max_new_tokens=9)


# --- CTC --------------------------------------------------------------------------------------------------------------

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJ"]


@pytest.fixture(scope="module", params=["group", "layer"])
def hearer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A small wav2vec2, its processor, and a folder of its portable program; norms of layers come with a mask."""
    masked = request.param == "layer"
    model = small_wav2vec2(feat_extract_norm=request.param)
    processor = letters(tmp_path_factory.mktemp("letters"), masked)
    folder = tmp_path_factory.mktemp("ctc") / "m"
    example = {"input_values": torch.randn(2, RATE // 2)}
    if masked:
        example["attention_mask"] = torch.ones(2, RATE // 2, dtype=torch.int32)  # as of the feature extractor
    export_model(model, folder, example_inputs=example, processor=processor, engines=("portable",), measure=False)
    return model, processor, folder


def small_wav2vec2(kind: Any = Wav2Vec2ForCTC, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, **options, vocab_size=len(LETTERS), pad_token_id=0)
    model = kind(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    return model


def letters(folder: Path, masked: bool = False, words: Any = None, **options: Any) -> Any:
    """A processor with a vocabulary, by default of `LETTERS`."""
    words = words or {letter: i for i, letter in enumerate(LETTERS)}
    (folder / "vocab.json").write_text(json.dumps(words))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), do_lower_case=True, **options)
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=masked), tokenizer)


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


@torch.no_grad()
def test_a_recording_is_heard_at_its_own_length(hearer: tuple[Any, Any, Path]) -> None:
    model, processor, folder = hearer
    ours = load(folder)
    for seconds in (0.2, 1.3):
        given = processor(speech(seconds).numpy(), sampling_rate=RATE, return_tensors="pt")
        logits = model(**given).logits
        torch.testing.assert_close(ours(**given)["logits"], logits, rtol=1e-4, atol=1e-4)
        expected = processor.batch_decode(logits.argmax(-1))[0]
        assert ours.transcribe(speech(seconds), sampling_rate=RATE) == expected and len(set(expected)) > 2
    assert ours.transcribe(speech(0.001), sampling_rate=RATE) is not None, "filled up to what the convolutions need"


@pytest.mark.aoti
def test_compiled_and_in_other_engines_letters_are_those_of_the_portable_program(tmp_path: Path) -> None:
    others = [name for name in ("onnx", "openvino") if engines.not_installed(name) is None]
    example, processor = {"input_values": torch.randn(2, RATE // 2)}, letters(tmp_path)
    export_model(
        small_wav2vec2(), tmp_path / "m", example_inputs=example, processor=processor, measure=False,
        quantize=QuantConfig("int8-static"), calibration=[{"input_values": speech(0.5, s)[None]} for s in range(4)],
        engines=("aoti", "portable", *others),
    )  # fmt: skip
    portable = load(tmp_path / "m", engine="portable")
    for name in ("aoti", *others):
        ours = load(tmp_path / "m", engine=name)
        for seconds in (0.2, 1.3):
            given = processor(speech(seconds).numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]
            found, expected = ours(given)["logits"], portable(given)["logits"]
            assert (found - expected).norm() < 2e-3 * expected.norm(), f"{name}, {seconds} s"
            heard = portable.transcribe(speech(seconds), sampling_rate=RATE)
            assert ours.transcribe(speech(seconds), sampling_rate=RATE) == heard and len(set(heard)) > 2


def test_a_ctc_model_takes_the_recording_alone(hearer: tuple[Any, Any, Path]) -> None:
    ours = load(hearer[2])
    for options in ({"language": "en"}, {"max_new_tokens": 3}, {"temperature": 1.0}, {"stream": True}):
        with pytest.raises(ValueError, match="a CTC model writes down what it hears"):
            ours.transcribe(speech(0.2), sampling_rate=RATE, **options)
    with pytest.raises(ValueError, match="the audio is of 8000 Hz"):
        ours.transcribe(speech(0.2), sampling_rate=8000)


class FixedForCTC(Wav2Vec2ForCTC):
    """One that torch.export captures at a fixed length only."""

    def forward(self, input_values: Tensor) -> Any:
        if not isinstance(input_values.shape[1], int):
            raise TypeError("the length must be a number")
        return super().forward(input_values)


@torch.no_grad()
def test_at_a_fixed_length_repetitions_are_not_merged_across_a_cut(tmp_path: Path) -> None:
    model, processor = small_wav2vec2(FixedForCTC), letters(tmp_path)
    model.lm_head.weight.zero_()
    model.lm_head.bias.copy_(torch.eye(len(LETTERS))[LETTERS.index("A")])
    example = {"input_values": torch.randn(2, RATE // 2)}
    options: dict[str, Any] = {"engines": ("portable",), "measure": False, "processor": processor}
    with pytest.warns(UserWarning, match=r"FixedForCTC cannot be captured at a free length, .* the length must be a"):
        export_model(model, tmp_path / "m", example_inputs=example, **options)
    ours = load(tmp_path / "m")
    assert ours.entry["inputs"][0]["shape"][1] == RATE // 2
    assert ours.transcribe(speech(0.5), sampling_rate=RATE) == "a"
    assert ours.transcribe(speech(1.3), sampling_rate=RATE) == "aaa"


def test_repetitions_collapse_unless_a_blank_is_between() -> None:
    words = {letter: i for i, letter in enumerate(LETTERS)}
    config = {"pad_token": "<pad>", "word_delimiter_token": "|"}
    assert ctc_text([6, 6, 0, 6, 4, 4, 5, 5, 4], words, config) == "BB A"
    assert ctc_text([0, 0], words, config) == "" and ctc_text([], words, config) == ""
    assert ctc_text([1, 5, 2], words, config | {"do_lower_case": True}) == "<s>a</s>", "only the blank is left out"


def test_ids_that_vocab_json_lacks_are_written_as_by_transformers(tmp_path: Path) -> None:
    words = {"<pad>": 0, "A": 1, "|": 2}
    tokenizer = letters(tmp_path, words=words).tokenizer  # <s>, </s> and <unk> are added behind them
    tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    ids = [1, 3, 4, 1, 0, 5, 2, 9, 1]
    assert ctc_text(ids, words, config) == tokenizer.decode(ids) and "a" in tokenizer.decode(ids)
    assert letter_ids({"A": 1}, {"added_tokens_decoder": {"7": {"content": "<pad>"}}}) == {"A": 1, "<pad>": 7}


def test_letters_of_several_languages_need_one_that_is_chosen(tmp_path: Path) -> None:
    words = {"deu": {"<pad>": 0, "|": 1, "D": 2}, "eng": {"<pad>": 0, "|": 1, "E": 2}}
    chosen = letters(tmp_path, words=words, target_lang="eng")
    files = processor_files(chosen, tmp_path / "chosen")
    saved, config = (json.loads(files[name].read_text()) for name in ("vocab.json", "tokenizer_config.json"))
    assert ctc_text([2, 0, 2], saved, config) == chosen.tokenizer.decode([2, 0, 2]) == "ee"
    files["tokenizer_config.json"].write_text(json.dumps({**config, "target_lang": None}))
    with pytest.raises(ValueError, match=r"holds 2 languages .* write tokenizer.set_target_lang\('deu'\)"):
        processor_files(tmp_path / "chosen", tmp_path)
