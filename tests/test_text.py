"""Texts and images in, texts and classes out, against transformers' own tokenizers, processors and `generate`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from alone import run_alone
from jinja2.exceptions import SecurityError
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    LlamaConfig,
    LlamaForSequenceClassification,
    MobileViTImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessor,
)

from lightning_accel import Export, export_model, load
from lightning_accel.chat import _compiled, render
from lightning_accel.generate import Cache
from lightning_accel.loaded import LoadedModel
from lightning_accel.text import _encode, _Writer
from lightning_accel.vision import prepare, read_image

PROMPTS = ["The import statement", "a", "What 😀 is it — exactly?"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens, most of them single bytes, with special tokens around a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[BOS]", "[EOS]"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(topics.values(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS]:1 $B:1", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", padding_side="left"
    )


@pytest.fixture(scope="module")
def writer(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """A language model and its portable program, with the tokenizer."""
    model = tiny.llama(vocab_size=300, max_position_embeddings=256)
    folder = tmp_path_factory.mktemp("text") / "artifact"
    export_model(model, folder, engines=("portable",), measure=False, processor=tokenizer)
    return model, load(folder)


@torch.no_grad()
def theirs(model: Any, tokenizer: Any, text: str, new: int) -> str:
    given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


# --- generation -------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_transformers_one_by_one_together_and_streamed(
    writer: tuple[Any, LoadedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, ours = writer
    expected = [theirs(model, tokenizer, prompt, 40) for prompt in PROMPTS]
    assert [ours.generate_text(prompt, 40) for prompt in PROMPTS] == expected
    assert ours.generate_text(PROMPTS, 40) == expected
    pieces = [list(ours.generate_text(prompt, 40, stream=True)) for prompt in PROMPTS]
    assert ["".join(p) for p in pieces] == expected and all(len(p) > 20 for p in pieces)


@pytest.mark.parametrize("length", [1, 3])
def test_an_answer_ends_before_a_stop_text(writer: tuple[Any, LoadedModel], length: int) -> None:
    _, ours = writer
    whole = ours.generate_text(PROMPTS[0], 40)
    stop = whole[12 : 12 + length]
    assert ours.generate_text(PROMPTS[0], 40, stop=stop) == whole[: whole.index(stop)]
    assert "".join(ours.generate_text(PROMPTS[0], 40, stop=("never there", stop), stream=True)) == whole.split(stop)[0]
    assert ours.generate_text(PROMPTS[0], 40, stop=None) == whole
    for wrong in ("", ("a", ""), [2]):
        with pytest.raises(ValueError, match=r"is no text that an answer could end before; write stop='###'"):
            ours.generate_text(PROMPTS[0], 40, stop=wrong)
    with pytest.raises(ValueError, match=r"holds no token ids; texts go to model\.generate_text"):
        ours.generate([1, 5], 4, stop="###")
    with pytest.raises(ValueError, match=r"would go on in the cache until all have, unseen"):
        ours.generate_text(PROMPTS[:2], 40, stop=stop, cache=ours.new_cache(capacity=99, batch=2))
    two = ours.generate_text(PROMPTS[:2], 40, stop=stop)
    assert two == [ours.generate_text(prompt, 40, stop=stop) for prompt in PROMPTS[:2]]


def test_a_piece_holds_back_what_may_become_a_stop_and_says_it_if_it_does_not(tokenizer: Any) -> None:
    made = _Writer(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), [], ("xyz",))
    ids = tokenizer("axybxyxyzc", add_special_tokens=False)["input_ids"]
    said = [made.write(token) for token in ids]
    assert "".join(said) == "axybxy" and made.ended and "x" not in "".join(said[:2])
    made = _Writer(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), [], ("xyz",))
    said = [made.write(token) for token in tokenizer("ends on xy", add_special_tokens=False)["input_ids"]]
    assert "".join(said) == "ends on " and made.end() == "xy" and made.end() == ""


def test_half_a_character_is_never_said(tokenizer: Any) -> None:
    made = _Writer(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), [], ())
    ids = tokenizer("é😀—", add_special_tokens=False)["input_ids"]
    said = [made.write(token) for token in ids]
    assert len(ids) >= 7 and [piece for piece in said if piece] == ["é", "😀", "—"]
    assert [made.write(token) for token in ids[:1]] == [""] and made.end() == "\ufffd"


def test_a_conversation_in_text_reads_each_word_once(
    writer: tuple[Any, LoadedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    _, ours = writer
    cache = ours.new_cache(capacity=120)
    answer = ours.generate_text("The first question", 20, cache=cache)
    again = ours.generate_text(" and one more", 20, cache=cache)
    past = tokenizer("The first question")["input_ids"]
    past += ours.generate([past], 20)[0].tolist() + tokenizer(" and one more", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ours.generate([past], 20)[0]) == again and answer


def test_what_is_no_text_and_an_artifact_without_a_tokenizer_are_refused(
    writer: tuple[Any, LoadedModel],
) -> None:
    _, ours = writer
    for wrong in ([1, 2, 3], [], ["a", 3], 7):
        with pytest.raises(ValueError, match="is no text and no list of texts"):
            ours.generate_text(wrong)
    with pytest.raises(ValueError, match="2 prompts cannot be streamed"):
        ours.generate_text(PROMPTS[:2], stream=True)
    bare = load(ours.directory)
    bare.manifest["assets"] = []
    with pytest.raises(ValueError, match=r"no tokenizer\.json; export it with Export\(..., processor=tokenizer\)"):
        bare.generate_text("a")


def test_text_needs_torch_and_tokenizers_alone(
    writer: tuple[Any, LoadedModel], installed: Path, tmp_path: Path
) -> None:
    code = "print(json.dumps(lightning_accel.load(sys.argv[1]).generate_text('a', 9)))"
    said = run_alone(installed, tmp_path, code, writer[1].directory, beside=["tokenizers"])
    assert said == writer[1].generate_text("a", 9)


# --- conversations ----------------------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role not in ('user', 'assistant') %}\
{{ raise_exception('who is ' + message.role) }}{% endif %}<{{ message.role }}>{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}{% else %}{{ message.content | trim }}{% endif %}
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TALK = [
    {"role": "user", "content": " The import statement "},
    {"role": "assistant", "content": "imports — é"},
    {"role": "user", "content": "What is it?"},
]


@pytest.fixture(scope="module")
def talker(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, LoadedModel]:
    """A language model, a tokenizer with a template, and the portable program."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = tiny.llama(vocab_size=300, max_position_embeddings=256)
    folder = tmp_path_factory.mktemp("chat") / "artifact"
    export_model(model, folder, engines=("portable",), measure=False, processor=tokenizer)
    return model, tokenizer, load(folder)


