"""Beam search over a KV cache, with torch alone; it finds what transformers' beam search finds.

Of each source the `beams` likeliest unfinished answers are kept. An answer that ends is scored by its log-probability
over length ** length_penalty; a source is done when its best unfinished answer, at its present length, can beat none of
`beams` finished ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .generate import Cache

Process = Callable[[Tensor, int], Tensor]  # log-probabilities of the next token [rows, V], step -> the same


def beam_search(
    cache: Cache,
    ids_BT: Tensor,
    count: int,
    beams: int,
    length_penalty: float,
    stops: tuple[int, ...],
    pad: int,
    process: Process,
) -> Tensor:
    """The best answer to each source, [B, new], filled up with `pad`.

    Args:
        cache: empty, with `beams` rows a source, one after the other.
        ids_BT: how the answer to each source begins.
        count: at most so many tokens.
        length_penalty: above 0 favours long answers, below 0 short ones.
    """
    batch = len(ids_BT)
    ends = torch.tensor(stops, dtype=torch.int64)
    wide = max(2, 1 + len(stops)) * beams  # enough for `beams` that do not end
    scores_BN = torch.full((batch, beams), -1e9)
    scores_BN[:, 0] = 0.0  # all rows of a source are still the same
    tokens_BNT = torch.zeros(batch, beams, 0, dtype=torch.int64)
    finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(batch)]
    done = [False] * batch
    fed = ids_BT.repeat_interleave(beams, 0)
    for step in range(count):
        last = torch.full((batch * beams, 1), fed.shape[1] - 1)
        logits_RV = cache.step(fed, None, last)[:, 0]
        log_RV = process(torch.log_softmax(logits_RV.float(), -1), step)
        vocabulary = log_RV.shape[-1]
        total = (log_RV.view(batch, beams, -1) + scores_BN[..., None]).flatten(1)
        top = total.topk(min(wide, total.shape[1]))
        beam_BW, token_BW = top.indices // vocabulary, top.indices % vocabulary
        longer = torch.cat([tokens_BNT.gather(1, beam_BW[..., None].expand(-1, -1, step)), token_BW[..., None]], 2)
        hits_BW = torch.isin(token_BW, ends) | (step + 1 == count)
        for row in range(batch):
            if not done[row]:
                scored = (top.values[row] / (step + 1) ** length_penalty).tolist()
                finished[row] += [(scored[i], longer[row, i]) for i in range(beams) if hits_BW[row, i]]
                finished[row] = sorted(finished[row], key=lambda answer: -answer[0])[:beams]
        running = (top.values - 1e9 * hits_BW).topk(beams)
        scores_BN, chosen_BN = running.values, running.indices
        tokens_BNT = longer.gather(1, chosen_BN[..., None].expand(-1, -1, step + 1))
        best = scores_BN[:, 0] / (step + 1) ** length_penalty
        done = [
            over or (len(answers) == beams and not float(best[row]) > answers[-1][0])
            for row, (over, answers) in enumerate(zip(done, finished, strict=True))
        ]
        if all(done):
            break
        rows = (beam_BW.gather(1, chosen_BN) + beams * torch.arange(batch)[:, None]).flatten()
        cache.reorder(rows)
        fed = tokens_BNT[..., -1].reshape(-1, 1)
    answers = [found[0][1] for found in finished]
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad)
