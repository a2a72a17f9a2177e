"""The structures that kernels take by value, field by field as in the ``.cuh`` files (the C++ layout)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_POINTER, _INT, _LONG, _UNSIGNED = "u8", "i4", "i8", "u4"


def structure(fields: Mapping[str, Any]) -> np.dtype:
    """A dtype with the layout of a C++ structure with these fields."""
    return np.dtype([(n, *f) if isinstance(f, tuple) else (n, f) for n, f in fields.items()], align=True)


FAST_DIVISOR = structure(dict.fromkeys(("divisor", "multiplier", "shift"), _UNSIGNED))

MATRIX = structure({"data": _POINTER, "pitch": _INT})

SPLIT = structure(
    {
        "slabs": _POINTER,
        "depth": _INT,
        "slices_per_slab": _INT,
        "count": _INT,
        "columns": _INT,
        "slab_elements": _LONG,
    }
)

EPILOGUE = structure(
    dict.fromkeys(
        ("left_scale", "right_scale", "left_zero", "right_zero", "left_sums", "right_sums", "addend", "bias", "out"),
        _POINTER,
    )
    | dict.fromkeys(("left_step", "right_step", "products", "format"), _INT)
)

GEMM = structure(
    {"left": MATRIX, "right": MATRIX, "m": _INT, "n": _INT, "k": _INT, "split": SPLIT, "epilogue": EPILOGUE}
)

IMAGE = structure(
    {"data": _POINTER, "fill": _POINTER, "pitch": _INT, "size": (_INT, 3), "positions": _INT, "grid": (FAST_DIVISOR, 3)}
    | {"stride": (_INT, 3), "origin": (_INT, 3), "dilation": (_INT, 3), "taps": (FAST_DIVISOR, 3)}
    | {"channels": FAST_DIVISOR}
)

TAP_MATRIX = structure(
    {"data": _POINTER, "pitch": _INT, "first": _INT, "step": (_INT, 3), "taps": (FAST_DIVISOR, 3)}
    | {"outputs": FAST_DIVISOR, "group_outputs": _INT}
)

TARGET = structure(
    {"size": (_INT, 3), "stride": (_INT, 3), "first": (_INT, 3), "channels": _INT, "group_channels": _INT}
    | {"padded_channels": FAST_DIVISOR}
)

CONV = structure(
    {"image": IMAGE, "matrix": MATRIX, "weight": TAP_MATRIX, "target": TARGET, "m": _INT, "n": _INT, "k": _INT}
    | {"split": SPLIT, "epilogue": EPILOGUE}
)

DIRECT = structure({"conv": CONV, "left_zero": _POINTER, "right_zero": _POINTER})

COLUMNS = structure(dict.fromkeys(("rows", "columns", "map_axis", "maps", "rows_per_map"), _INT))

QUANTIZE = structure(
    {"matrix": COLUMNS, "pitch": _INT, "bits": _INT}
    | dict.fromkeys(("x", "clip_values", "key", "planes", "scales", "zeros"), _POINTER)
    | {"plane_bytes": _LONG}
)

ABSMAX = structure({"matrix": COLUMNS, "side_step": _INT, "x": _POINTER, "out": _POINTER})

HISTOGRAM = structure({"matrix": COLUMNS, "x": _POINTER, "largest": _POINTER, "counts": _POINTER})

ERROR_SUMS = structure(
    {"matrix": COLUMNS, "affine": _INT, "count": _INT, "bits": (_INT, 3)}
    | dict.fromkeys(("x", "clip_values", "sums"), _POINTER)
)


def by_value(dtype: np.dtype, fields: Mapping[str, Any]) -> np.ndarray:
    """One structure, as an array of one element: what CuPy passes by value.

    Args:
        dtype: Its layout.
        fields: A value for each field; mappings for nested structures.
    """
    value = np.zeros(1, dtype)
    _fill(value[0], fields)
    return value


def _fill(target: Any, fields: Mapping[str, Any]) -> None:
    missing = set(target.dtype.names) ^ set(fields)
    assert not missing, f"fields {sorted(missing)} do not match"
    for name, content in fields.items():
        if isinstance(content, Mapping):
            _fill(target[name], content)
        elif isinstance(content, list | tuple) and isinstance(content[0], Mapping):
            for i, item in enumerate(content):
                _fill(target[name][i], item)
        else:
            target[name] = content


def fast_divisor(divisor: int) -> dict[str, int]:
    """Fields of ``FAST_DIVISOR``: exact for dividends below 2^31 (fast_division.cuh).

    Args:
        divisor: 1 to 2^31 - 1.
    """
    bits = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + bits)) // divisor)
    return {"divisor": divisor, "multiplier": multiplier & 0xFFFFFFFF, "shift": max(bits - 1, 0)}
