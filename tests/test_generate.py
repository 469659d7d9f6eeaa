"""Decoding with a KV cache, against transformers' own `generate` and against the model teacher-forced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compiled import Built
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from lightning_accel import PruneConfig, QuantConfig, export_model, load, prune_model_, quantize_model, shrink_model
from lightning_accel.generate import Cache, Sampling, _choose, _penalize
from lightning_accel.loaded import LoadedModel

NEW = 30
MAKE = {"llama": tiny.llama, "gpt2": tiny.gpt2}


@pytest.fixture(scope="module", params=MAKE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """A float32 model and its portable program."""
    model = MAKE[request.param]()
    directory = tmp_path_factory.mktemp(request.param) / "artifact"
    export_model(model, directory, engines=("portable",), measure=False)
    return model, load(directory)


@pytest.fixture(scope="module")
def loaded(decoder: Path) -> LoadedModel:
    """A portable int8 llama."""
    return load(decoder)


@torch.no_grad()
def theirs(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = NEW, **more: Any) -> Tensor:
    """transformers' greedy continuation [batch, new]."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **more}
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def padded(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch, with its mask."""
    length = max(len(p) for p in prompts)
    ids, mask = torch.zeros(len(prompts), length, dtype=torch.int64), torch.zeros(len(prompts), length)
    for row, prompt in enumerate(prompts):
        at = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    return ids, mask.long()


PROMPTS = [tiny.ids(1, n, seed=n)[0] for n in (1, 4, 9, 13)]


# --- against transformers ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 17), (3, 8), (2, tiny.POSITIONS)])
def test_logits_of_whole_sequences_are_the_models(pair: tuple[Any, LoadedModel], batch: int, length: int) -> None:
    model, ours = pair
    ids = tiny.ids(batch, length)
    assert torch.allclose(ours(ids), model(ids).logits, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    for prompt in PROMPTS:
        tokens = ours.generate(prompt[None], NEW)
        assert torch.equal(tokens, theirs(model, prompt[None])) and len(set(tokens[0].tolist())) >= 6


def test_greedy_tokens_fill_all_positions_of_the_model(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    new = tiny.POSITIONS - 5
    ids = tiny.ids(1, 5)
    assert torch.equal(ours.generate(ids, new), theirs(model, ids, new=new))


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders_of_other_makers_answer_as_in_transformers_past_their_window_too(name: str, tmp_path: Path) -> None:
    model = tiny.decoder(name)
    export_model(model, tmp_path / "m", engines=("portable",), measure=False)
    ours, (ids, mask) = load(tmp_path / "m"), padded(PROMPTS, "left")
    together = ours.generate(ids, NEW, attention_mask=mask)
    for row, prompt in enumerate(PROMPTS):
        expected = theirs(model, prompt[None])
        assert torch.equal(ours.generate(prompt[None], NEW), expected) and torch.equal(together[row], expected[0])
    assert len(together.unique()) >= 6


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders_of_other_makers_shrink_and_are_quantized(name: str, tmp_path: Path) -> None:
    model, inputs, prompt = tiny.decoder(name), {"input_ids": tiny.ids()}, PROMPTS[3][None]
    masks = prune_model_(model, PruneConfig(("heads", "neurons"), amount=0.5), example_inputs=inputs)
    options = {"quantize": QuantConfig("int8"), "engines": ("portable",), "measure": False}
    export_model(model, tmp_path / "m", masks=masks, data=[inputs], **options)
    ours = load(tmp_path / "m")
    assert [shape[0] for shape in ours.entry["cache"]["shapes"]] == [1] * 2 * tiny.LAYERS
    tokens = ours.generate(prompt, NEW)
    quantized = quantize_model(shrink_model(model, masks, example_inputs=inputs), QuantConfig("int8"))
    best = quantized(torch.cat([prompt, tokens], 1)).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
    assert (best == tokens[0]).float().mean() > 0.9


@pytest.mark.parametrize("side", ["left", "right", "list"])
def test_a_batch_of_different_lengths_gives_each_prompt_its_own_continuation(
    pair: tuple[Any, LoadedModel], side: str
) -> None:
    model, ours = pair
    if side == "list":
        tokens = ours.generate([prompt.tolist() for prompt in PROMPTS], NEW)
    else:
        ids, mask = padded(PROMPTS, side)
        tokens = ours.generate(ids, NEW, attention_mask=mask)
    assert tokens.shape == (4, NEW)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(tokens[row], theirs(model, prompt[None])[0])


def test_left_padded_batches_are_those_of_transformers(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    ids, mask = padded(PROMPTS, "left")
    assert torch.equal(ours.generate(ids, NEW, attention_mask=mask), theirs(model, ids, mask))


@torch.no_grad()
def test_padding_does_not_reach_the_logits_of_real_tokens(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    ids, mask = padded(PROMPTS, "right")
    other = torch.where(mask.bool(), ids, 50)
    logits = ours(ids, attention_mask=mask)
    assert torch.equal(logits[mask.bool()], ours(other, attention_mask=mask)[mask.bool()])
    for row, prompt in enumerate(PROMPTS):
        assert torch.allclose(logits[row, : len(prompt)], model(prompt[None]).logits[0], atol=1e-4)


# --- the cache --------------------------------------------------------------------------------------------------------


def greedy(model: LoadedModel, prompt: Tensor, capacity: int, new: int) -> Tensor:
    """Tokens decoded by hand over a cache of some capacity."""
    batch, length = prompt.shape
    cache = Cache(model, batch, capacity)
    wanted = torch.full((batch, 1), length - 1)
    logits = cache.step(prompt, torch.ones_like(prompt, dtype=torch.bool), wanted)[:, 0]
    tokens = [logits.argmax(-1)]
    for _ in range(new - 1):
        one, zero = torch.ones(batch, 1, dtype=torch.bool), torch.zeros(batch, 1, dtype=torch.int64)
        tokens.append(cache.step(tokens[-1][:, None], one, zero)[:, 0].argmax(-1))
    return torch.stack(tokens, 1)


def test_a_larger_cache_gives_the_same_tokens(pair: tuple[Any, LoadedModel]) -> None:
    _, ours = pair
    prompt = tiny.ids(2, 6)
    expected = ours.generate(prompt, 20)
    for capacity in (25, 40, tiny.POSITIONS):
        assert torch.equal(greedy(ours, prompt, capacity, 20), expected)


def test_stale_contents_of_the_cache_are_not_read(loaded: LoadedModel) -> None:
    prompt, cache = tiny.ids(1, 6), Cache(loaded, 1, 20)
    valid, last = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[5]])
    expected = Cache(loaded, 1, 20).step(prompt, valid, last)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    assert torch.equal(cache.step(prompt, valid, last), expected)


@torch.no_grad()
def test_prefill_in_pieces_is_prefill_at_once(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    ids, cache, pieces = tiny.ids(2, 12), Cache(ours, 2, 12), []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        wanted = torch.arange(end - begin).expand(2, -1)
        pieces.append(cache.step(ids[:, begin:end], torch.ones(2, end - begin, dtype=torch.bool), wanted))
    assert torch.allclose(torch.cat(pieces, 1), model(ids).logits, atol=1e-4)


def test_a_full_cache_refuses_more(loaded: LoadedModel) -> None:
    cache = Cache(loaded, 1, 5)
    with pytest.raises(ValueError, match="holds 5 tokens and has 0; 6 more do not fit"):
        cache.step(tiny.ids(1, 6), torch.ones(1, 6, dtype=torch.bool), torch.tensor([[5]]))


def test_interleaved_generations_do_not_see_each_other(loaded: LoadedModel) -> None:
    one, two = tiny.ids(1, 5, seed=1), tiny.ids(2, 9, seed=2)
    alone = loaded.generate(one, 12), loaded.generate(two, 12)
    first, second = loaded.generate(one, 12, stream=True), loaded.generate(two, 12, stream=True)
    pairs = list(zip(first, second, strict=True))
    assert torch.equal(torch.stack([a for a, _ in pairs], 1), alone[0])
    assert torch.equal(torch.stack([b for _, b in pairs], 1), alone[1])


def test_threads_that_generate_at_once_do_not_see_each_other(loaded: LoadedModel) -> None:
    prompts = [tiny.ids(1, 4 + n, seed=n) for n in range(4)]
    alone = [loaded.generate(prompt, 10) for prompt in prompts]
    together: dict[int, Tensor] = {}

    def work(n: int) -> None:
        together[n] = loaded.generate(prompts[n], 10)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(together[n], alone[n]) for n in range(4))


# --- streaming, stopping, sampling ------------------------------------------------------------------------------------


def test_streamed_tokens_are_the_returned_ones(loaded: LoadedModel) -> None:
    ids = tiny.ids(3, 7)
    tokens = loaded.generate(ids, 9, stream=True)
    assert isinstance(tokens, Iterator)
    assert torch.equal(torch.stack(list(tokens), 1), loaded.generate(ids, 9))


def test_an_abandoned_iterator_harms_nothing(loaded: LoadedModel) -> None:
    ids = tiny.ids(1, 7)
    expected = loaded.generate(ids, 9)
    abandoned = loaded.generate(ids, 9, stream=True)
    next(abandoned)
    assert torch.equal(loaded.generate(ids, 9), expected)
    abandoned.close()
    assert torch.equal(loaded.generate(ids, 9), expected)


def test_a_stop_token_ends_its_row_and_the_last_row_ends_it_all(loaded: LoadedModel) -> None:
    ids = tiny.ids(2, 6, seed=4)
    free = loaded.generate(ids, 20)
    stop = int(free[0, 3])
    assert stop not in free[0, :3] and stop not in free[1], "choose another seed"
    tokens = loaded.generate(ids, 20, stop=[stop], pad=-1)
    assert tokens[0].tolist() == [*free[0, :4].tolist(), *([-1] * 16)], "the stop token is the row's last"
    assert torch.equal(tokens[1], free[1])
    assert torch.equal(loaded.generate(ids[:1], 20, stop=[stop]), free[:1, :4])


def test_sampling_is_repeatable_with_a_seed_and_leaves_the_global_state(loaded: LoadedModel) -> None:
    ids, options = tiny.ids(2, 6), {"temperature": 1.5, "seed": 7}
    before = torch.get_rng_state()
    first = loaded.generate(ids, 20, **options)
    torch.manual_seed(5)
    assert torch.equal(loaded.generate(ids, 20, **options), first)
    torch.set_rng_state(before)
    assert not torch.equal(loaded.generate(ids, 20, temperature=1.5, seed=8), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_top_1_and_a_cold_temperature_are_greedy(loaded: LoadedModel) -> None:
    ids = tiny.ids(2, 6)
    expected = loaded.generate(ids, 12)
    assert torch.equal(loaded.generate(ids, 12, temperature=3.0, top_k=1, seed=0), expected)
    assert torch.equal(loaded.generate(ids, 12, temperature=1e-6, seed=0), expected)


def test_limits_of_sampling_without_sampling_are_named(loaded: LoadedModel) -> None:
    with pytest.warns(UserWarning, match=r"top_k=5 and top_p=0\.9 without effect at temperature=0") as said:
        tokens = loaded.generate(tiny.ids(2, 6), 4, top_k=5, top_p=0.9, seed=1)
    assert torch.equal(tokens, loaded.generate(tiny.ids(2, 6), 4)) and said[0].filename == __file__
    assert torch.equal(tokens, loaded.generate(tiny.ids(2, 6), 4, top_k=1, top_p=1.0)), "nothing to warn of"


def test_only_the_k_likeliest_are_drawn_in_proportion_and_ties_add_none() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.2, 0.05]])).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(_choose(logits, Sampling(1.0, 2), generator), minlength=6) / 20_000
    assert (drawn > 0).sum() == 2 and drawn[1].item() == pytest.approx(2 / 3, abs=0.02)
    every = torch.bincount(_choose(logits, Sampling(1.0, 99), generator), minlength=6) / 20_000
    assert every.tolist() == pytest.approx([0.1, 0.4, 0.2, 0.05, 0.2, 0.05], abs=0.02)
    flat = torch.bincount(_choose(logits, Sampling(1e4), generator), minlength=6) / 20_000
    assert flat.tolist() == pytest.approx([1 / 6] * 6, abs=0.02)


def test_the_nucleus_is_that_of_transformers_and_is_drawn_in_proportion() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 50, generator=generator)
    for top_k, top_p in ((None, 0.3), (None, 0.9), (5, 0.7), (5, 1.0), (None, 1e-9)):
        expected = logits / 0.7
        if top_k is not None:
            expected = TopKLogitsWarper(top_k)(None, expected)
        expected = torch.softmax(TopPLogitsWarper(top_p)(None, expected), -1)
        for row, wanted in zip(logits, expected, strict=True):
            drawn = _choose(row.expand(20_000, -1), Sampling(0.7, top_k, top_p), generator)
            share = torch.bincount(drawn, minlength=50) / 20_000
            assert not (share > 0)[wanted == 0].any() and (share - wanted).abs().max() < 0.02


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids, logits = tiny.ids(3, 7), torch.randn(3, tiny.VOCABULARY)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    assert torch.equal(_penalize(logits, ids, torch.ones_like(ids, dtype=torch.bool), 1.3), expected)
    mask = torch.tensor([True] * 4 + [False] * 3).expand(3, -1)  # padding is no repetition
    assert torch.equal(_penalize(logits, ids, mask, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids[:, :4], logits))


def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    for prompt in PROMPTS:
        tokens = ours.generate(prompt[None], NEW, repetition_penalty=1.4)
        assert torch.equal(tokens, theirs(model, prompt[None], repetition_penalty=1.4))
        assert not torch.equal(tokens, ours.generate(prompt[None], NEW))


# --- where a text ends ------------------------------------------------------------------------------------------------


def test_the_models_end_of_text_stops_a_row_unless_told_otherwise(tmp_path: Path) -> None:
    free = MAKE["llama"]()
    end = int(theirs(free, PROMPTS[1][None])[0, 4])
    model = tiny.llama(eos_token_id=end)
    export_model(model, tmp_path / "m", engines=("portable",), measure=False)
    ours = load(tmp_path / "m")
    options = {"attention_mask": torch.ones_like(PROMPTS[1][None]), "max_new_tokens": NEW, "pad_token_id": 0}
    expected = model.generate(PROMPTS[1][None], do_sample=False, **options)
    tokens = ours.generate(PROMPTS[1][None], NEW)
    assert torch.equal(tokens, expected[:, len(PROMPTS[1]) :]) and tokens[0, -1] == end and tokens.shape[1] <= 5
    assert ours.generate(PROMPTS[1][None], NEW, stop=()).shape == (1, NEW)


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_without_reading_its_past_again(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    cache, past = ours.new_cache(capacity=tiny.POSITIONS, batch=2), torch.zeros(2, 0, dtype=torch.int64)
    for turn, length in enumerate((5, 3, 1)):
        said = tiny.ids(2, length, seed=turn)
        past = torch.cat([past, said], 1)
        answer = ours.generate(said, 8, cache=cache)
        assert torch.equal(answer, theirs(model, past, new=8))
        past = torch.cat([past, answer], 1)
        assert cache.filled == past.shape[1] - 1  # what was chosen last is read with what comes next


def test_rows_of_a_conversation_that_stopped_go_on_after_their_stop(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    prompts = torch.stack([tiny.ids(1, 6, seed=0)[0], tiny.ids(1, 6, seed=1)[0]])
    free = theirs(model, prompts, new=8)
    stop = int(free[0, 2])
    cache = ours.new_cache(capacity=40, batch=2)
    answer = ours.generate(prompts, 8, stop=(stop,), pad=-1, cache=cache)
    more = ours.generate(tiny.ids(2, 3, seed=2), 6, stop=(), cache=cache)
    for row in range(2):
        past = torch.cat([prompts[row], answer[row][answer[row] >= 0], tiny.ids(2, 3, seed=2)[row]])
        assert torch.equal(more[row], theirs(model, past[None], new=6)[0])
    assert (answer[0] >= 0).sum() < 8


def test_a_stream_that_is_left_leaves_the_conversation_where_it_was_heard(pair: tuple[Any, LoadedModel]) -> None:
    model, ours = pair
    cache, prompt = ours.new_cache(capacity=40), tiny.ids(1, 6)
    stream = ours.generate(prompt, 20, stream=True, cache=cache)
    heard = torch.stack([next(stream) for _ in range(4)], 1)
    stream.close()
    past = torch.cat([prompt, heard, tiny.ids(1, 2, seed=1)], 1)
    assert torch.equal(ours.generate(tiny.ids(1, 2, seed=1), 6, cache=cache), theirs(model, past, new=6))


def test_a_conversation_that_would_not_fit_is_refused_and_stays_as_it_is(loaded: LoadedModel) -> None:
    cache = loaded.new_cache(capacity=12)
    expected = loaded.generate(torch.cat([tiny.ids(1, 4), loaded.generate(tiny.ids(1, 4), 4), tiny.ids(1, 1)], 1), 3)
    loaded.generate(tiny.ids(1, 4), 4, cache=cache)
    with pytest.raises(ValueError, match=r"holds 12 tokens and has 7; 6 more do not fit.*new_cache\(capacity="):
        loaded.generate(tiny.ids(1, 1), 5, cache=cache)
    assert torch.equal(loaded.generate(tiny.ids(1, 1), 3, cache=cache), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_cache_of_other_rows_or_models_is_refused(pair: tuple[Any, LoadedModel], loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"the cache is of 1 rows .*the prompts are 2 .*batch=2"):
        loaded.generate(tiny.ids(2, 4), cache=loaded.new_cache(capacity=40))
    with pytest.raises(ValueError, match="the cache is of 1 rows"):
        loaded.generate(tiny.ids(1, 4), 4, cache=pair[1].new_cache(capacity=40))
    for wrong in ({"capacity": 0}, {"capacity": 2.5}, {"capacity": 10, "batch": 0}):
        with pytest.raises(ValueError, match="must be an int of at least 1"):
            loaded.new_cache(**wrong)
    with pytest.raises(ValueError, match="65 tokens are asked for, the model has 64 positions"):
        loaded.new_cache(capacity=65)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "a prompt is empty; give at least one token"),
        (([[1, 2], []],), "a prompt is empty"),
        ((torch.zeros(1, 0, dtype=torch.int64),), r"shape \[1, 0\], expected \[batch, length\]"),
        ((torch.tensor([1, 2]),), r"shape \[2\].*write input_ids\[None\]"),
        ((torch.zeros(1, 3),), "is torch.float32 on cpu, expected torch.int64"),
        ((torch.tensor([[3, tiny.VOCABULARY]]),), f"token id {tiny.VOCABULARY} is outside the vocabulary of 97"),
        ((torch.tensor([[-1, 3]]),), "token id -1 is outside the vocabulary"),
        ((torch.zeros(1025, 1, dtype=torch.int64),), "batch of 1025 is over the limit of 1024"),
        ((tiny.ids(1, 40), 26), "65 tokens are asked for, the model has 64 positions; shorten the prompt"),
        ((tiny.ids(1, 65), 1), "65 tokens are asked for"),
        ((tiny.ids(1, 4), 0), "max_new_tokens=0 must be an int of at least 1"),
    ],
)
def test_a_bad_prompt_is_refused(loaded: LoadedModel, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.generate(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "a row of attention_mask is all padding"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 2, dtype=torch.int64)}, r"shape \[2, 2\], input_ids \[2, 3\]"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number of at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be an int of at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must be a probability in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 50}, "top_p=50 must be a probability"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan must be positive"),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(loaded: LoadedModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.generate(tiny.ids(2, 3), 4, stream=True, **options)


def test_the_last_position_is_not_one_too_many(loaded: LoadedModel) -> None:
    assert loaded.generate(tiny.ids(1, 40), 25).shape == (1, 25)
    assert loaded(tiny.ids(1, 64)).shape == (1, 64, 97)


# --- the compiled program ---------------------------------------------------------------------------------------------


@pytest.mark.aoti
def test_compiled_fp32_greedy_tokens_are_those_of_transformers(gpt2_fp32: Built) -> None:
    model, ours = gpt2_fp32.eager, gpt2_fp32.load()
    for prompt in PROMPTS:
        assert torch.equal(ours.generate(prompt[None], NEW), theirs(model, prompt[None]))
    ids, mask = padded(PROMPTS, "left")
    assert torch.equal(ours.generate(ids, NEW, attention_mask=mask), theirs(model, ids, mask))


@pytest.mark.aoti
@pytest.mark.parametrize("name", ["gpt2_fp32", "llama_int8"])
def test_the_capacity_of_a_compiled_cache_does_not_change_the_tokens(name: str, request: pytest.FixtureRequest) -> None:
    ours, prompt = request.getfixturevalue(name).load(), tiny.ids(2, 6)
    expected = ours.generate(prompt, 20)
    for capacity in (25, tiny.POSITIONS):
        assert torch.equal(greedy(ours, prompt, capacity, 20), expected)


@pytest.mark.aoti
def test_stale_contents_of_a_compiled_cache_are_not_read(llama_int8: Built) -> None:
    ours, prompt = llama_int8.load(), tiny.ids(2, 6)
    valid, last = torch.ones(2, 6, dtype=torch.bool), torch.full((2, 1), 5)
    cache, expected = Cache(ours, 2, 20), Cache(ours, 2, 20).step(prompt, valid, last)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    assert torch.equal(cache.step(prompt, valid, last), expected)


@pytest.mark.aoti
def test_compiled_generations_at_once_do_not_see_each_other(llama_int8: Built) -> None:
    ours = llama_int8.load()
    prompts = [tiny.ids(1 + n, 4 + n, seed=n) for n in range(3)]
    alone = [ours.generate(prompt, 12) for prompt in prompts]
    streams = [ours.generate(prompt, 12, stream=True) for prompt in prompts]
    for row in zip(*streams, strict=True):
        for n, tokens in enumerate(row):
            assert torch.equal(tokens, alone[n][:, 0])
            alone[n] = alone[n][:, 1:]


@pytest.mark.aoti
def test_compiled_batches_of_different_lengths_give_each_prompt_its_own_continuation(llama_int8: Built) -> None:
    ours = llama_int8.load()
    together = ours.generate([prompt.tolist() for prompt in PROMPTS], 8)
    assert [together[n].tolist() for n in range(4)] == [ours.generate(p[None], 8)[0].tolist() for p in PROMPTS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan must be a number"),
        ({"temperature": float("inf")}, "temperature=inf must be a number"),
        ({"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5 must be an int"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be an int"),
        ({"stop": 5}, r"stop=5 is one id; write stop=\(5,\)"),
    ],
)
def test_numbers_of_the_wrong_kind_say_what_to_write(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        load(decoder).generate([[1, 2]], **options)


def test_the_least_temperature_is_greedy(decoder):
    model = load(decoder)
    assert torch.equal(model.generate([[1, 2, 3]], 6, temperature=1e-40, seed=0), model.generate([[1, 2, 3]], 6))


def test_memory_and_open_files_stay_flat_over_many_generations(monkeypatch, capsys):
    """The quick form of `benchmarks/serving.py soak`, which makes 20,000."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import serving

    rows = serving.soak(str(Path(__file__).parent / "data" / "golden"), 300)[2:]  # the first make their buffers
    memory, files = ([row[i] for row in rows] for i in (1, 2))
    assert max(memory) - memory[0] < 4 << 20
    assert set(files) == {files[0]}
