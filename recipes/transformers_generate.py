"""The baseline that users know: transformers' own `generate`, timed in a worker process."""

import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Clock(StoppingCriteria):
    """Notes the time after each token; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def workloads(checkpoint: str, prompt: int, new: int) -> dict[str, Callable[[], float]]:
    """Prefill (seconds) and decode (seconds a token) of `generate` in fp32, with its KV cache."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(prompt)[None] % model.config.vocab_size

    def generate(tokens: int) -> tuple[float, list[float]]:
        clock = _Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return start, clock.times

    def prefill() -> float:
        start, times = generate(1)
        return times[0] - start

    def decode() -> float:
        _, times = generate(new + 1)
        return (times[-1] - times[0]) / new

    return {"prefill": prefill, "decode": decode}
