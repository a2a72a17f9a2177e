"""Machines that tests of the CuPy backend run on: emulated ones everywhere, and the GPU where there is one.

A test that takes the fixture ``machine`` runs once for each family of kernels on each kind of machine, so that what
will run on a GPU has run in CI before.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from emulator.device import EmulatedDevice
from kernel_cases import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import backends
from lightning_int8.backends.cupy import CuPy
from lightning_int8.kernels.cuda_device import cuda_device

FAMILIES = {"dp4a": "sm_61", "imma-staged": "sm_75", "imma": "sm_80", "wgmma": "sm_90a"}
"""Family of kernels, and the architecture for which launchers choose it."""

WAITS = {
    f"aten.{name}" for name in ("_local_scalar_dense", "lift_fresh", "equal", "nonzero", "masked_select", "unique")
}
"""Operations that make the host wait where the tensor is on a GPU: reading an element, making one from numbers, and
results whose shape the values decide."""

READS = ("tolist", "numpy", "cpu", "__array__", "__contains__")
"""Methods of tensors that read memory of the CPU without an operation; on a GPU they wait."""


class ForcedFamily:
    """A GPU that launchers take for another architecture, so that they choose its family of kernels.

    The machine code is still that of the GPU.
    """

    def __init__(self, device, arch):
        self.arch = arch
        self.multiprocessors = device.multiprocessors
        self.launches = []
        self._device = device

    def kernel(self, program, entry):
        self.launches.append(entry)
        return self._device.kernel(program, entry)


class Machine:
    """Where tensors are and what computes with them; ``on_gpu`` is False on the emulated machine.

    Without a GPU, streams and graphs have nothing to do: work runs at once, and a replay runs it again.
    """

    on_gpu = False
    accelerator = "cpu"
    place = torch.device("cpu")

    def __init__(self, device):
        self.device = device
        self.backend = CuPy(lambda tensor: self.device)

    @contextlib.contextmanager
    def chosen(self):
        """Context in which backend "cupy" is this machine's."""
        load = backends.load
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "load", lambda name: self.backend if name == "cupy" else load(name))
            yield

    @contextlib.contextmanager
    def launches(self):
        """Entry points of the kernels that are launched inside the context."""
        self.device.launches.clear()
        seen = []
        yield seen
        seen += self.device.launches

    def stream(self):
        """Context of a stream of its own, which begins after all that was asked for before."""
        return contextlib.nullcontext()

    def join(self, streams):
        """Make what follows wait for ``streams``."""

    def capture(self, step):
        """Record ``step``; the result repeats it and returns its tensors."""
        step()
        return step

    def no_waits(self):
        """Context in which the host must not wait for the device."""
        return _refuse_waits()


class GpuMachine(Machine):
    """The first GPU of torch."""

    on_gpu = True
    accelerator = "gpu"
    place = torch.device("cuda", 0)

    @contextlib.contextmanager
    def stream(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream

    def join(self, streams):
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    def capture(self, step):
        with self.stream() as stream:  # compiling and loading must not be captured
            step()
        self.join([stream])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()

        def replay():
            graph.replay()
            return [t.clone() for t in made]

        return replay

    @contextlib.contextmanager
    def no_waits(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _RefuseWaits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function is torch.ops.aten.index.Tensor and any(
            i.dtype == torch.bool for i in args[1] if i is not None
        )
        if str(function).rpartition(".")[0] in WAITS or by_mask:
            raise RuntimeError(f"{function} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _refuse_waits():
    def refuse(name):
        def method(*_):
            raise RuntimeError(f"Tensor.{name} makes the host wait for the device")

        return method

    with pytest.MonkeyPatch.context() as patch, _RefuseWaits():
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


@functools.cache
def emulated(family):
    """The emulated machine of a family; one for all tests, since it keeps compiled kernels."""
    return Machine(EmulatedDevice(FAMILIES[family]))


@functools.cache
def gpu(family):
    """The GPU with a forced family."""
    return GpuMachine(ForcedFamily(cuda_device(0), FAMILIES[family]))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")

PARAMETERS = [pytest.param((emulated, family), id=f"emulated-{family}", marks=needs_compiler) for family in FAMILIES]
PARAMETERS += [
    pytest.param((gpu, family), id=f"gpu-{family}", marks=[pytest.mark.gpu, needs_gpu]) for family in FAMILIES
]


def make_machine(parameter):
    """The machine of one of ``PARAMETERS``; skips the test where the GPU does not run the family."""
    make, family = parameter
    if make is gpu:
        number = FAMILIES[family].removeprefix("sm_")
        wanted, found = divmod(int(number.rstrip("a")), 10), torch.cuda.get_device_capability(0)
        # Code of an architecture with an "a" runs on that one alone.
        if found < wanted or (number.endswith("a") and found != wanted):
            pytest.skip(f"the GPU does not run {family}")
    return make(family)


def moved(quantized, place):
    """``quantized`` with its tensors on ``place``."""
    tensors = [None if t is None else t.to(place) for t in quantized.tensors()]
    return type(quantized).from_tensors(tensors, quantized.axis)
