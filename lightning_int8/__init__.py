"""Train deep networks with every matrix product of the forward and the backward pass in 8-bit integers."""

from typing import TYPE_CHECKING, Any

from lightning_int8 import recipes
from lightning_int8.report import ConversionReport, gemm_counts
from lightning_int8.rewrite import convert, restore
from lightning_int8.spec import ContractionSpec, OperandSpec, Recipe
from lightning_int8.version import __version__

if TYPE_CHECKING:
    from lightning_int8.precision import Int8Precision

__all__ = [
    "ContractionSpec",
    "ConversionReport",
    "Int8Precision",
    "OperandSpec",
    "Recipe",
    "__version__",
    "convert",
    "gemm_counts",
    "recipes",
    "restore",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; `convert` does without it.
    if name == "Int8Precision":
        from lightning_int8.precision import Int8Precision

        return Int8Precision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
