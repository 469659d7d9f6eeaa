"""What a quantization is: a scheme, and which modules get another one or none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMES = ("int8", "int8-static", "int4-weight", "int4-int8")
GROUPS = (32, 64, 128)
OBSERVERS = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class QuantConfig:
    """A scheme and its exceptions; the same object goes to the functions and to the callback.

    | scheme | activations | weights |
    |---|---|---|
    | `int8` | int8, symmetric, dynamic, one scale a token (last dimension) | int8, symmetric, one scale a channel |
    | `int8-static` | uint8, one scale and zero point a layer, found in calibration or training | as in `int8` |
    | `int4-weight` | float | int4, symmetric, one scale a group of inputs |
    | `int4-int8` | int8 as in `int8` | int4 as in `int4-weight` |

    Embeddings are quantized too, as weights are (in int8 one scale a row); a tied head shares its embedding's codes,
    and where one of the two is excluded, both are.
    Convolutions have `int8-static` only, and absorb the BatchNorm that follows.
    A module whose inputs are no multiple of the group falls back to `int8`, and the coverage says so.

    Args:
        scheme: the scheme of every module that can have it.
        overrides: glob pattern over module names -> scheme, or `None` to leave the module as it is; the first
            pattern that matches wins.
        group_size: inputs that share a scale in the int4 schemes, 32, 64 or 128.
        observer: how `int8-static` chooses ranges of activations: `"minmax"`, `"percentile"` or `"mse"`.
        attention: whether encoders' attention takes its two products in int8 too (see `products`), in every scheme;
            `overrides` know it as the module `products` of the attention layer. Layers that decode with a cache stay in
            float.

    Raises:
        ValueError: unknown scheme, group size or observer, or an `attention` that is no bool.

    >>> QuantConfig("int8", overrides={"lm_head": None}).overrides
    {'lm_head': None}
    """

    scheme: str = "int8"
    overrides: Mapping[str, str | None] = field(default_factory=dict)
    group_size: int = 32
    observer: str = "minmax"
    attention: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in GROUPS:
            raise ValueError(f"group_size={self.group_size} has no kernel; write one of {GROUPS}")
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer={self.observer!r} is unknown; write one of {OBSERVERS}")
        if not isinstance(self.attention, bool):
            raise ValueError(f"attention={self.attention!r} is no bool; write attention=True for int8, False for float")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r} is no mapping; write overrides={{'pattern': None}}")
        _check_scheme(self.scheme, "QuantConfig(", ")")
        for pattern, scheme in self.overrides.items():
            if not isinstance(pattern, str):
                raise ValueError(f"overrides has the key {pattern!r}, no pattern; write {str(pattern)!r}, in quotes")
            if scheme is not None:
                _check_scheme(scheme, f"overrides={{{pattern!r}: ", "}")


def _check_scheme(scheme: str, before: str, after: str) -> None:
    """Raises ValueError for an unknown scheme, with what to write: the nearest, between `before` and `after`."""
    if not scheme or scheme in ("None", "none", "null"):
        raise ValueError(
            f"the scheme {scheme!r} names none; write one of {SCHEMES}, or to leave modules in float "
            "overrides={'pattern': None} (null in YAML, without quotes)"
        )
    if scheme not in SCHEMES:
        longer = [known for known in SCHEMES if known.startswith(str(scheme))]
        near = (longer or difflib.get_close_matches(str(scheme), SCHEMES, 1, 0.0))[0]
        raise ValueError(f"unknown scheme {scheme!r}; write {before}{near!r}{after} (known: {SCHEMES})")
