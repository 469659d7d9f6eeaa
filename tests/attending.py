"""Attention kernels called from tests, and inputs of all layouts and masks for them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch
from kernels import compiled, source_of
from torch import Tensor

Kernel = Callable[..., Tensor]

ENTRY = """
#include "{source}"
extern "C" __attribute__((visibility("default"))) void run(const int64_t* n, const int64_t* strides, void** data,
    int64_t boolean, int64_t causal, float scale, float* out) {{
  Problem p;
  View* views[] = {{&p.q, &p.k, &p.v, &p.mask}};
  for (int i = 0; i < 4; i++, strides += 4) *views[i] = View{{data[i], strides[0], strides[1], strides[2], strides[3]}};
  p.B = n[0], p.H = n[1], p.groups = n[2], p.queries = n[3], p.keys = n[4], p.D = n[5], p.Dv = n[6];
  p.boolean = boolean, p.causal = causal, p.scale = scale, p.out = out;
  attention(p);
}}
"""


def library_of(kernel: str, path: str, directory: Path, more: str = "") -> ctypes.CDLL:
    """An attention kernel compiled for one of `kernels.PATHS`, with `more` code."""
    return ctypes.CDLL(str(compiled(ENTRY.format(source=source_of(kernel)) + more, path, directory)))


def caller(library: ctypes.CDLL) -> Kernel:
    """A kernel's inner function, called as F.scaled_dot_product_attention is; fails where it changes an input."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float = 0.0):
        (batch, heads, rows, width), groups, keys, wide = q.shape, k.shape[1], k.shape[2], v.shape[3]
        full = None if mask is None else mask.expand(batch, heads, rows, keys)
        tensors = (q, k, v, full)
        before = [None if t is None else t.clone() for t in tensors]
        out = torch.full((batch, rows, heads, wide), 7.0)
        strides = [s for t in tensors for s in ((0,) * 4 if t is None else t.stride())]
        sizes = (batch, heads, groups, rows, keys, width, wide)
        library.run(
            (ctypes.c_int64 * 7)(*sizes),
            (ctypes.c_int64 * 16)(*strides),
            (ctypes.c_void_p * 4)(*(None if t is None else t.data_ptr() for t in tensors)),
            ctypes.c_int64(full is not None and full.dtype == torch.bool),
            ctypes.c_int64(is_causal),
            ctypes.c_float(scale or width**-0.5),
            ctypes.c_void_p(out.data_ptr()),
        )
        for tensor, copy in zip(tensors, before, strict=True):
            assert tensor is None or torch.equal(bits(tensor), bits(copy))
        return out.transpose(1, 2)

    return run


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


def assert_same_with_any_number_of_threads(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> None:
    """With 1, 2 and 3, to the bit."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = kernel(q, k, v)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(kernel(q, k, v), expected)
    finally:
        torch.set_num_threads(before)


LAYOUTS = {
    "projected": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "by head": torch.randn,
    "part of a row": lambda b, h, n, d: torch.randn(b, n, h * d + 3)[..., 3:].unflatten(-1, (h, d)).transpose(1, 2),
    "part of a cache": lambda b, h, n, d: torch.randn(b, n + 5, h, d)[:, :n].transpose(1, 2),
    "columns apart": lambda b, h, n, d: torch.randn(b, h, d, n).transpose(2, 3),
}


def masks(kind: str, b: int, h: int, rows: int, keys: int) -> Tensor | None:
    shapes = {
        "row": (b, 1, 1, keys),
        "keys broadcast": (b, h, rows, 1),
        "full": (b, h, rows, keys),
        "two": (rows, keys),
    }
    if kind in ("none", "causal"):
        return None
    name, shape = kind.split(": ")
    seen = torch.rand(shapes[shape]) < 0.7
    return seen if name == "bool" else torch.where(seen, torch.randn(seen.shape), -math.inf)


MASKS = ["none", "causal", *(f"{name}: {s}" for name in ("bool", "float") for s in ("row", "full", "two"))]
MASKS += ["bool: keys broadcast"]
