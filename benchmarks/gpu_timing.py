"""What the GPU benchmarks share: where kernels run, how calls are timed, and the ceilings that figures are shares of.

Every way is checked before it is timed. Operands rotate through more memory than the L2 cache holds, so that no call
finds them there; each call is timed by CUDA events, and medians and quartiles are kept. In a dry run the kernels run on
the emulated machine of the tests: everything is checked and nothing is timed.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from records import machine
from torch import Tensor

from lightning_int8.backends.cupy import CuPy
from lightning_int8.cli.nvidia_driver import driver
from lightning_int8.kernels.variants import compute_capability

FAMILIES = {"dp4a": "sm_61", "imma": "sm_80", "wgmma": "sm_90a"}
"""Families that can be forced, and the architecture for which launchers choose them."""

TESTS = str(Path(__file__).parents[1] / "tests")
"""Where the emulated machine is."""

WARM_UP = 5
CACHE_MULTIPLE = 3
"""Operand sets fill this many L2 caches."""

MOST_SETS = 64
COPY_BYTES = 1 << 30
PEAK_SIZE = 8192

Call = Callable[[], Any]


class Target:
    """Where the benchmark runs.

    Args:
        dry_run: Whether on the emulated machine.
    """

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.place = torch.device("cpu" if dry_run else "cuda:0")
        torch.backends.cudnn.benchmark = True  # the baselines may choose their fastest algorithm

    def backend(self, family: str | None = None) -> CuPy:
        """The CuPy backend, with the launchers' own choice or with a forced family of kernels."""
        device = self._device(family)
        return CuPy(lambda tensor: device)

    def _device(self, family: str | None) -> Any:
        if self.dry_run:
            if TESTS not in sys.path:
                sys.path.insert(0, TESTS)
            from emulator.device import EmulatedDevice

            return EmulatedDevice(FAMILIES[family or "imma"])
        from lightning_int8.kernels.cuda_device import cuda_device

        real = cuda_device(0)
        return real if family is None else _Forced(real, FAMILIES[family])

    def families(self) -> list[str]:
        """Families of kernels that run here."""
        if self.dry_run:
            return list(FAMILIES)
        major, minor = torch.cuda.get_device_capability(0)
        number = 10 * major + minor
        # Code of an architecture with an "a" runs on that one alone.
        own = {name: compute_capability(arch) for name, arch in FAMILIES.items()}
        return [n for n, least in own.items() if (least == number if FAMILIES[n][-1] == "a" else least <= number)]

    def described(self) -> dict[str, Any]:
        """What figures depend on besides the code."""
        if self.dry_run:
            return {"machine": machine(), "dry_run": True}
        found = driver()
        extra = {"driver": found.release, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {"machine": machine() | extra, "dry_run": False}

    def sets(self, bytes_of_one: int) -> int:
        """How many sets of operands outgrow the L2 cache."""
        if self.dry_run:
            return 1
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return min(MOST_SETS, 1 + CACHE_MULTIPLE * cache // max(1, bytes_of_one))

    def milliseconds(self, calls: Sequence[Call], repeats: int) -> list[float] | None:
        """Quartiles of the time of a call, which takes ``calls`` in turn; None in a dry run, which calls each once."""
        if self.dry_run:
            for call in calls:
                call()
            return None
        for i in range(WARM_UP):
            calls[i % len(calls)]()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for i, (start, stop) in enumerate(events):
            start.record()
            calls[i % len(calls)]()
            stop.record()
        torch.cuda.synchronize()
        return [round(q, 5) for q in statistics.quantiles((a.elapsed_time(b) for a, b in events), n=4)]

    def ceilings(self, repeats: int) -> dict[str, float]:
        """Measured rates: INT8 and bfloat16 products in 10¹² operations a second, copies in GB read and written."""
        if self.dry_run:
            return {}
        operations, size = 2 * PEAK_SIZE**3, (PEAK_SIZE, PEAK_SIZE)
        a, b = (torch.randint(-127, 128, size, dtype=torch.int8, device=self.place) for _ in range(2))
        x, y = a.bfloat16(), b.bfloat16()
        source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=self.place)
        target = torch.empty_like(source)
        int8 = self._median([lambda: torch._int_mm(a, b.t())], repeats)
        bf16 = self._median([lambda: x @ y.t()], repeats)
        copy = self._median([lambda: target.copy_(source)], repeats)
        return {
            "int8_tops": round(operations / int8 / 1e9, 1),
            "bfloat16_tops": round(operations / bf16 / 1e9, 1),
            "copy_gb_per_s": round(2 * COPY_BYTES / copy / 1e6, 1),
        }

    def _median(self, calls: Sequence[Call], repeats: int) -> float:
        quartiles = self.milliseconds(calls, repeats)
        assert quartiles is not None
        return quartiles[1]


class _Forced:
    """A GPU that launchers take for another architecture, so that they choose its family of kernels."""

    def __init__(self, device: Any, arch: str) -> None:
        self.arch = arch
        self.multiprocessors = device.multiprocessors
        self.kernel = device.kernel


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions may round their operands to TF32, inside the context."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_equal(name: str, made: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError unless ``made`` is ``expected``, to the bit."""
    if not torch.equal(made.to(expected.dtype), expected):
        raise RuntimeError(f"{name} is wrong: it is not timed")


def check_close(name: str, made: Tensor, expected: Tensor, limit: float) -> None:
    """Raise RuntimeError unless ‖made - expected‖ ≤ ``limit`` · ‖expected‖; NaN never passes."""
    error = (made.double() - expected.double()).norm() / expected.double().norm()
    if not error <= limit:
        raise RuntimeError(f"{name} is wrong by {error:.2e}: it is not timed")
