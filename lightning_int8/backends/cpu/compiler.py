"""How passes are compiled: numba with strict float arithmetic, and wide vectors where they pay."""

from __future__ import annotations

from typing import Any

import numba as nb
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import config
from numba.extending import intrinsic, overload

compiled = nb.njit(nogil=True, error_model="numpy", cache=True)
"""No fastmath: products and sums must not be fused."""

_IS_NAMED = bool(getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None))

FEATURES: dict[str, bool] = {} if _IS_NAMED else dict(get_host_cpu_features())
"""Instructions of this CPU by LLVM's names; none where the user has named a CPU that numba is to compile for."""

_WIDE = FEATURES.get("avx512vnni", False)

HAS_AVX512 = FEATURES.get("avx512bw", False) and FEATURES.get("avx512dq", False)
"""Whether there are 32 registers of 512 bits, and masks for all their lanes."""


@intrinsic
def wide_vectors(typing_context: Any) -> Any:
    """Vectorize the calling function with 512 bits.

    LLVM keeps to 256 on Intel, for the sake of the clock of the first CPUs with AVX-512; those with VNNI gain a third
    on passes that compute more than they load.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _WIDE:
            # llvmlite knows no attributes of the form key=value and refuses them in `add`; it prints a set's members.
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def at(value, index):
    """``value[index]`` of an array, or a scalar ``value``; decided when the pass is compiled."""
    raise NotImplementedError("only compiled passes call this")


@overload(at, inline="always")
def _at(value, index):
    if isinstance(value, types.Array):
        return lambda value, index: value[index]
    return lambda value, index: value
