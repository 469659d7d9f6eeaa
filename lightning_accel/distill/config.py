"""What is learnt from the teacher, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..schedule import Between, Schedule
from .losses import HIDDEN_LOSSES, LOSSES

Weight = float | Schedule | Between
Layers = Mapping[str, str] | str | None

_MAPS = ("uniform", "last")


@dataclass(frozen=True)
class DistillConfig:
    """What is learnt from the teacher, by the callback and into a `TeacherCache`.

        loss = (1 - alpha) * task + alpha * logits + hidden_weight * hidden + attention_weight * attention

    A weight is a number, a `Schedule`, which takes it from 0 to 1, or `Between(first, last, schedule)`. While all of
    the teacher's weights are 0, the teacher is not called.

    Args:
        temperature: T > 0; above 1 it shows more of what the teacher thinks of the wrong classes.
        alpha: weight in [0, 1] of the term of the logits; the task's loss keeps `1 - alpha`.
        loss: of logits, `"kl"`, `"reverse-kl"`, `"js"` or `"mse"`; see `distillation_loss`.
        top_k: compare the teacher's k likeliest classes and the mass of all others; `None` compares every class.
        drawn: in a `TeacherCache`, this many of the others too, drawn once as often as the teacher finds them likely,
            in place of their mass: the mean over draws is the loss over every class. For vocabularies.
        hidden: hidden states to compare, as `{"student.layer": "teacher.layer"}` with names of modules below student
            and teacher, or for all layers of the student `"uniform"` (spread over the teacher's) or `"last"` (the
            teacher's last).
        hidden_loss: `"cosine"`, `"mse"` or `"normalized-mse"`; see `hidden_loss`.
        hidden_weight: weight >= 0 of the mean over the pairs of `hidden`.
        attention: attention maps to compare, as `hidden`; names of layers or of attention modules.
        attention_weight: weight >= 0 of the mean over the pairs of `attention`.

    Raises:
        ValueError: temperature not in (0, inf), alpha outside [0, 1], a negative weight or one of a term that is not
            there, an unknown loss or map, top_k < 1 or with `loss="mse"`, drawn < 0, without `top_k` or with
            another loss than `"kl"`.

    >>> DistillConfig(temperature=4.0).alpha
    0.5
    >>> DistillConfig(alpha=Between(0.9, 0.1), hidden={"model.layers.1": "model.layers.5"}).hidden_loss
    'cosine'
    """

    temperature: float = 2.0
    alpha: Weight = 0.5
    loss: str = "kl"
    top_k: int | None = None
    drawn: int = 0
    hidden: Layers = None
    hidden_loss: str = "cosine"
    hidden_weight: Weight = 1.0
    attention: Layers = None
    attention_weight: Weight = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite; write temperature=2.0")
        for name in ("alpha", "hidden_weight", "attention_weight"):
            self._check_weight(name)
        for name, known in (("loss", LOSSES), ("hidden_loss", HIDDEN_LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; write one of {known}")
        for name in ("hidden", "attention"):
            self._check_layers(name)
            if getattr(self, name) is None and (weight := getattr(self, f"{name}_weight")) != 1.0:
                raise ValueError(f"{name}_weight={weight} weighs nothing without {name}; write {name}='uniform' too")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k!r} must be at least 1 class; write top_k=32, or None for every class")
        if self.top_k is not None and self.loss == "mse":
            raise ValueError(
                "loss='mse' compares logits, and top_k keeps probabilities: the rest of the classes has a mass, no "
                "logit; write top_k=None, or loss='kl'"
            )
        if type(self.drawn) is not int or self.drawn < 0:
            raise ValueError(f"drawn={self.drawn!r} is no number of classes; write drawn=16, or 0 for none")
        if self.drawn and (self.top_k is None or self.loss != "kl"):
            raise ValueError(
                f"drawn={self.drawn} classes stand for those beside the likeliest, in loss='kl'; write "
                f"DistillConfig(loss='kl', top_k=16, drawn={self.drawn})"
            )

    def _check_weight(self, name: str) -> None:
        weight = getattr(self, name)
        ends = (weight.first, weight.last) if isinstance(weight, Between) else (weight,)
        for value in ends:
            if isinstance(value, Schedule):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={weight!r} is no weight; write {name}=0.5 or {name}=Linear(0.0, 0.5)")
            if name == "alpha" and not 0.0 <= value <= 1.0:
                raise ValueError(f"alpha={weight} is outside [0, 1]; write alpha=0.5")
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={weight} must be at least 0; write {name}=1.0")

    def _check_layers(self, name: str) -> None:
        layers = getattr(self, name)
        if layers is None or layers in _MAPS:
            return
        plain = isinstance(layers, Mapping) and all(isinstance(n, str) for pair in layers.items() for n in pair)
        if not plain or not layers:
            raise ValueError(
                f"{name}={layers!r} names no layers; write {name}={{'student.layer': 'teacher.layer'}}, "
                f"{name}='uniform' or {name}='last'"
            )

    @property
    def scheduled(self) -> list[Schedule]:
        """The schedules among the weights, to be checked against the length of training."""
        weights = (self.alpha, self.hidden_weight, self.attention_weight)
        inner = [w.schedule if isinstance(w, Between) else w for w in weights]
        return [one for one in inner if isinstance(one, Schedule)]

    def weights(self, step: int, total: float) -> dict[str, float]:
        """The weights of the teacher's terms, `logits`, `hidden` and `attention`, at an optimizer step of `total`.

        >>> DistillConfig(alpha=0.3).weights(0, 100)
        {'logits': 0.3, 'hidden': 0.0, 'attention': 0.0}
        """
        return {
            "logits": _value(self.alpha, step, total),
            "hidden": _value(self.hidden_weight, step, total) if self.hidden else 0.0,
            "attention": _value(self.attention_weight, step, total) if self.attention else 0.0,
        }


def _value(weight: Weight, step: int, total: float) -> float:
    return float(weight) if isinstance(weight, int | float) else weight.value(step, total)
