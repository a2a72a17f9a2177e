"""What keeps INT8 training from a GPU, and what to do about it: from what was found, by rules alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_int8.cli.found import Found
from lightning_int8.cli.nvidia_driver import Gpu
from lightning_int8.kernels.gain import OLDEST, why_no_gain

OLDEST_DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""CUDA's major version and the first driver release for Linux that runs it."""

LAST_OF_CUDA_12 = (7, 5)
"""GPUs below this compute capability are served by CUDA 12 and not by CUDA 13."""

TORCH_PAGE = "pytorch.org/get-started"


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """One thing in the way.

    Attributes:
        what: What is wrong.
        remedy: What to install or do.
    """

    what: str
    remedy: str


def obstacles(found: Found, gpu: Gpu | None) -> list[Obstacle]:
    """What is in the way of INT8 training on ``gpu``, in the order in which to remove it.

    Args:
        found: The machine.
        gpu: One of the driver's; None where it has none.
    """
    if gpu is None:
        return [_no_gpu(found)]
    if gpu.capability < OLDEST:
        remedy = "train on the CPU, or on this GPU in float, without the plugin"
        return [Obstacle(what=why_no_gain(gpu.capability), remedy=remedy)]
    return [*_torch(found, gpu), *_cupy(found, gpu), *_compiler(found, gpu)]


def cuda_major(found: Found, gpu: Gpu) -> int:
    """The major version of CUDA that serves driver and GPU; torch's own, if that does."""
    of_torch = None if found.torch.cuda is None else _major(found.torch.cuda)
    return next((m for m in (of_torch, 13, 12) if m in OLDEST_DRIVERS and _serves(m, found, gpu)), 12)


def _serves(major: int, found: Found, gpu: Gpu) -> bool:
    newest = found.driver.cuda
    return (newest is None or major <= newest[0]) and (major < 13 or gpu.capability >= LAST_OF_CUDA_12)


def _no_gpu(found: Found) -> Obstacle:
    if found.driver.cuda is None:
        releases = ", ".join(f"{release} or newer for CUDA {major}" for major, release in OLDEST_DRIVERS.items())
        remedy = f"if this machine has an NVIDIA GPU, install its driver ({releases}) until nvidia-smi lists the GPU"
        return Obstacle(what=f"no NVIDIA driver: {found.driver.problem}", remedy=remedy)
    remedy = "nvidia-smi must list the GPU; see CUDA_VISIBLE_DEVICES; start a container with --gpus all"
    return Obstacle(what=f"no GPU: {found.driver.problem}", remedy=remedy)


def _torch(found: Found, gpu: Gpu) -> Iterator[Obstacle]:
    newest, built = found.driver.cuda, found.torch.cuda
    assert newest is not None, "a driver that names a GPU names its version"
    driver = f"driver {found.driver.release}".rstrip() + f" runs CUDA up to {newest[0]}.{newest[1]}"
    major = cuda_major(found, gpu)
    if newest[0] < min(OLDEST_DRIVERS):
        yield Obstacle(what=driver, remedy=f"update the NVIDIA driver to {OLDEST_DRIVERS[major]} or newer")
    if built is None:
        yield Obstacle(
            what=f"torch {found.torch.version} is built without CUDA",
            remedy=f"install the build of torch for CUDA {major} ({TORCH_PAGE})",
        )
    elif _major(built) > newest[0] >= min(OLDEST_DRIVERS):
        update = f"update the NVIDIA driver to {OLDEST_DRIVERS.get(_major(built), 'the newest release')} or newer"
        yield Obstacle(
            what=f"{driver}, and torch {found.torch.version} is built for CUDA {built}",
            remedy=f"{update}; or install the build of torch for CUDA {major} ({TORCH_PAGE}) and {_extra(major)}",
        )
    elif found.torch.gpus == 0 and newest[0] >= _major(built):
        yield Obstacle(
            what="torch.cuda.is_available() is False though driver and torch fit",
            remedy='run python -c "import torch; torch.cuda.init()" and mend what it says',
        )
    elif found.torch.architectures and not _has_code_for(gpu, found.torch.architectures):
        yield Obstacle(
            what=f"torch {found.torch.version} has no kernels for compute capability {_dotted(gpu)}",
            remedy=f"install a build of torch for this GPU ({TORCH_PAGE}): for CUDA 12.6 if the GPU is older than 7.5",
        )


def _cupy(found: Found, gpu: Gpu) -> Iterator[Obstacle]:
    cupy, major = found.cupy, cuda_major(found, gpu)
    names = " ".join(d.partition(" ")[0] for d in cupy.distributions)
    again = f"pip uninstall {names}, then {_extra(major)}"
    if len(cupy.distributions) > 1:
        yield Obstacle(what=f"several CuPys overwrite each other: {', '.join(cupy.distributions)}", remedy=again)
    elif not cupy.distributions and cupy.cuda is None:
        yield Obstacle(what="CuPy is not installed", remedy=_extra(major))
    elif cupy.cuda is None:
        yield Obstacle(what=f"CuPy cannot be imported: {cupy.error}", remedy=again)
    elif cupy.cuda not in OLDEST_DRIVERS or not _serves(cupy.cuda, found, gpu):
        newest = found.driver.cuda or (major, 0)
        limit = f"the driver runs CUDA up to {newest[0]}.{newest[1]}"
        if cupy.cuda <= newest[0]:
            limit = f"a GPU of compute capability {_dotted(gpu)} needs CUDA {major}"
        what = f"CuPy is built for CUDA {cupy.cuda} ({', '.join(cupy.distributions)}), and {limit}"
        yield Obstacle(what=what, remedy=again)


def _compiler(found: Found, gpu: Gpu) -> Iterator[Obstacle]:
    major = found.cupy.cuda
    if major is None or not _serves(major, found, gpu) or major not in OLDEST_DRIVERS:
        return  # the remedy for CuPy installs its compiler too
    fitting = [c for c in found.compilers if c.version[0] == major]
    if not fitting:
        have = ", ".join("{}.{}".format(*c.version) for c in found.compilers) or "none"
        yield Obstacle(what=f"no NVRTC {major}, which CuPy's CUDA asks for (found: {have})", remedy=_extra(major))
    elif not any(_has_code_for(gpu, [f"sm_{a}" for a in c.architectures]) for c in fitting):
        version = "{}.{}".format(*fitting[0].version)
        remedy = f"{_extra(cuda_major(found, gpu))} --upgrade --upgrade-strategy eager"
        yield Obstacle(what=f"NVRTC {version} does not compile for compute capability {_dotted(gpu)}", remedy=remedy)


def _has_code_for(gpu: Gpu, architectures: tuple[str, ...] | list[str]) -> bool:
    """Machine code runs on GPUs of the same major compute capability and the same or a later minor one."""
    numbers = [int("".join(filter(str.isdigit, a))) for a in architectures]
    return any(n // 10 == gpu.capability[0] and n % 10 <= gpu.capability[1] for n in numbers)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _dotted(gpu: Gpu) -> str:
    return "{}.{}".format(*gpu.capability)


def _extra(major: int) -> str:
    return f"pip install 'lightning-int8[cuda{major}]'"
