"""Putting something around a method of one LightningModule, and taking it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

_BEFORE = "_lightning_accel_before"  # the wrapper itself, and what the instance's own __dict__ held under that name


def patch(pl_module: pl.LightningModule, name: str, around: Callable[..., Any]) -> None:
    """Replaces the method `name` of this instance by `around(method, *args, **kwargs)`."""
    method = getattr(pl_module, name)

    @functools.wraps(method)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(patched, _BEFORE, (patched, pl_module.__dict__.get(name)))
    pl_module.__dict__[name] = patched


def unpatch(pl_module: pl.LightningModule, name: str) -> bool:
    """Takes the latest `patch` of the method off; false where there is none, or another library's around it."""
    patched = pl_module.__dict__.get(name)
    ours, before = getattr(patched, _BEFORE, (None, None))
    if patched is None or ours is not patched:  # functools.wraps gives another library's wrapper our attributes
        return False
    del pl_module.__dict__[name]
    if before is not None:
        pl_module.__dict__[name] = before
    return True


def after(pl_module: pl.LightningModule, name: str, then: Callable[[], None]) -> None:
    """Calls `then` once, right after the module's own hook `name` has run."""

    def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        unpatch(pl_module, name)
        result = method(*args, **kwargs)
        then()
        return result

    patch(pl_module, name, around)
    del pl_module.__dict__[name].__wrapped__  # Lightning looks through it, and skips hooks that are not overridden
