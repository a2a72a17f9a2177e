"""Where the time of an INT8 training step goes: the backend's own functions are timed, and torch's operators between.

Time counts once: for the innermost of our functions that is running, and for an operator only outside of them. What
batch norm, ReLU and addition cost where they are fused into quantization counts as quantization.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from step_columns import Training
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.onednn import OneDNN

CONTRACTIONS, QUANTIZE, NORM = "contractions", "quantize", "norm and activation"
FLOAT, OPTIMIZER, REST = "float contractions", "optimizer", "rest"

NORM_WORDS = ("norm", "relu", "hardtanh", "threshold", "gelu", "silu", "swish", "sigmoid", "softmax", "pool")
FLOAT_NAMES = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")

EXPRESSION_PASSES = ("evaluation", "pooling")
"""Compiled passes of ``lightning_int8.fusion`` that run outside of quantization."""


class Stopwatch(TorchDispatchMode):
    """Process time by category."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def around(self, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.region(category):
                return function(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def region(self, category: str) -> Iterator[None]:
        """Time what happens inside, and not for whoever is around it."""
        self._charge()
        self._running.append(category)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        category = "" if self._running else category_of(function._schema.name.split("::")[1])
        if not category:
            return function(*args, **kwargs or {})
        with self.region(category):
            return function(*args, **kwargs or {})


def category_of(operator: str) -> str:
    """Of an operator of torch's; empty for the rest."""
    if operator.startswith("_fused_"):
        return OPTIMIZER
    if operator in FLOAT_NAMES:
        return FLOAT
    return NORM if any(word in operator for word in NORM_WORDS) else ""


def breakdown(training: Training, steps: int) -> dict[str, float]:
    """Median milliseconds of process time by category, and "total", of steps that refresh nothing.

    Timing itself makes them a little slower.
    """
    of_steps: list[dict[str, float]] = []
    while len(of_steps) < steps:
        if training.refreshes:
            training.step()
            continue
        stopwatch = Stopwatch()
        start = time.process_time()
        with contextlib.ExitStack() as stack:
            for owner, name, category in _functions():
                timed = stopwatch.around(category, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            stack.enter_context(stopwatch)
            training.step()
        seconds = dict(stopwatch.seconds) | {"total": time.process_time() - start}
        of_steps.append(seconds | {REST: seconds["total"] - sum(stopwatch.seconds.values())})
    names = (CONTRACTIONS, QUANTIZE, NORM, FLOAT, OPTIMIZER, REST, "total")
    return {name: round(1e3 * statistics.median(s.get(name, 0.0) for s in of_steps), 3) for name in names}


def _functions() -> Iterator[tuple[Any, str, str]]:
    """Owner, name and category of each function of ours."""
    yield OneDNN, "_contract", CONTRACTIONS
    yield OneDNN, "quantize", QUANTIZE
    yield OneDNN, "quantize_both", QUANTIZE
    for name in EXPRESSION_PASSES:
        module = compiled_pass(name)
        if module is not None:
            yield from ((module, function, NORM) for function in _public_functions(module))


def _public_functions(module: ModuleType) -> list[str]:
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return [name for name in own if not name.startswith("_") and callable(getattr(module, name))]
