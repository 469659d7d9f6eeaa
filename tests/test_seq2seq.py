"""Encoder-decoder models: the encoder once, the decoder with its cache, against transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation.utils import GenerationMixin

from lightning_accel import PruneConfig, QuantConfig, export_model, load, prepare_, prune_model_
from lightning_accel.loaded import LoadedSeq2Seq
from lightning_accel.quantize.config import SCHEMES

VOCABULARY, NEW = 97, 30
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_LAYERS = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def t5(layers: int = 2) -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=layers, num_heads=4, **_IDS)
    )


def bart() -> Any:
    config = BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_LAYERS, **_HEADS, **_IDS)
    config.forced_eos_token_id = None
    return BartForConditionalGeneration(config)


def marian() -> Any:
    sizes = {"vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY, "max_position_embeddings": 64}
    model = MarianMTModel(MarianConfig(**sizes, **_LAYERS, **_HEADS, **_IDS))
    model.generation_config.forced_eos_token_id = None
    return model


def whisper() -> Any:
    sizes = {"vocab_size": VOCABULARY, "max_target_positions": 64, "max_source_positions": 20, "num_mel_bins": 8}
    tokens = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens, **_LAYERS, **_HEADS, **_IDS))


MAKE: dict[str, Callable[..., Any]] = {"t5": t5, "bart": bart, "marian": marian, "whisper": whisper}


def made(name: str, **sizes: int) -> Any:
    """A small model whose answers are not all the same token."""
    torch.manual_seed(0)
    model = MAKE[name](**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.forced_eos_token_id = None
    return model


def source(name: str, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of an encoder; texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=generator)}
    mask = (torch.arange(length) < torch.tensor([length, 5, 2])[:rows, None]).long()
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=MAKE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, LoadedSeq2Seq]:
    """A model and its portable programs."""
    model, folder = made(request.param), tmp_path_factory.mktemp(request.param) / "m"
    export_model(model, folder, example_inputs=source(request.param), engines=("portable",), measure=False)
    return request.param, model, load(folder)  # type: ignore[return-value]


@torch.no_grad()
def theirs(model: Any, given: dict[str, Tensor], new: int = NEW, **options: Any) -> Tensor:
    """transformers' continuation [batch, new], without the first token."""
    options = {"do_sample": False, "num_beams": 1, **options}
    ids = model.generate(**given, max_new_tokens=new, min_new_tokens=new, **options)
    return ids[:, 1:] if ids.shape[1] > new else ids  # Whisper's own gives the new tokens only


# --- what a model always or never writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_forced_and_barred_tokens_of_the_configuration_are_those_of_transformers(tmp_path: Path, beams: int) -> None:
    """BART's own configuration ends every answer with the end of text, mBART's begin with a language."""
    model = made("bart")
    config = model.generation_config
    config.forced_eos_token_id, config.forced_bos_token_id = 2, [5]
    plain = theirs(model, source("bart"), 6)  # its likeliest tokens
    config.bad_words_ids = [[int(plain[0, 2])], [2]]  # the end of text stays
    export_model(model, tmp_path / "m", example_inputs=source("bart"), engines=("portable",), measure=False)
    given, ours = source("bart"), load(tmp_path / "m")
    with torch.no_grad():
        expected = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=beams)[:, 1:]
    found = ours.generate(**given, max_new_tokens=6, num_beams=beams)
    assert torch.equal(found, torch.nn.functional.pad(expected, (0, found.shape[1] - expected.shape[1])))
    assert (found[:, 0] == 5).all() and (found == 2).any(1).all() and not torch.equal(found, plain)


def test_what_an_artifact_does_not_do_of_the_generation_configuration_is_named(tmp_path: Path) -> None:
    model = made("bart")
    model.generation_config.no_repeat_ngram_size, model.generation_config.bad_words_ids = 3, [[4, 5]]
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size=3, bad_words_ids=of several tokens, which an artifact"):
        export_model(model, tmp_path / "m", example_inputs=source("bart"), engines=("portable",), measure=False)


# --- against transformers ---------------------------------------------------------------------------------------------


