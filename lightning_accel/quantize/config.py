"""What a quantization is: a scheme, and which modules get another one or none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMES = ("int8",)


@dataclass(frozen=True)
class QuantConfig:
    """A scheme and its exceptions; the same object goes to the functions and to the callback.

    | scheme | activations | weights |
    |---|---|---|
    | `int8` | int8, symmetric, dynamic, one scale a token (last dimension) | int8, symmetric, one scale a channel |

    Embeddings are quantized too, one scale a row; a tied head shares its embedding's codes.

    Args:
        scheme: the scheme of every module that can have it.
        overrides: glob pattern over module names -> scheme, or `None` to leave the module as it is; the first
            pattern that matches wins.

    Raises:
        ValueError: unknown scheme.

    >>> QuantConfig("int8", overrides={"lm_head": None}).overrides
    {'lm_head': None}
    """

    scheme: str = "int8"
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scheme in (self.scheme, *self.overrides.values()):
            if scheme is not None and scheme not in SCHEMES:
                near = difflib.get_close_matches(str(scheme), SCHEMES, 1, 0.0)
                raise ValueError(f"unknown scheme {scheme!r}; write QuantConfig({near[0]!r}) (known: {SCHEMES})")