@torch.no_grad()
def test_a_conversation_is_written_and_answered_as_by_transformers(talker: tuple[Any, Any, LoadedModel]) -> None:
    model, tokenizer, ours = talker
    for variables in ({}, {"tools": [{"name": "<f>é"}]}):
        text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **variables)
        assert render(ours, TALK, **variables) == text
    given = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=30, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    expected = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ours.chat(TALK, 30) == expected
    assert "".join(ours.chat(TALK, 30, stream=True)) == expected
    stop = expected[9:11]
    assert ours.chat(TALK, 30, stop=stop) == expected[: expected.index(stop)]


def test_a_cache_reads_only_what_a_conversation_gained_and_forgets_what_was_changed(
    talker: tuple[Any, Any, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, ours = talker
    cache, read = ours.new_cache(capacity=200), []
    step = Cache.step

    def counting(self: Cache, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return step(self, ids, *rest)

    monkeypatch.setattr(Cache, "step", counting)
    first = ours.chat(TALK[:1], 8, cache=cache)
    begun = read[0]
    read.clear()
    talk = [*TALK[:1], {"role": "assistant", "content": first}, TALK[2]]
    assert ours.chat(talk, 8, cache=cache) == ours.chat(talk, 8)
    whole = read[8]
    assert read[0] <= whole - begun, "the first message is not read again"
    assert ours.chat(TALK, 8, cache=cache) == ours.chat(TALK, 8), "another answer than the one in the cache"
    assert ours.chat(TALK, 8, cache=cache) == ours.chat(TALK, 8), "the same again"
    with pytest.raises(ValueError, match=r"the cache is of 2 rows .*model\.new_cache\(capacity=\.\.\., batch=1\)"):
        ours.chat(TALK, 8, cache=ours.new_cache(capacity=99, batch=2))


def test_a_conversation_that_is_refused_keeps_what_its_cache_holds(talker: tuple[Any, Any, LoadedModel]) -> None:
    _, _, ours = talker
    cache = ours.new_cache(capacity=80)
    ours.chat(TALK[:1], 8, cache=cache)
    before = cache.ids_BS.clone()
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, 60 may come, and the cache holds 80"):
        ours.chat(TALK[2:], 60, cache=cache)
    with pytest.raises(ValueError, match=r"the cache is of 1 rows"):
        load(ours.directory).chat(TALK[2:], 8, cache=cache)
    assert torch.equal(cache.ids_BS, before)


def test_an_answer_ends_before_a_special_token(
    talker: tuple[Any, Any, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A special token is no text: the answer's third token is made one, and its end with it."""
    _, tokenizer, ours = talker
    plain = ours.chat(TALK, 12)
    third = int(ours.generate(ours.tokenizer.encode(render(ours, TALK), add_special_tokens=False).ids, 3)[0, 2])
    special = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    name = special.id_to_token(third)
    special.add_special_tokens([name])
    monkeypatch.setitem(ours.__dict__, "tokenizer", special)
    given = render(ours, TALK)
    assert special.encode(given, add_special_tokens=False).ids == tokenizer.backend_tokenizer.encode(
        given, add_special_tokens=False
    ).ids, "the conversation itself is read as before"
    found = ours.chat(TALK, 12, stop=name)
    assert plain.startswith(found) and 0 < len(found) < len(plain) and ours.chat(TALK, 12) != found


def test_what_is_no_conversation_and_a_tokenizer_without_a_template_are_refused(
    talker: tuple[Any, Any, LoadedModel], writer: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, ours = talker
    for wrong in ("hello", [], ["hello"]):
        with pytest.raises(ValueError, match="is no conversation; write"):
            ours.chat(wrong)
    with pytest.raises(ValueError, match=r"write model\.chat\(messages\)"):
        ours.generate_text(TALK)
    with pytest.raises(ValueError, match="refuses the messages: who is system"):
        ours.chat([{"role": "system", "content": "be brief"}])
    with pytest.raises(ValueError, match="no template of conversations; export it with processor="):
        writer[1].chat(TALK)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="conversations need the package jinja2: pip install jinja2"):
        ours.chat(TALK)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"):
        with pytest.raises(SecurityError):
            _compiled(source).render(messages=[])


# --- encoder-decoder models -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_of_an_encoder_decoder_model_are_those_of_transformers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0))
    for parameter in model.eval().parameters():
        if parameter.dim() > 1:
            parameter.mul_(2.0)
    example = dict(tokenizer(["one text", "a"], padding=True, return_tensors="pt", return_token_type_ids=False))
    export_model(
        model, tmp_path / "m", example_inputs=example, engines=("portable",), measure=False, processor=tokenizer
    )
    ours, expected = load(tmp_path / "m"), []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**given, max_new_tokens=20, do_sample=False)
        expected.append(tokenizer.decode(ids[0, 1:], skip_special_tokens=True))
    assert [ours.generate_text(prompt, 20) for prompt in PROMPTS] == expected
    assert ours.generate_text(PROMPTS, 20) == expected and len(set(expected)) == 3
    assert "".join(ours.generate_text(PROMPTS[0], 20, stream=True)) == expected[0]
    given = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    beams = model.generate(**given, max_new_tokens=20, do_sample=False, num_beams=3, length_penalty=1.0)
    found = ours.generate_text(PROMPTS[0], 20, num_beams=3)
    assert found == tokenizer.decode(beams[0, 1:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="one source at a time, without cache="):
        ours.generate_text(PROMPTS[0], cache=load(tmp_path / "m"))


# --- classification ---------------------------------------------------------------------------------------------------


def classifier(**changes: Any) -> Any:
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, id2label={0: "no", 1: "yes", 2: "perhaps"}, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("several", [False, True])
def test_classes_of_texts_and_pairs_are_those_of_transformers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, several: bool
) -> None:
    model = classifier(problem_type="multi_label_classification" if several else None)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left" if several else "right"
    example = tokenizer(["one text", "a"], padding=True, return_tensors="pt")
    export_model(
        model, tmp_path / "m", example_inputs=dict(example), engines=("portable",), measure=False, processor=tokenizer
    )
    ours = load(tmp_path / "m")
    texts = ["a", "something longer", ("one", "of two"), "xyz" * 70]
    found = ours.classify(texts, top_k=3)
    for text, classes in zip(texts, found, strict=True):
        pair = (text,) if isinstance(text, str) else text
        logits = model(**tokenizer(*pair, return_tensors="pt", truncation=True, max_length=64)).logits[0]
        scores = logits.sigmoid() if several else logits.softmax(-1)
        assert [c["label"] for c in classes] == [model.config.id2label[int(i)] for i in scores.argsort(descending=True)]
        assert [c["score"] for c in classes] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
    assert ours.classify("a") == found[0][:1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_that_are_too_long_keep_the_special_tokens_around_them(
    tokenizer: PreTrainedTokenizerFast, side: str
) -> None:
    around = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    around.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", pair="[BOS] $A [EOS] $B:1 [EOS]:1", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(around.to_str()), truncation_side=side)
    long, longer = "qu" * 35, "xyz" * 30
    pairs = [(long, "short"), ("short", long), (long, longer), (longer, long), (long, "w" * 70), ("a", "b")]
    for text in [(long,), ("a",), *pairs]:
        for limit in (64, 63):
            given = theirs(*text, truncation="longest_first", max_length=limit, return_token_type_ids=True)
            found = _encode(around, text, limit, side)
            assert (found.ids, found.type_ids) == (given["input_ids"], given["token_type_ids"])
            assert found.attention_mask == [1] * len(found.ids) and found.ids[-1] == 2
    with pytest.raises(ValueError, match="the model takes 4 tokens, which leaves none for a text"):
        _encode(around, (long, longer), 4)


@torch.no_grad()
def test_a_language_model_that_classifies_finds_the_end_of_each_text_of_a_batch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **sizes, max_position_embeddings=64, pad_token_id=7, num_labels=3)
    model = LlamaForSequenceClassification(config).eval()
    example = dict(tokenizer(["one text", "a"], padding=True, return_tensors="pt", return_token_type_ids=False))
    export_model(
        model, tmp_path / "m", example_inputs=example, engines=("portable",), measure=False, processor=tokenizer
    )
    ours, texts = load(tmp_path / "m"), ["a", "a much longer text", "another"]
    for text, classes in zip(texts, ours.classify(texts, top_k=3), strict=True):
        scores = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].softmax(-1)
        assert [c["score"] for c in classes] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
        {"resample": 3, "size": {"height": 24, "width": 31}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3},
        {"do_resize": False, "do_normalize": False},
    ],
)
def test_images_are_prepared_as_by_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    processor: Any = ViTImageProcessor(**options)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 61, 3), np.uint8)
    image = Image.fromarray(pixels).resize((122, 96))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    ours = prepare(read_image(image), processor.to_dict())
    assert ours.shape == expected.shape
    step = processor.rescale_factor / min(processor.image_std) if processor.do_normalize else processor.rescale_factor
    assert (ours - expected).abs().max() <= 1.01 * step  # a level of 256
    assert ((ours - expected).abs() > 0.5 * step).float().mean() < 0.01
    image.save(tmp_path / "image.png")
    assert torch.equal(prepare(read_image(tmp_path / "image.png"), processor.to_dict()), ours)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MobileViTImageProcessor, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        (ConvNextImageProcessor, {"size": {"shortest_edge": 32}}),
        (ConvNextImageProcessor, {"size": {"shortest_edge": 40}, "crop_pct": 0.95}),
        (ConvNextImageProcessor, {"size": {"shortest_edge": 384}, "resample": 2}),
        (EfficientNetImageProcessor, {"size": {"height": 32, "width": 32}}),
        (EfficientNetImageProcessor, {"size": {"height": 32, "width": 32}, "include_top": False}),
        (EfficientNetImageProcessor, {"size": {"height": 32, "width": 32}, "rescale_offset": True,
                                      "rescale_factor": 1 / 127.5}),
    ],
)  # fmt: skip
def test_steps_that_few_processors_know_are_theirs(kind: Any, options: dict[str, Any]) -> None:
    processor = kind(**options)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), np.uint8)).resize((488, 400))
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    config = processor.to_dict()
    ours = prepare(read_image(image), config)
    assert ours.shape == expected.shape
    std = min(processor.image_std) if config.get("do_normalize") else 1
    step = processor.rescale_factor / std / (min(processor.image_std) if config.get("include_top") else 1)
    assert (ours - expected).abs().max() <= 1.01 * step  # a level of 256
    assert ((ours - expected).abs() > 0.5 * step).float().mean() < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_pad": True}, "asks for do_pad=True"),
        ({"do_something_new": True, "do_else": False}, "asks for do_something_new=True, which is not supported"),
        ({"size": {"longest_edge": 32}}, "asks for size={'longest_edge': 32}"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "asks for size="),
        ({"crop_pct": 0.9, "image_processor_type": "PoolFormerImageProcessor"}, "asks for crop_pct=0.9"),
        ({"keep_aspect_ratio": True, "ensure_multiple_of": 32}, "keep_aspect_ratio=True, ensure_multiple_of=32"),
    ],
)
def test_steps_that_are_not_known_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = ViTImageProcessor(size={"height": 16, "width": 16}).to_dict() | options
    with pytest.raises(ValueError, match=message):
        prepare(torch.zeros(3, 20, 20, dtype=torch.uint8), config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"call model\(pixel_values\), and export without processor="):
        export_model(tiny.vit(), tmp_path / "m", example_inputs=(torch.randn(2, 3, 16, 16),), processor=tmp_path)
    assert not (tmp_path / "m").exists()