def test_logits_of_whole_answers_are_the_models(pair: tuple[str, Any, LoadedSeq2Seq]) -> None:
    name, model, ours = pair
    for rows, length in ((1, 1), (3, 11), (2, 40)):
        given = {n: t[:rows] for n, t in source(name).items()}
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(**given, decoder_input_ids=ids).logits
        torch.testing.assert_close(ours(**given, decoder_input_ids=ids), expected, atol=1e-4, rtol=1e-4)


def test_ids_are_limited_by_the_vocabulary_and_not_by_the_number_of_positions(
    pair: tuple[str, Any, LoadedSeq2Seq],
) -> None:
    name, _, ours = pair
    assert [spec.get("below") for spec in ours.encoder.entry["inputs"]] == ([None] if name == "whisper" else [97, None])
    assert ours(**source(name), decoder_input_ids=torch.full((3, 2), VOCABULARY - 1)).shape == (3, 2, VOCABULARY)


def test_greedy_answers_are_those_of_transformers(pair: tuple[str, Any, LoadedSeq2Seq]) -> None:
    name, model, ours = pair
    given = source(name)
    model.generation_config.eos_token_id = None
    expected = theirs(model, given)
    tokens = ours.generate(**given, max_new_tokens=NEW, stop=())
    assert torch.equal(tokens, expected)
    varied = ours.generate(**given, max_new_tokens=NEW, stop=(), repetition_penalty=5.0)
    assert torch.equal(varied, theirs(model, given, repetition_penalty=5.0)) and len(set(varied[0].tolist())) > 10
    for row in range(3):  # alone, and from a source of its own length
        alone = {n: t[row : row + 1] for n, t in given.items()}
        if "attention_mask" in alone:
            alone = {n: t[:, : int(given["attention_mask"][row].sum())] for n, t in alone.items()}
        assert torch.equal(ours.generate(**alone, max_new_tokens=NEW, stop=())[0], expected[row])


def test_a_model_without_a_mask_takes_one_of_ones(tmp_path: Path) -> None:
    model, ids = made("t5"), torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    export_model(model, tmp_path / "m", example_inputs={"input_ids": ids}, engines=("portable",), measure=False)
    ours, ones = load(tmp_path / "m"), torch.ones_like(ids)
    expected = ours.generate(ids, max_new_tokens=5, stop=())
    assert torch.equal(ours.generate(ids, attention_mask=ones, max_new_tokens=5, stop=()), expected)
    with pytest.raises(ValueError, match="exported without attention_mask, so a mask can only be a tensor of ones"):
        ours.generate(ids, attention_mask=ones.tril(), max_new_tokens=5, stop=())


@torch.no_grad()
def test_a_source_without_a_mask_has_no_padding(pair: tuple[str, Any, LoadedSeq2Seq]) -> None:
    name, model, ours = pair
    given = {n: t for n, t in source(name).items() if n != "attention_mask"}
    ones = {} if name == "whisper" else {"attention_mask": torch.ones_like(given["input_ids"])}
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    expected = model(**given, decoder_input_ids=ids).logits
    torch.testing.assert_close(ours(**given, decoder_input_ids=ids), expected, atol=1e-4, rtol=1e-4)
    tokens = ours.generate(**given, max_new_tokens=NEW, stop=())
    model.generation_config.eos_token_id = None
    assert torch.equal(tokens, theirs(model, {**given, **ones}))


def test_an_answer_begins_as_told_and_is_streamed(pair: tuple[str, Any, LoadedSeq2Seq]) -> None:
    name, model, ours = pair
    given, begin = source(name), torch.tensor([[1, 7, 9]]).expand(3, -1)
    with torch.no_grad():
        logits = model(**given, decoder_input_ids=begin).logits[:, -1]
    tokens = ours.generate(**given, decoder_input_ids=[1, 7, 9], max_new_tokens=6, stop=())
    assert torch.equal(tokens[:, 0], logits.argmax(-1))
    stream = ours.generate(**given, decoder_input_ids=begin, max_new_tokens=6, stop=(), stream=True)
    assert torch.equal(torch.stack(list(stream), 1), tokens)
    stop = int(tokens[0, 2])
    ended = ours.generate(**given, decoder_input_ids=begin, max_new_tokens=6, stop=(stop,), pad=-1)[0]
    assert ended[ended >= 0].tolist() == tokens[0, : tokens[0].tolist().index(stop) + 1].tolist()


