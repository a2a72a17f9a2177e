"""Python functions as operators of torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


def operator(*changed: str) -> Callable[[Function], Function]:
    """Make ``torch.ops.lightning_int8.NAME`` of the decorated function, its schema from its annotations.

    What ``torch.library.custom_op`` adds for autograd took as long as a small product, and integers have no gradients.

    Args:
        changed: Arguments that it changes in place.
    """

    def register(function: Function) -> Function:
        name = f"lightning_int8::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=changed))
        torch.library.impl(name, "cpu", function)
        return function

    return register
