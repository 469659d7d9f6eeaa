"""What is pruned, how much, and by which saliency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .groups import KINDS
from .patterns import pattern_of
from .saliency import SALIENCIES

STRUCTURES = ("unstructured", *KINDS)
_UNITS = ("units", "parameters", "flops", "latency")
_SCOPES = ("uniform", "global", "sensitivity", "latency")


@dataclass(frozen=True)
class PruneConfig:
    """What is pruned and how much; the same object goes to the functions and to the callback.

    Args:
        structure: `"unstructured"` (single weights: zeros, no speed on a CPU), or what becomes physically smaller:
            `"neurons"` (the inner width of feed-forward blocks), `"heads"` (whole groups of them where keys are
            shared), `"channels"` of convolutions, `"layers"` (whole residual blocks), `"hidden"` (the width of the
            residual stream). `"2:4"` (of 4 consecutive weights 2 stay, any n:m) and `"16x1"` (blocks of 16 outputs x 1
            input, any size) are patterns of zeros, for engines that use them: no speed on a CPU here either. A tuple
            of several is pruned together.
        amount: share in [0, 1) that is gone at the end, never a share of what is left.
        of: what the amount is a share of. `"units"`: the weights, neurons, heads .. of each layer; `"parameters"` or
            `"flops"` of the whole model, or `"latency"`, the time of its forward measured here (see `prune.latency`);
            the same share of units of all structures is then found by bisection.
        scope: `"uniform"` takes `amount` from each layer, `"global"` from all of a kind together, the least salient;
            `"latency"` from all of a kind, those of the least saliency for the time that they take here;
            `"sensitivity"` from each so much that the loss rises alike, on calibration batches (see `prune.losses`).
        overrides: glob pattern over module names -> the amount there, or `None` to leave the module alone; the
            first pattern that matches wins. For neurons the name is that of the group's first layer, for layers that of
            a block or of their list. These amounts are always shares of units.
        saliency: what makes a unit worth keeping, one of `"l1"`, `"l2"`, `"taylor"`, `"wanda"`, `"activation"`,
            `"block-influence"` and `"random"` (see `prune.saliency`); by default `"l2"`, for layers
            `"block-influence"`.
        seed: of `"random"`.
        round_to: widths of neurons, channels and hidden that are cut are left at a multiple of this many units, the
            nearest: kernels work in blocks. Heads and layers are counted one by one.

    Raises:
        ValueError: unknown structure, scope or saliency, a saliency that the structure does not have, or an amount
            outside [0, 1).

    >>> PruneConfig("neurons", amount=0.5, overrides={"head.*": None, "*.down_proj": 0.25}).scope
    'uniform'
    >>> PruneConfig(amount=50)
    Traceback (most recent call last):
    ValueError: amount=50 is outside [0, 1): it is a share, write amount=0.5 for half
    """

    structure: str | tuple[str, ...] = "unstructured"
    amount: float = 0.5
    scope: str = "uniform"
    overrides: Mapping[str, float | None] = field(default_factory=dict)
    saliency: str | None = None
    seed: int = 0
    of: str = "units"
    round_to: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.structure, list):  # from YAML
            object.__setattr__(self, "structure", tuple(self.structure))
        for structure in self.structures:
            if not isinstance(structure, str) or (structure not in STRUCTURES and pattern_of(structure) is None):
                raise ValueError(f"unknown structure {structure!r}; write one of {STRUCTURES}, '2:4' or '16x1'")
        if not self.structures or len(set(self.structures)) < len(self.structures):
            raise ValueError(f"structure={self.structure!r}: name each once, as structure=('neurons', 'heads')")
        if self.of not in _UNITS:
            raise ValueError(f"unknown of={self.of!r}; write one of {_UNITS}")
        if self.scope not in _SCOPES:
            raise ValueError(f"unknown scope {self.scope!r}; write 'uniform' or 'global', one of {_SCOPES}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"round_to={self.round_to!r} is no number of units; write round_to=16, or 1 for any width")
        self._check_latency()
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r} is no mapping; write overrides={{'head.*': None}}")
        if self.saliency is not None and self.saliency not in SALIENCIES:
            raise ValueError(f"unknown saliency {self.saliency!r}; write one of {tuple(SALIENCIES)}")
        _check_amount(self.amount)
        for amount in self.overrides.values():
            if amount is not None:
                _check_amount(amount)
        for structure in self.structures:
            self._check_saliency(structure)
            self._check_pattern(structure)

    @property
    def needs_latency(self) -> bool:
        """Whether times have to be measured."""
        return "latency" in (self.of, self.scope)

    @property
    def structures(self) -> tuple[str, ...]:
        """The structure or structures, as a tuple."""
        return (self.structure,) if isinstance(self.structure, str) else self.structure

    def _check_latency(self) -> None:
        if not self.needs_latency:
            return
        if zeros := [s for s in self.structures if s not in KINDS]:
            raise ValueError(f"{zeros[0]} zeros save no time; write structure='neurons', one of {KINDS}")
        if "hidden" in self.structures and len(self.structures) > 1:
            raise ValueError("what a hidden width saves depends on the other widths; write of='flops', scope='uniform'")

    def _check_pattern(self, structure: str) -> None:
        pattern = pattern_of(structure)
        if pattern is None or pattern[0] == "block":
            return
        _, n, m = pattern
        if n >= m:
            raise ValueError(f"{structure!r} keeps {n} of {m} weights, which is all; write for example '2:4'")
        amounts = {self.amount, *(a for a in self.overrides.values() if a is not None)}
        alone = self.scope == "uniform" and self.of == "units" and len(self.structures) == 1
        if not (alone and all(math.isclose(a, 1 - n / m) for a in amounts)):
            raise ValueError(
                f"{structure!r} alone says how much goes: write PruneConfig({structure!r}, amount={1 - n / m}), "
                "without scope, of or other structures; overrides may exclude layers"
            )

    def _check_saliency(self, structure: str) -> None:
        name = self.saliency_of(structure)
        if name == "activation" and structure not in ("neurons", "heads", "channels", "hidden"):
            better = "block-influence" if structure == "layers" else "wanda"
            raise ValueError(f"{structure} have no activation of their own; write saliency={better!r}")
        if name == "block-influence" and structure != "layers":
            raise ValueError(f"block influence is that of whole layers, not of {structure}; write saliency='l2'")

    def saliency_of(self, structure: str) -> str:
        """The saliency of a structure: as given, or its default."""
        return self.saliency or ("block-influence" if structure == "layers" else "l2")


def _check_amount(amount: float) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ValueError(f"amount={amount!r} is no number: it is a share, write amount=0.5 for half")
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"amount={amount} is outside [0, 1): it is a share, write amount=0.5 for half")
