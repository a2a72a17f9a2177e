"""The arguments of a conversion, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_int8 import backends, recipes
from lightning_int8.spec import Recipe

LAYERS = ("int8", "auto")
"""Every layer that can be runs INT8; or those that are not faster in float, found by timing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of one conversion, checked.

    Attributes:
        recipe: The numerics.
        skip: Names or globs of layers, or of modules that contain them, to keep in float.
        layers: One of ``LAYERS``.
        backend: One of ``backends.CHOICES``.
        fuse: Whether neighbouring passes may be fused where the result stays the same.
        seed: Seed of stochastic rounding.
        refresh: Optimizer steps between refreshes of clip values whose range rule names no interval.

    Raises:
        ValueError: A value out of its range; the message names field and value.
    """

    recipe: Recipe
    skip: tuple[str, ...] = ()
    layers: str = "int8"
    backend: str = "auto"
    fuse: bool = True
    seed: int = 0
    refresh: int = 100

    def __post_init__(self) -> None:
        backends.check_choice(self.backend)
        if self.layers not in LAYERS:
            raise ValueError(f"layers: {self.layers!r} is not one of {', '.join(map(repr, LAYERS))}")
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"refresh: {self.refresh!r} is not a positive number of optimizer steps")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed: {self.seed!r} is not an integer")
        if not isinstance(self.fuse, bool):
            raise ValueError(f"fuse: {self.fuse!r} is not True or False")
        if any(not isinstance(pattern, str) or not pattern for pattern in self.skip):
            raise ValueError(f"skip: {self.skip!r} is not a sequence of names or globs")

    @classmethod
    def make(cls, recipe: str | Path | Recipe, skip: str | Sequence[str], **fields: Any) -> Settings:
        """Resolve the recipe, and a single pattern given as ``skip``."""
        if not isinstance(skip, Iterable):
            raise ValueError(f"skip: {skip!r} is not a sequence of names or globs")
        return cls(recipe=recipes.get(recipe), skip=(skip,) if isinstance(skip, str) else tuple(skip), **fields)