@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_finds_what_transformers_finds(
    pair: tuple[str, Any, LoadedSeq2Seq], beams: int, length_penalty: float
) -> None:
    name, model, ours = pair
    given, search, lengths = source(name), {"num_beams": beams, "length_penalty": length_penalty}, set()
    for end in (int(theirs(model, given)[0, 3]), 2):  # a token that comes soon, and one that may not
        model.generation_config.eos_token_id = end
        with torch.no_grad():
            options = {"do_sample": False, "pad_token_id": 5}  # it takes a padding of 0 for none
            expected = GenerationMixin.generate(model, **given, max_new_tokens=20, **options, **search)[:, 1:]
        tokens = ours.generate(**given, max_new_tokens=20, stop=(end,), pad=5, **search)
        assert torch.equal(tokens, expected)
        lengths.add(tokens.shape[1])
    model.generation_config.eos_token_id = None
    assert max(lengths) > 10


# --- smaller, and in integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), [("t5", "int8"), ("marian", "int8"), ("whisper", "int4-int8")])
def test_pruned_and_quantized_models_answer_as_their_eager_copies(name: str, scheme: str, tmp_path: Path) -> None:
    from lightning_accel import quantize_model, shrink_model

    model, given = made(name), source(name)
    example = {**given, "decoder_input_ids": torch.ones(3, 4, dtype=torch.int64)}
    masks = prune_model_(model, PruneConfig("heads", 0.5), example_inputs=example)
    small = shrink_model(model, masks, example_inputs=example)
    config = QuantConfig(scheme)
    options: dict[str, Any] = {"example_inputs": given, "engines": ("portable",), "measure": False}
    export_model(model, tmp_path / "m", masks=masks, quantize=config, **options)
    ours, eager = load(tmp_path / "m"), quantize_model(small, config)
    assert {shape[0] for shape in ours.entry["cache"]["shapes"]} == {2}  # of four heads
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = eager(**given, decoder_input_ids=ids).logits
    logits = ours(**given, decoder_input_ids=ids)
    assert (logits - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_models_answer_as_in_training(scheme: str, tmp_path: Path) -> None:
    model, given = made("t5", layers=1), source("t5")
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    batch = given | {"decoder_input_ids": ids}
    prepare_(model, QuantConfig(scheme))
    model.train()
    model(**batch)  # ranges, where the scheme has them
    model.eval()
    export_model(model, tmp_path / "m", example_inputs=given, data=[batch], engines=("portable",), measure=False)
    expected, ours = model(**batch).logits, load(tmp_path / "m")
    assert (ours(**batch) - expected).norm() < 0.02 * expected.norm()
    tokens = ours.generate(**given, max_new_tokens=12, stop=())
    answers = torch.cat([torch.ones(3, 1, dtype=torch.int64), tokens], 1)  # the answer's first token
    best = model(**given, decoder_input_ids=answers).logits[:, :-1].argmax(-1)
    assert (best == tokens).float().mean() > 0.9


@pytest.mark.aoti
def test_compiled_int8_answers_and_the_encoder_shares_the_weights(tmp_path: Path) -> None:
    model, given = made("whisper"), source("whisper")
    prepare_(model, QuantConfig("int8"))
    export_model(model, tmp_path / "m", example_inputs=given, measure=False)
    ours = load(tmp_path / "m")
    assert ours.engine == "aoti"
    portable = load(tmp_path / "m", engine="portable")
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    ours_, theirs_ = (m(**given, decoder_input_ids=ids) for m in (ours, portable))
    assert (ours_ - theirs_).norm() < 0.02 * theirs_.norm()
    tokens = ours.generate(given["input_features"], max_new_tokens=NEW, stop=())
    assert tokens.shape == (3, NEW)
    stored = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "m" / "weights.safetensors").stat().st_size < 2 * stored  # a byte each, scales and positions


