"""CUDA kernels on the CPU, bit for bit: the `.cu` files as they are, compiled by g++ and launched as CuPy would.

`Machine` says in what order threads run and when asynchronous copies take effect. `Module` and `Kernel` have the call
interface of ``cupy.RawModule`` and ``cupy.RawKernel``, so that the package's own launcher code is under test too; the
pointers that a launch takes are those of CPU tensors.

What agrees here agrees with the PTX ISA as it is written down in `cuda/`; it is no proof for silicon, and says nothing
about time, bank conflicts or registers.
"""

from emulator.module import Kernel, KernelError, Machine, Module

__all__ = ["Kernel", "KernelError", "Machine", "Module"]
