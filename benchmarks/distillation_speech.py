"""Half of Whisper's decoder: `distillation.py`'s task on speech.

The encoder is kept as it is and frozen, as in Distil-Whisper (Gandhi et al. 2023, arXiv:2311.00430, section 3), so that
its states are computed once and teacher and student are decoders over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from distillation_tasks import WER, Examples, Source, in_turn
from quality_tasks import Batch, Settings, shuffled
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration
from word_errors import word_errors, words

from lightning_accel import student_from

LONGEST = 160  # tokens of a transcript; a clip of 30 seconds has fewer


class SpeechDecoder(nn.Module):
    """Whisper's decoder over the states of its encoder; gives logits [batch, length, vocabulary].

    Args:
        whisper: whose decoder it is.
        prompt, end: ids that a transcript begins and ends with.
    """

    def __init__(self, whisper: WhisperForConditionalGeneration, prompt: Sequence[int], end: int) -> None:
        super().__init__()
        self.decoder, self.head = whisper.model.decoder, whisper.proj_out
        generation: Any = whisper.generation_config
        self.config, self.generation, self.prompt, self.end = whisper.config, generation, tuple(prompt), end

    def forward(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        out = self.decoder(input_ids=decoder_input_ids, encoder_hidden_states=states, use_cache=False)
        return self.head(out.last_hidden_state)

    @torch.no_grad()
    def transcribe(self, states: Tensor, longest: int = LONGEST) -> list[list[int]]:
        """Ids of each clip, without prompt and end, decoded greedily.

        Args:
            states: of the encoder [batch, positions, width].
            longest: tokens at most.
        """
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.tensor([self.prompt] * len(states))
        never = list(self.generation.suppress_tokens or [])
        at_first = never + list(self.generation.begin_suppress_tokens or [])
        found: list[list[int]] = [[] for _ in range(len(states))]
        going = torch.ones(len(states), dtype=torch.bool)
        for step in range(longest):
            out = self.decoder(
                input_ids=ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            logits = self.head(out)
            logits[:, at_first if step == 0 else never] = -torch.inf
            best = logits.argmax(-1)
            going &= best != self.end
            if not going.any():
                break
            for row in going.nonzero().flatten().tolist():
                found[row].append(int(best[row]))
            ids = best[:, None]
        return found


def half_of_the_decoder(teacher: SpeechDecoder) -> SpeechDecoder:
    """The first and the last of its layers, for four of them."""
    whisper = WhisperForConditionalGeneration(teacher.config)
    whisper.model.decoder, whisper.proj_out = teacher.decoder, teacher.head
    layers = len(teacher.decoder.layers)
    student = student_from(whisper, layers={"decoder": layers // 2})
    student.generation_config = teacher.generation
    return SpeechDecoder(student, teacher.prompt, teacher.end)


# --- data -------------------------------------------------------------------------------------------------------------


def collate(samples: list[dict[str, Any]]) -> Batch:
    """States, what the decoder reads and what it is to say next; prompt and padding are no labels."""
    rows = [torch.tensor(s["ids"]) for s in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(1, ids.shape[1])
    prompt = torch.tensor([s["prompt"] for s in samples])[:, None]
    labels = ids[:, 1:].masked_fill((places < prompt) | (places >= lengths), -100)
    batch = {"states": torch.stack([s["states"] for s in samples]).float(), "decoder_input_ids": ids[:, :-1],
             "labels": labels}  # fmt: skip
    if "sample_key" in samples[0]:
        batch["sample_key"] = torch.tensor([s["sample_key"] for s in samples])
    return batch


def sample(states: Tensor, text: str, encode: Any, prompt: Sequence[int], end: int) -> dict[str, Any]:
    """A clip to learn from: its states and its transcript as Whisper would write it, after a space."""
    return {"states": states, "ids": [*prompt, *encode(f" {text}"), end], "prompt": len(prompt)}


def scores(decode: Any, model: Any, batches: list[Batch]) -> Tensor:
    """Word errors of each clip over the mean number of words of a clip: their mean is the word error rate."""
    model.eval()
    errors, lengths = [], []
    for batch in batches:
        for text, ids in zip(batch["texts"], model.transcribe(batch["states"].float()), strict=True):
            wrong, length = word_errors(text, decode(ids))
            errors.append(wrong)
            lengths.append(length)
    return torch.tensor(errors) * (len(lengths) / sum(lengths))


def in_batches(states: Sequence[Tensor], texts: list[str], size: int = 16) -> list[Batch]:
    """Clips to be transcribed."""
    return [{"states": torch.stack(list(states[k : k + size])), "texts": texts[k : k + size]}
            for k in range(0, len(texts), size)]  # fmt: skip


def clips_of(settings: Settings) -> list[Any]:
    """Training, validation and test clips; what is said in one of them is said in no other.

    Of clips with the same words the first is kept.
    """
    from real_speech import clips

    distinct = list({tuple(words(clip.text)): clip for clip in reversed(clips())}.values())[::-1]
    return [[distinct[i] for i in part] for part in shuffled(len(distinct), settings)]


def load(settings: Settings) -> Examples:
    """Asterisk's prompts."""
    from real_speech import END, PROMPT

    train, *held_out = clips_of(settings)
    encode = partial(_tokenizer().encode, add_special_tokens=False)
    learnt = [sample(states, clip.text, encode, PROMPT, END)
              for states, clip in zip(encoder_states(train), train, strict=True)]  # fmt: skip
    validation, test = (in_batches(encoder_states(part), [clip.text for clip in part]) for part in held_out)
    return Examples(learnt, partial(in_turn, len(learnt)), collate, validation, test)


@torch.no_grad()
def encoder_states(clips: list[Any], size: int = 8) -> Tensor:
    """States [clips, 1500, width] of Whisper's encoder, float16; computed once, then read from beside the downloads."""
    from real_data import cache
    from real_speech import features, whisper

    name = hashlib.sha256(" ".join(clip.name for clip in clips).encode()).hexdigest()[:16]
    path: Path = cache() / f"whisper-states-{name}.pt"
    if not path.exists():
        encoder = whisper().model.encoder
        parts = (clips[k : k + size] for k in range(0, len(clips), size))
        found = [encoder(features([clip.samples for clip in part])).last_hidden_state.half() for part in parts]
        torch.save(torch.cat(found), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return torch.load(path, mmap=True)


@lru_cache(1)
def _tokenizer() -> Any:
    from real_speech import whisper_processor

    return whisper_processor().tokenizer


def decode(ids: list[int]) -> str:
    """Text of ids."""
    return _tokenizer().decode(ids, skip_special_tokens=True)


def build() -> SpeechDecoder:
    """The decoder of tiny.en as it was released."""
    from real_speech import END, PROMPT, whisper

    return SpeechDecoder(whisper(), PROMPT, END)


SPEECH = Source(
    "whisper",
    Settings(train=300, validation=60, test=140, epochs=0, batch=8, lr=0.0, begin=0.0),
    Settings(train=16, validation=4, test=8, epochs=0, batch=4, lr=0.0, begin=0.0),
    load, build, partial(scores, decode), WER, tuned=False,
)  # fmt: skip
