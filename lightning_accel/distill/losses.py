"""Losses between what a student and a teacher put out: pure functions of tensors.

    logits      T^2 * D(teacher / T, student / T) over classes           Hinton et al. 2015, arXiv:1503.02531
    hidden      1 - cos, MSE, or MSE over the teacher's mean square      arXiv:1910.01108, 1412.6550, 2310.06927
    attention   squared distance of the rows of attention maps           TinyBERT, arXiv:1909.10351

T^2 keeps the gradient at the scale of the task's (section 2.1 of the first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LOSSES = ("kl", "reverse-kl", "js", "mse")
HIDDEN_LOSSES = ("cosine", "mse", "normalized-mse")

_LEAST = torch.finfo(torch.float32).min  # log of the probability of a class that is ruled out: 0 * inf is NaN


class TopK(NamedTuple):
    """A softened distribution, truncated: the likeliest classes, and all others as one, or some drawn from them.

    Attributes:
        values: [..., k + drawn] log-probabilities at `temperature`; those of the k likeliest fall.
        indices: [..., k + drawn] their classes; what is drawn may repeat itself.
        tail: [...] log of the mass of all but the k; -inf where there is none.
        classes: number of all classes.
        temperature: T at which it was softened; truncations at two temperatures cannot be converted.
        drawn: how many were drawn from all but the k, each as often as it is likely; each stands for an equal share
            of the tail.
    """

    values: Tensor
    indices: Tensor
    tail: Tensor
    classes: int
    temperature: float
    drawn: int = 0


def top_k_of(
    logits: Tensor, k: int, temperature: float = 1.0, drawn: int = 0, generator: torch.Generator | None = None
) -> TopK:
    """The k likeliest classes of softmax(logits / temperature), and the mass of the rest.

    Args:
        logits: [..., classes].
        k: all classes are kept where there are no more than k.
        drawn: of the rest, where there is one, this many are drawn too, with `generator`.

    Raises:
        ValueError: logits that are NaN or +inf, or that rule out every class.

    >>> kept = top_k_of(torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log(), k=2)
    >>> kept.values.exp().round(decimals=3).tolist(), kept.indices.tolist()
    ([[0.5, 0.25]], [[0, 1]])
    """
    logits = logits.float() / temperature
    values, indices = logits.topk(min(k, logits.shape[-1]), -1)
    _check_teacher(values[..., 0], logits)
    tail = _rest(logits, indices)
    whole = torch.logaddexp(values.logsumexp(-1), tail)
    tail = (tail - whole).masked_fill(tail < _LEAST / 2, -math.inf)
    if drawn := drawn * (logits.shape[-1] > k):
        likely = logits.scatter(-1, indices, -math.inf).softmax(-1).nan_to_num(1.0)  # NaN of a rest that is ruled out
        more = torch.multinomial(likely.flatten(0, -2), drawn, True, generator=generator)
        indices = torch.cat((indices, more.view(*indices.shape[:-1], drawn)), -1)
        values = logits.gather(-1, indices)
    return TopK(values - whole.unsqueeze(-1), indices, tail, logits.shape[-1], temperature, drawn)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    loss: str = "kl",
    top_k: int | None = None,
) -> Tensor:
    """T^2 * D(teacher, student) of softened distributions, in nats, averaged over the positions of `mask`.

    With p = softmax(student / T), q = softmax(teacher / T) and m = (p + q) / 2:

    | loss | D | source |
    |---|---|---|
    | `kl` | KL(q, p) = sum q (log q - log p) | arXiv:1503.02531 |
    | `reverse-kl` | KL(p, q): the student leaves out what the teacher finds unlikely | arXiv:2306.08543 |
    | `js` | KL(q, m) / 2 + KL(p, m) / 2, at most log 2 | arXiv:2306.13649 |
    | `mse` | mean over classes of (student - teacher)^2, without T; for regression too | arXiv:2105.08919 |

    A class that both rule out (logit -inf) costs nothing.

    Args:
        student_logits: [..., classes].
        teacher_logits: the same shape, or truncated to `TopK` [..., k], as a cache holds it. Of one with classes that
            were drawn (importance sampling, arXiv:2503.16870) the mean over draws is KL(q, p) of all classes.
        mask: [...], true where a position counts; `None` counts all. The others may hold anything.
        loss: one of the table.
        top_k: compare the teacher's k likeliest classes and, as one more class, the rest. A lower bound of the whole
            divergence (the log sum inequality).

    Returns:
        A scalar in float32; 0 where no position counts.

    Raises:
        ValueError: the shapes of the logits, or of the mask and the positions, differ; the teacher's logits are NaN or
            +inf; one of the two rules out what the other does not where the divergence is then infinite; one class,
            which has no distribution; a `TopK` of another temperature; one with drawn classes and another loss than
            `kl`.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation_loss(logits, logits, temperature=2.0).item()
    0.0
    >>> distillation_loss(logits, torch.tensor([[0.0, 2.0]]), loss="mse").item()
    4.0
    """
    _check_shapes(student_logits, teacher_logits)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; write one of {LOSSES}")
    if mask is not None:
        student_logits, teacher_logits = _counted(student_logits, teacher_logits, mask)
    if not student_logits.numel():
        return student_logits.float().sum()
    if loss == "mse":
        return _mse_of_logits(student_logits, teacher_logits)
    if isinstance(teacher_logits, TopK) and teacher_logits.drawn:
        return temperature**2 * _kl_of_drawn(student_logits, teacher_logits, temperature, loss).mean()
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, top_k)
    _check_ruled_out(student, teacher, loss)
    if loss == "kl":
        divergence = _kl(teacher, student)
    elif loss == "reverse-kl":
        divergence = _kl(student, teacher)
    else:
        middle = torch.logaddexp(student, teacher) - math.log(2)
        divergence = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return temperature**2 * divergence.mean()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension, of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _kl_of_drawn(student: Tensor, teacher: TopK, temperature: float, loss: str) -> Tensor:
    """KL(teacher, student), the part of the rest from the classes that were drawn of it."""
    if loss != "kl":
        raise ValueError(f"the mean over draws is that of loss='kl', not of {loss!r}; write loss='kl', or drawn=0")
    _check_temperature(teacher, temperature)
    likeliest = teacher.values[..., : -teacher.drawn]
    share = (teacher.tail - math.log(teacher.drawn)).unsqueeze(-1).expand(*teacher.tail.shape, teacher.drawn)
    weights = torch.cat((likeliest, share), -1).float()
    log_student = torch.log_softmax(student.float() / temperature, -1).clamp_min(_LEAST)
    found = log_student.gather(-1, teacher.indices.long())
    _check_ruled_out(found, weights, loss)
    return (weights.exp() * (teacher.values.float().clamp_min(_LEAST) - found)).sum(-1)


def _check_temperature(teacher: TopK, temperature: float) -> None:
    if teacher.temperature != temperature:
        raise ValueError(
            f"the teacher's top {teacher.values.shape[-1] - teacher.drawn} were softened at temperature "
            f"{teacher.temperature}, the loss at {temperature}: the mass of the rest cannot be converted; write "
            f"temperature={teacher.temperature}, or build the cache again"
        )


def _log_probabilities(
    student: Tensor, teacher: Tensor | TopK, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Softened log-probabilities of both, over all classes or over the teacher's top k and the rest."""
    if student.shape[-1] == 1:
        raise ValueError(
            "logits of one class have no distribution: its probability is always 1; for a regression write "
            "DistillConfig(loss='mse')"
        )
    if top_k is not None and isinstance(teacher, Tensor):
        teacher = top_k_of(teacher, top_k, temperature)
    student = student.float() / temperature
    if isinstance(teacher, TopK):
        _check_temperature(teacher, temperature)
        indices = teacher.indices.long()
        kept, rest = student.gather(-1, indices), _rest(student, indices)
        student = torch.cat((kept, rest.unsqueeze(-1)), -1)
        expected = torch.cat((teacher.values, teacher.tail.unsqueeze(-1)), -1).float()
    else:
        expected = torch.log_softmax(teacher.float() / temperature, -1)
        if expected[..., 0].isnan().any():  # one of a row makes the whole row NaN
            _check_teacher(teacher.amax(-1), teacher)
    return torch.log_softmax(student, -1).clamp_min(_LEAST), expected.clamp_min(_LEAST)