@torch.no_grad()
def test_classes_of_images(tmp_path: Path) -> None:
    model, processor = tiny.vit(), ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "processor")
    example = (torch.randn(2, 3, 16, 16),)
    options: dict[str, Any] = {"engines": ("portable",), "measure": False}
    export_model(model, tmp_path / "m", example_inputs=example, processor=tmp_path / "processor", **options)
    ours, image = load(tmp_path / "m"), torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    logits = model(prepare(image, processor.to_dict())).logits[0]
    found = ours.classify([image, image], top_k=9)
    assert [c["label"] for c in found[0]] == [c["label"] for c in found[1]] and len(found[0]) == 3
    assert found[0][0]["label"] == f"LABEL_{int(logits.argmax())}"
    assert found[0][0]["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    with pytest.raises(ValueError, match=r"an image is torch.float32 \[3, 16, 16\], expected torch.uint8"):
        ours.classify(torch.randn(3, 16, 16))
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        ours.classify("a text")
    with pytest.raises(ValueError, match="top_k=0"):
        ours.classify(image, top_k=0)


def test_a_processor_that_is_none_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    model, example = torch.nn.Linear(4, 2), (torch.randn(2, 4),)
    for wrong, message in ((7, "processor=7 is neither"), (tmp_path, "has none of tokenizer.json")):
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "m", example_inputs=example, processor=wrong)
    assert not (tmp_path / "m").exists()


def test_the_line_that_exports_again_names_the_processor(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "processor=processor" in Export("out/m", processor=tokenizer)._again()
    assert "processor='folder'" in Export("out/m", processor=Path("folder"))._again()
