"""An NVIDIA GPU as a ``device.Device``: machine code by NVRTC, loaded and launched through CuPy on torch's stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lightning_int8.kernels.build import cubin
from lightning_int8.kernels.device import Launch, Program
from lightning_int8.kernels.nvrtc import Nvrtc, compiler_of

DEFAULT_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel has without asking for more."""

_MAX_DYNAMIC_SHARED_SIZE = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of the CUDA driver."""


class CudaDevice:
    """One GPU.

    Args:
        index: Number of the device in torch.

    Attributes:
        arch: Architecture that kernels are compiled for.
        multiprocessors: Number of multiprocessors.
    """

    def __init__(self, index: int) -> None:
        cupy = _import_cupy()
        properties = torch.cuda.get_device_properties(index)
        self._cupy = cupy
        self._index = index
        # Driver and compiler must agree on CUDA's major version, and CuPy is what was installed to match the driver.
        self._compiler = compiler_of(cupy.cuda.runtime.runtimeGetVersion() // 1000)
        self.arch = best_architecture(self._compiler, properties.major, properties.minor)
        self.multiprocessors = properties.multi_processor_count
        self._modules: dict[Program, Any] = {}
        self._kernels: dict[tuple[Program, str], _Kernel] = {}

    def kernel(self, program: Program, entry: str) -> Launch:
        """See ``Device.kernel``."""
        if (program, entry) not in self._kernels:
            with torch.cuda.device(self._index):
                if program not in self._modules:
                    module = self._cupy.cuda.function.Module()
                    module.load(cubin(program, self.arch, self._compiler))
                    self._modules[program] = module
                function = self._modules[program].get_function(entry)
            self._kernels[program, entry] = _Kernel(self._cupy, function, self._index)
        return self._kernels[program, entry]


class _Kernel:
    def __init__(self, cupy: Any, function: Any, index: int) -> None:
        self._cupy = cupy
        self._function = function
        self._index = index
        self._shared_bytes = DEFAULT_SHARED_BYTES
        self._streams: dict[int, Any] = {}  # torch takes its streams from a pool and never destroys one

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        # Backward runs on threads of its own: device and stream are those of torch, at each launch.
        with torch.cuda.device(self._index):
            if shared_mem > self._shared_bytes:
                self._cupy.cuda.driver.funcSetAttribute(self._function.ptr, _MAX_DYNAMIC_SHARED_SIZE, shared_mem)
                self._shared_bytes = shared_mem
            stream = self._stream(torch.cuda.current_stream())
            self._function(tuple(grid), tuple(block), tuple(args), shared_mem=shared_mem, stream=stream)

    def _stream(self, stream: torch.cuda.Stream) -> Any:
        handle = stream.cuda_stream
        if handle not in self._streams:
            from_external = getattr(self._cupy.cuda.Stream, "from_external", None)  # CuPy 14; 13 has ExternalStream
            self._streams[handle] = from_external(stream) if from_external else self._cupy.cuda.ExternalStream(handle)
        return self._streams[handle]


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        extra = f"cuda{(torch.version.cuda or '13').partition('.')[0]}"
        raise RuntimeError(f"CuPy cannot be imported ({error}); pip install 'lightning-int8[{extra}]'") from error
    return cupy


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """The GPU with torch's number ``index``."""
    return CudaDevice(index)


def best_architecture(compiler: Nvrtc, major: int, minor: int) -> str:
    """The newest architecture of ``compiler`` whose machine code a GPU of this compute capability runs: "sm_86".

    "sm_90a" for compute capability 9.0: wgmma is in the code for exactly this one.

    Raises:
        RuntimeError: The compiler knows none of this major version.
    """
    usable = [a for a in compiler.architectures if a // 10 == major and a % 10 <= minor]
    if not usable:
        raise RuntimeError(
            f"NVRTC {compiler.version[0]}.{compiler.version[1]} does not compile for compute capability {major}.{minor}"
        )
    best = max(usable)
    return "sm_90a" if (major, minor, best) == (9, 0, 90) else f"sm_{best}"
