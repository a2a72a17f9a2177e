"""GPUs on which INT8 products are no faster than what torch trains with anyway."""

from __future__ import annotations

OLDEST = (6, 1)
"""Compute capability of the first GPUs with DP4A, the oldest INT8 instruction that the kernels use."""

NO_GAIN = {
    (7, 0): "its INT8 products (DP4A) reach half the rate of its FP16 tensor cores",
    (10, 3): "its tensor cores have almost no INT8: about a fifteenth of their BF16 rate",
}
"""Compute capability and why INT8 loses there; rates by the data sheets."""


def why_no_gain(capability: tuple[int, int]) -> str:
    """Why INT8 training is no faster on GPUs of ``capability``; empty where it can be."""
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} has no INT8 product; DP4A came with 6.1"
    return NO_GAIN.get(capability, "")