def test_encoder_and_decoder_are_timed_apart(tmp_path: Path) -> None:
    given = source("whisper")
    report = export_model(made("whisper"), tmp_path / "m", example_inputs=given, engines=("portable",))
    assert report.speedup.keys() == {"encode", "decode"}
    assert "input_features" in str(report) and "decoder_input_ids" in str(report)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_inputs_say_what_to_write(pair: tuple[str, Any, LoadedSeq2Seq]) -> None:
    name, _, ours = pair
    given = source(name)
    with pytest.raises(ValueError, match="'decoder_input_ids' is missing"):
        ours(**given)
    with pytest.raises(ValueError, match=f"is missing; the model takes {next(iter(given))}"):
        ours.generate(max_new_tokens=3)
    with pytest.raises(ValueError, match="decoder_input_ids has 2 rows, the source 3"):
        ours.generate(**given, decoder_input_ids=torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="outside the vocabulary of 97"):
        ours.generate(**given, decoder_input_ids=[1, VOCABULARY])
    for wrong, message in (({"num_beams": 0}, "num_beams=0 must"), ({"num_beams": 2, "stream": True}, "nor streamed")):
        with pytest.raises(ValueError, match=message):
            ours.generate(**given, **wrong)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json|a text does not give the input 'input_features'"):
        ours.generate_text("a text")
    with pytest.raises(ValueError, match="answers one source at a time"):
        ours.new_cache(capacity=10)
    if name in ("bart", "marian"):
        with pytest.raises(ValueError, match="length 65, allowed is 1 to 64"):
            ours.generate(torch.ones(1, 65, dtype=torch.int64), torch.ones(1, 65, dtype=torch.int64))
    if name != "t5":  # whose positions are relative
        with pytest.raises(ValueError, match="65 tokens are asked for, the model has 64 positions"):
            ours.generate(**given, max_new_tokens=65)


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_calibration_reads_the_answers_that_labels_are(name: str) -> None:
    from lightning_accel import quantize_model

    model, ids = made(name), torch.randint(3, VOCABULARY, (3, 5))
    shifted = torch.cat([torch.full((3, 1), 1), ids[:, :-1]], 1)
    labelled, given, bare = (
        [source(name, seed=seed) | answer for seed in range(8)]
        for answer in ({"labels": ids}, {"decoder_input_ids": shifted}, {})
    )
    found, expected = (quantize_model(model, QuantConfig("int8-static"), data) for data in (labelled, given))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"decodes an answer, and the calibration data has none .* decoder_input_ids$"):
        quantize_model(model, QuantConfig("int8-static"), bare)


def test_classes_are_no_answers() -> None:
    from transformers import BartForSequenceClassification

    from lightning_accel.inputs import inputs_of_batch

    config = BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3, **_LAYERS, **_HEADS, **_IDS)
    batch = source("bart") | {"labels": torch.tensor([0, 2, 1])}
    assert inputs_of_batch(BartForSequenceClassification(config), batch).keys() == source("bart").keys()
    answers = inputs_of_batch(made("bart"), source("bart") | {"labels": torch.tensor([[5, 2, -100]] * 3)})
    assert answers["decoder_input_ids"].tolist() == [[1, 5, 2]] * 3


def test_verification_reads_the_answers_that_labels_are_up_to_the_shortest(tmp_path: Path) -> None:
    model, labels = made("t5"), torch.randint(3, VOCABULARY, (3, 40))
    labels[1, 7:] = -100
    data = [source("t5") | {"labels": labels}]
    options = {"example_inputs": source("t5"), "engines": ("portable",), "measure": False}
    report = export_model(model, tmp_path / "m", data=data, quantize=QuantConfig("int8"), **options)
    found = [p["verification"]["positions"] for p in report.manifest["programs"] if "verification" in p]
    assert found == [3 * 7]


def test_whisper_asks_its_quantized_convolutions_for_their_stride() -> None:
    from lightning_accel import quantize_model

    model, ids = made("whisper"), torch.randint(3, VOCABULARY, (3, 5))
    data = [source("whisper", seed=seed) | {"decoder_input_ids": ids} for seed in range(8)]
    quantized = quantize_model(model, QuantConfig("int8-static"), data)
    encode = (m.get_encoder()(data[0]["input_features"]).last_hidden_state for m in (quantized, model))
    found, expected = encode
    assert (found - expected).norm() < 0.1 * expected.norm()