def _rest(logits: Tensor, indices: Tensor) -> Tensor:
    """Log of the sum of exp(logits) over the classes that `indices` leaves out; -inf, or the least, of none."""
    if indices.shape[-1] == logits.shape[-1]:
        return torch.full(logits.shape[:-1], -math.inf, device=logits.device)
    return logits.scatter(-1, indices, _LEAST).logsumexp(-1)  # of -inf alone it would have a gradient of NaN


def _mse_of_logits(student: Tensor, teacher: Tensor | TopK) -> Tensor:
    if isinstance(teacher, TopK):
        raise ValueError("a truncated teacher has no logits, as loss='mse' needs them; write loss='kl'")
    _check_teacher(teacher.detach().amax(-1), teacher)
    student, teacher = student.float(), teacher.float()
    out = student.isneginf(), teacher.isneginf()
    if (out[0] != out[1]).any():
        raise ValueError(
            "one of student and teacher rules out a class (logit -inf) that the other does not, so that the distance "
            "is infinite; write loss='js', which is at most log 2"
        )
    return (student - teacher).masked_fill(out[0], 0.0).square().mean()


# --- what cannot be compared ------------------------------------------------------------------------------------------


def _check_shapes(student: Tensor, teacher: Tensor | TopK) -> None:
    expected = (*teacher.tail.shape, teacher.classes) if isinstance(teacher, TopK) else tuple(teacher.shape)
    if tuple(student.shape) == expected:
        return
    both = f"student and teacher logits differ: {tuple(student.shape)} and {expected}"
    if student.shape[-1] != expected[-1]:
        raise ValueError(
            f"{both}; they need the same classes (labels or vocabulary), and there are {student.shape[-1]} and "
            f"{expected[-1]}. Between vocabularies distil sequences: train on lightning_accel.pseudo_labels(teacher, "
            "batches), as text; between label sets distil hidden states: DistillConfig(alpha=0.0, hidden='uniform')"
        )
    raise ValueError(
        f"{both}; they need the same positions, so the same tokenizer and the same inputs. With two tokenizers distil "
        "sequences: train on lightning_accel.pseudo_labels(teacher, batches), as text"
    )


