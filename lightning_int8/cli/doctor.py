"""``lightning-int8 doctor``: what is here, what will compute on each device and why, and what to install."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_int8 import backends
from lightning_int8.backends import Backend
from lightning_int8.cli.advice import Obstacle, obstacles
from lightning_int8.cli.found import ISA_LIMIT, Found, look
from lightning_int8.cli.nvidia_driver import Gpu
from lightning_int8.cli.self_check import self_check
from lightning_int8.kernels.gain import why_no_gain
from lightning_int8.version import __version__

UNPROVEN = (
    "only where backend='cupy' asks for it: the kernels have run on an emulated machine, and backend='auto' refuses "
    "GPUs until they have run on one"
)

Check = Callable[[Backend, str], dict[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens on one device.

    Attributes:
        device: Torch's name of it.
        usable: Whether INT8 training runs there, by contractions that the self-check found right.
        uses: What computes.
        check: Outcome of the self-check; empty where it was not run.
        notes: What else to know.
        obstacles: What is in the way, and the remedy.
    """

    device: str
    usable: bool
    uses: str
    check: str = ""
    notes: tuple[str, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: The words after ``doctor``.

    Returns:
        0 where INT8 training runs on some device, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-int8 doctor",
        description="Show what is here, what will compute on each device and why, and what to install.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    found = look()
    verdicts = diagnose(found)
    if options.json:
        record = {"found": dataclasses.asdict(found), "verdicts": [dataclasses.asdict(v) for v in verdicts]}
        print(json.dumps(record, indent=1))
    else:
        print("\n".join([*inventory(found), "", *(line for v in verdicts for line in paragraph(v))]))
    return 0 if any(v.usable for v in verdicts) else 1


def diagnose(found: Found, check: Check = self_check) -> list[Verdict]:
    """A verdict for the CPU and one for each GPU, or for the absence of one.

    Args:
        found: The machine.
        check: Runs the self-check of a backend on a device.
    """
    gpus = [_gpu(found, index, gpu, check) for index, gpu in enumerate(found.driver.gpus)]
    return [_cpu(found, check), *(gpus or [_gpu(found, 0, None, check)])]


def _cpu(found: Found, check: Check) -> Verdict:
    backend = backends.load("onednn")
    notes = []
    if found.cpu.limit:
        notes.append(f"{ISA_LIMIT}={found.cpu.limit} keeps oneDNN from newer instructions")
    missing = []
    if not found.numba:
        what = "numba cannot be imported: quantization takes torch's operations, with the same result, slower"
        missing.append(Obstacle(what=what, remedy="pip install numba"))
    if not backend.exact:
        uses = "backend 'reference': exact and slow float64 arithmetic, not INT8"
        what = "the INT8 product of this CPU is not exact"
        missing.append(Obstacle(what=what, remedy="train on another CPU: with VNNI or AVX2 it is exact"))
        return Verdict(device="cpu", usable=False, uses=uses, notes=tuple(notes), obstacles=tuple(missing))
    usable, outcome = _checked(backend, "cpu", check)
    return Verdict(
        device="cpu",
        usable=usable,
        uses=backend.route(convolution=True),
        check=outcome,
        notes=tuple(notes),
        obstacles=tuple(missing),
    )


def _gpu(found: Found, index: int, gpu: Gpu | None, check: Check) -> Verdict:
    device = f"cuda:{index}" if gpu else "cuda"
    missing = tuple(obstacles(found, gpu))
    notes = []
    if gpu is not None and not missing and (reason := why_no_gain(gpu.capability)):
        half = "bf16-mixed" if gpu.capability >= (8, 0) else "16-mixed"
        notes.append(f"INT8 gains no time here: {reason}; train with precision={half!r}, without the plugin")
    if missing:
        return Verdict(device=device, usable=False, uses="nothing yet", obstacles=missing)
    backend = backends.load("cupy")
    usable, outcome = _checked(backend, device, check)
    uses = f"{backend.route(convolution=True)}; {UNPROVEN}"
    return Verdict(device=device, usable=usable, uses=uses, check=outcome, notes=tuple(notes))


def _checked(backend: Backend, device: str, check: Check) -> tuple[bool, str]:
    try:
        results = check(backend, device)
    except Exception as error:  # whatever a driver or a compiler throws is what the user came to read
        return False, f"failed: {type(error).__name__}: {error}"
    wrong = [name for name, right in results.items() if not right]
    if wrong:
        return False, f"WRONG: {', '.join(wrong)}; do not train here, and please report it"
    return True, f"{len(results)} of {len(results)} results equal exact arithmetic"


def inventory(found: Found) -> list[str]:
    """Lines that say what is here."""
    driver, cupy = found.driver, found.cupy
    cuda = "no CUDA" if found.torch.cuda is None else f"CUDA {found.torch.cuda}, uses {found.torch.gpus} GPU(s)"
    newest = driver.problem if driver.cuda is None else "CUDA up to {}.{}".format(*driver.cuda)
    release = driver.release or ("none" if driver.cuda is None else "release unknown")
    provider = ", ".join(cupy.distributions)
    lines = [
        ("lightning-int8", __version__),
        ("torch", f"{found.torch.version} ({cuda})"),
        ("driver", f"{release} ({newest})"),
        *(("GPU", f"{gpu.name}, compute capability {'{}.{}'.format(*gpu.capability)}") for gpu in driver.gpus),
        ("CuPy", f"{provider} (CUDA {cupy.cuda})" if cupy.cuda else f"{provider} {cupy.error}".strip()),
        *(("NVRTC", f"{'{}.{}'.format(*c.version)} in {c.path}") for c in found.compilers),
        ("CPU", f"{found.cpu.name} ({', '.join(found.cpu.features) or 'no INT8 instructions known'})"),
        ("numba", found.numba or "cannot be imported"),
    ]
    width = max(len(name) for name, _ in lines)
    return [f"{name:<{width}}  {value}" for name, value in lines]


def paragraph(verdict: Verdict) -> list[str]:
    """Lines that say what happens on a device."""
    lines = [f"{verdict.device}: {'usable' if verdict.usable else 'not usable'}", f"  computes: {verdict.uses}"]
    if verdict.check:
        lines.append(f"  self-check: {verdict.check}")
    lines += [f"  note: {note}" for note in verdict.notes]
    for obstacle in verdict.obstacles:
        lines += [f"  missing: {obstacle.what}", f"    do: {obstacle.remedy}"]
    return lines
