"""The compiled passes, or None for each where numba cannot be imported."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def compiled_pass(name: str) -> ModuleType | None:
    """Module ``name`` of this folder, which needs numba."""
    try:
        return import_module(f"lightning_int8.backends.cpu.{name}")
    except ImportError:
        return None