def _counted(student: Tensor, teacher: Tensor | TopK, mask: Tensor) -> tuple[Tensor, Tensor | TopK]:
    """Both at the positions that count, [n, classes]."""
    if mask.shape != student.shape[:-1]:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the positions {tuple(student.shape[:-1])}")
    mask = mask.bool()
    if isinstance(teacher, TopK):
        kept = teacher._replace(
            values=teacher.values[mask], indices=teacher.indices[mask], tail=teacher.tail[mask]
        )  # fmt: skip
        return student[mask], kept
    return student[mask], teacher[mask]


def _check_teacher(largest: Tensor, logits: Tensor) -> None:
    """Raises where a teacher's distribution does not exist: `largest` is NaN, +inf, or -inf of every class."""
    if not largest.isfinite().all():
        raise ValueError(
            f"the teacher's logits are not finite: {int(logits.isnan().sum())} NaN, {int(logits.isposinf().sum())} "
            f"+inf of {logits.numel()}, {int(largest.isneginf().sum())} positions with every class at -inf; load the "
            "teacher in float32 or bfloat16 (float16 overflows), and mask padded positions"
        )


def _check_ruled_out(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raises where the divergence is infinite: what one finds likely, however little, has log-probability -inf in the
    other. Of -inf nothing is left in the numbers that are averaged: the least float takes its place.
    """
    likely, least = (teacher, student) if loss == "kl" else (student, teacher)
    if loss == "js" or least.detach().amin() > _LEAST or not ((least == _LEAST) & (likely.exp() > 0)).any():
        return
    who = ("student", "teacher") if loss == "kl" else ("teacher", "student")
    raise ValueError(
        f"the {who[0]} rules out a class (logit -inf) that the {who[1]} does not, so that loss={loss!r} is infinite; "
        "rule it out in both, or write loss='js', which is at most log 2 (in float16, large logits overflow to it)"
    )


# --- masks, hidden states, attention maps -----------------------------------------------------------------------------


def label_mask(labels: Tensor, causal: bool = False) -> Tensor:
    """Where a label counts: it is not -100.

    Args:
        labels: [batch, length] or [batch].
        causal: position t predicts label t + 1, and the last one nothing.

    >>> label_mask(torch.tensor([[5, -100, 7]]), causal=True).tolist()
    [[False, True, False]]
    """
    counts = labels != -100
    return torch.cat((counts[:, 1:], torch.zeros_like(counts[:, :1])), 1) if causal else counts


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, loss: str = "cosine") -> Tensor:
    """Distance of hidden states, averaged over the positions of `mask`.

    | loss | for states s and t of width d | source |
    |---|---|---|
    | `cosine` | 1 - s.t / (|s| |t|), whatever their lengths | DistilBERT, arXiv:1910.01108 |
    | `mse` | |s - t|^2 / d | FitNets, arXiv:1412.6550 |
    | `normalized-mse` | sum |s - t|^2 / sum |t|^2, sums over positions: 1 for a student at 0 | arXiv:2310.06927 |

    Args:
        student, teacher: [..., d].
        mask: [...], true where a position counts; `None` counts all. The others may hold anything.

    Returns:
        A scalar in float32; 0 where no position counts.

    Raises:
        ValueError: shapes differ, or the teacher's states are NaN or infinite.

    >>> hidden_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]), loss="mse").item()
    2.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"hidden states of student and teacher differ: {tuple(student.shape)} and {tuple(teacher.shape)}; they "
            "need the same positions, and of different widths the student's is projected first"
        )
    if loss not in HIDDEN_LOSSES:
        raise ValueError(f"hidden_loss={loss!r} is unknown; write one of {HIDDEN_LOSSES}")
    if mask is not None:
        if mask.shape != student.shape[:-1]:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, the positions {tuple(student.shape[:-1])}")
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    student, teacher = student.float(), teacher.float()
    if not student.numel():
        return student.sum()
    check_states(teacher)
    if loss == "cosine":
        return 1.0 - torch.cosine_similarity(student, teacher, -1).mean()
    distance = (student - teacher).square().mean()
    return distance / teacher.square().mean().clamp_min(1e-12) if loss == "normalized-mse" else distance


def check_states(teacher: Tensor) -> None:
    """Raises ValueError where a teacher's hidden states are NaN or infinite."""
    if not teacher.isfinite().all():
        raise ValueError(
            "the teacher's hidden states are not finite; load it in float32 or bfloat16 (float16 overflows)"
        )


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of attention maps, sum over keys of (A_s - A_t)^2, averaged over heads and queries.

    As in TinyBERT (arXiv:1909.10351, equation 7), on probabilities, and summed over keys so that padding does not
    dilute it. Maps of another number of heads are averaged over heads first.

    Args:
        student, teacher: [batch, heads, queries, keys].
        mask: [batch, queries], true where a query counts; `None` counts all.

    Raises:
        ValueError: shapes other than the number of heads differ, or the teacher's maps are NaN or infinite.

    >>> attention_loss(torch.eye(2).expand(1, 3, 2, 2), torch.full((1, 2, 2, 2), 0.5)).item()
    0.5
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention maps of student and teacher differ: {tuple(student.shape)} and {tuple(teacher.shape)} "
            "[batch, heads, queries, keys]; they need the same positions, so the same tokenizer"
        )
    counted = teacher if mask is None else teacher.transpose(1, 2)[mask.bool()]
    if not counted.isfinite().all():
        raise ValueError(
            "the teacher's attention maps are not finite; load it in float32 or bfloat16 (float16 overflows)"
        )
    distance = (student - teacher).square().sum(-1).transpose(1, 2)
    if mask is not None:
        distance = distance[mask.bool()]
    return distance.mean() if distance.numel() else distance.sum()


def combine(task_loss: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """(1 - w_logits) * task + sum over terms of weight * term.

    >>> combine(torch.tensor(2.0), {"logits": torch.tensor(10.0)}, {"logits": 0.25}).item()
    4.0
    """
    loss = (1.0 - weights["logits"]) * task_loss
    for name, term in terms.items():
        loss = loss + weights[name] * term
    return loss


def logits_of(output: Any) -> Tensor | None:
    """The logits in an output: `.logits`, `["logits"]`, or the output itself if it is a float tensor [.., n]."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2 else None


def outputs_of(output: Any, inputs: Any) -> Tensor | None:
    """The same; one number for each of the inputs, as regressions put out, as [n, 1]."""
    rows = next((len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)
    flat = isinstance(output, Tensor) and output.is_floating_point() and output.shape == (rows,)
    return output.unsqueeze(-1) if flat else logits_of(output)
