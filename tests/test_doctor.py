"""`lightning-int8 doctor`: what it finds here, and what it says about machines that are not here."""

import dataclasses
import json
import re
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator.compiler import gpp
from emulator.device import EmulatedDevice
from kernel_cases import needs_compiler

from lightning_int8 import backends
from lightning_int8.backends.cupy import CuPy as CuPyBackend
from lightning_int8.backends.onednn import OneDNN
from lightning_int8.cli import doctor, main, nvidia_driver
from lightning_int8.cli.doctor import diagnose, inventory, paragraph
from lightning_int8.cli.found import Compiler, Cpu, CuPy, Found, Torch, look
from lightning_int8.cli.nvidia_driver import Driver, Gpu, driver
from lightning_int8.cli.self_check import self_check

RTX_3090 = Gpu(name="NVIDIA GeForce RTX 3090", capability=(8, 6))
NVRTC_12 = Compiler(version=(12, 9), path="/site/libnvrtc.so.12", architectures=(50, 60, 61, 70, 75, 80, 86, 89, 90))
NVRTC_13 = Compiler(version=(13, 0), path="/site/libnvrtc.so.13", architectures=(75, 80, 86, 89, 90, 100, 103, 120))
CUPY_12 = CuPy(distributions=("cupy-cuda12x 13.6.0",), cuda=12)
CUPY_13 = CuPy(distributions=("cupy-cuda13x 14.2.0",), cuda=13)
NO_CUPY = CuPy(error="not installed")


def machine(gpu=RTX_3090, newest=(13, 0), release="580.65.06", torch_cuda="13.0", cupy=CUPY_13, compilers=(NVRTC_13,)):
    """A machine on which everything fits, but for what is given."""
    usable = torch_cuda is not None and int(torch_cuda[:2]) <= newest[0]
    return Found(
        torch=Torch(version="2.13.0", cuda=torch_cuda, gpus=int(usable)),
        driver=Driver(cuda=newest, release=release, gpus=(gpu,)),
        cupy=cupy,
        compilers=compilers,
        cpu=Cpu(name="a CPU", features=("avx2", "avx512_vnni")),
        numba="0.61",
    )


def right(backend, device):
    return {"linear output": True}


def gpu_text(found, check=right):
    verdict = diagnose(found, check)[1]
    return verdict.usable, "\n".join(paragraph(verdict))


EXTRA_12, EXTRA_13 = ("pip install 'lightning-int8[cuda12]'", "pip install 'lightning-int8[cuda13]'")

CASES = {
    "no CUDA driver": (
        dataclasses.replace(machine(), driver=Driver(problem="libcuda.so.1 cannot be loaded"), cupy=NO_CUPY),
        "no NVIDIA driver: libcuda.so.1 cannot be loaded",
        "install its driver (525.60.13 or newer for CUDA 12, 580.65.06 or newer for CUDA 13)",
    ),
    "a driver without a GPU": (
        dataclasses.replace(machine(), driver=Driver(cuda=(13, 0), problem="the driver sees no GPU")),
        "no GPU: the driver sees no GPU",
        "nvidia-smi must list the GPU",
    ),
    "torch without CUDA": (
        machine(torch_cuda=None),
        "torch 2.13.0 is built without CUDA",
        "install the build of torch for CUDA 13 (pytorch.org/get-started)",
    ),
    "CuPy missing": (machine(cupy=NO_CUPY), "CuPy is not installed", EXTRA_13),
    "CuPy missing beside torch for CUDA 12": (
        machine(torch_cuda="12.6", cupy=NO_CUPY, compilers=(NVRTC_12,)),
        "CuPy is not installed",
        EXTRA_12,
    ),
    "CuPy newer than the driver": (
        machine(newest=(12, 4), release="550.54.15", torch_cuda="12.6"),
        "CuPy is built for CUDA 13 (cupy-cuda13x 14.2.0), and the driver runs CUDA up to 12.4",
        f"pip uninstall cupy-cuda13x, then {EXTRA_12}",
    ),
    "CuPy for CUDA 11": (
        machine(cupy=CuPy(distributions=("cupy-cuda11x 13.6.0",), cuda=11)),
        "CuPy is built for CUDA 11 (cupy-cuda11x 13.6.0)",
        f"pip uninstall cupy-cuda11x, then {EXTRA_13}",
    ),
    "two CuPys": (
        machine(cupy=CuPy(distributions=("cupy-cuda12x 13.6.0", "cupy-cuda13x 14.2.0"), cuda=13)),
        "several CuPys overwrite each other: cupy-cuda12x 13.6.0, cupy-cuda13x 14.2.0",
        f"pip uninstall cupy-cuda12x cupy-cuda13x, then {EXTRA_13}",
    ),
    "a broken CuPy": (
        machine(cupy=CuPy(distributions=("cupy-cuda13x 14.2.0",), error="libcublas.so.13: cannot open")),
        "CuPy cannot be imported: libcublas.so.13: cannot open",
        f"pip uninstall cupy-cuda13x, then {EXTRA_13}",
    ),
    "a driver too old for torch": (
        machine(newest=(12, 2), release="535.104.05", cupy=CUPY_12, compilers=(NVRTC_12,)),
        "driver 535.104.05 runs CUDA up to 12.2, and torch 2.13.0 is built for CUDA 13.0",
        "update the NVIDIA driver to 580.65.06 or newer; or install the build of torch for CUDA 12 "
        f"(pytorch.org/get-started) and {EXTRA_12}",
    ),
    "a driver too old for everything": (
        machine(newest=(11, 4), release="470.82.01", torch_cuda="12.6", cupy=CUPY_12, compilers=(NVRTC_12,)),
        "driver 470.82.01 runs CUDA up to 11.4",
        "update the NVIDIA driver to 525.60.13 or newer",
    ),
    "no compiler of CuPy's CUDA": (
        machine(cupy=CUPY_12, torch_cuda="12.6"),
        "no NVRTC 12, which CuPy's CUDA asks for (found: 13.0)",
        EXTRA_12,
    ),
    "a compiler too old for the GPU": (
        machine(gpu=Gpu(name="B200", capability=(10, 0)), torch_cuda="12.8", cupy=CUPY_12, compilers=(NVRTC_12,)),
        "NVRTC 12.9 does not compile for compute capability 10.0",
        f"{EXTRA_12} --upgrade",
    ),
    "Pascal under CUDA 13": (
        machine(gpu=Gpu(name="GTX 1080 Ti", capability=(6, 1)), torch_cuda="12.6"),
        "CuPy is built for CUDA 13 (cupy-cuda13x 14.2.0), and a GPU of compute capability 6.1 needs CUDA 12",
        f"pip uninstall cupy-cuda13x, then {EXTRA_12}",
    ),
    "a GPU without INT8": (
        machine(gpu=Gpu(name="Tesla P100", capability=(6, 0)), torch_cuda="12.6", cupy=CUPY_12, compilers=(NVRTC_12,)),
        "compute capability 6.0 has no INT8 product",
        "train on the CPU, or on this GPU in float, without the plugin",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_obstacle_is_named_with_its_remedy(case):
    found, what, remedy = CASES[case]
    usable, text = gpu_text(found)
    assert not usable
    assert "self-check" not in text
    first = text.split("  missing: ")[1]
    assert first.startswith(what)
    assert remedy in first.split("    do: ")[1]
    inventory(found)


def test_one_cause_brings_one_remedy():
    for name in set(CASES) - {"a driver too old for everything"}:
        assert len(diagnose(CASES[name][0], right)[1].obstacles) == 1, name


def test_a_torch_without_kernels_for_the_gpu_is_named():
    found = machine(gpu=Gpu(name="GTX 1080 Ti", capability=(6, 1)), torch_cuda="12.8", cupy=CUPY_12)
    torch_ = dataclasses.replace(found.torch, architectures=("sm_75", "sm_80", "sm_90"))
    usable, text = gpu_text(dataclasses.replace(found, torch=torch_, compilers=(NVRTC_12,)))
    assert not usable
    assert "has no kernels for compute capability 6.1" in text
    assert "for CUDA 12.6 if the GPU is older than 7.5" in text


@pytest.mark.parametrize(
    ("name", "capability", "precision"), [("V100", (7, 0), "16-mixed"), ("B300", (10, 3), "bf16-mixed")]
)
def test_a_gpu_without_gain_is_told_what_to_train_with(name, capability, precision):
    versions = {"torch_cuda": "12.6", "cupy": CUPY_12, "compilers": (NVRTC_12,)} if capability < (7, 5) else {}
    usable, text = gpu_text(machine(gpu=Gpu(name=name, capability=capability), **versions))
    assert usable
    assert "INT8 gains no time here" in text
    assert f"train with precision='{precision}', without the plugin" in text


@pytest.mark.parametrize("versions", [{}, {"torch_cuda": "12.6", "cupy": CUPY_12, "compilers": (NVRTC_12,)}])
def test_a_machine_on_which_all_fits(versions):
    usable, text = gpu_text(machine(**versions))
    assert usable
    assert "missing" not in text
    assert "backend='auto' refuses GPUs" in text
    with pytest.raises(RuntimeError, match="no INT8 backend of this version is proven on device 'cuda'"):
        backends.backend_for(SimpleNamespace(device=torch.device("cuda")), "auto")


def test_wrong_results_and_failures_of_the_check_are_told():
    usable, text = gpu_text(machine(), lambda *_: {"linear output": True, "convolution grad_input": False})
    assert not usable
    assert "self-check: WRONG: convolution grad_input; do not train here" in text

    def refused(*_):
        raise RuntimeError("NVRTC: no such file")

    usable, text = gpu_text(machine(), refused)
    assert not usable
    assert "self-check: failed: RuntimeError: NVRTC: no such file" in text


DOCUMENTED = re.findall(
    r"^ *```text doctor: (.+?)\n(.*?)^ *```$",
    (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("name", "text"), DOCUMENTED)
def test_the_docs_show_what_doctor_says(name, text):
    found = machine() if name == "ready" else CASES[name][0]
    said = gpu_text(found, lambda *_: dict.fromkeys("abcdefgh", True))[1]
    assert textwrap.dedent(text).rstrip() == said


def test_the_docs_show_a_machine_that_is_ready_and_three_that_are_not():
    assert len(DOCUMENTED) == 4


# --- the CPU, and the exit code ------------------------------------------------------------------------------------


def test_a_cpu_without_an_exact_product_is_not_usable(monkeypatch, capsys):
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: OneDNN(None) if name == "onednn" else load(name))
    found = dataclasses.replace(machine(cupy=NO_CUPY), numba="")
    monkeypatch.setattr(doctor, "look", lambda: found)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "cpu: not usable\n  computes: backend 'reference': exact and slow float64 arithmetic, not INT8" in out
    assert "do: pip install numba" in out


def test_the_cpu_of_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    cpu = record["verdicts"][0]
    assert (cpu["device"], cpu["usable"]) == ("cpu", True)
    assert cpu["check"] == "8 of 8 results equal exact arithmetic"
    assert cpu["notes"] == ["ONEDNN_MAX_CPU_ISA=DEFAULT keeps oneDNN from newer instructions"]
    assert record["found"]["torch"]["version"] == torch.__version__
    assert main(["doctor"]) == 0
    assert "cpu: usable" in capsys.readouterr().out


def test_the_check_sees_a_wrong_sum():
    class OffByOne(OneDNN):
        def accumulate(self, contraction, a, b, geometry):
            return super().accumulate(contraction, a, b, geometry) + (contraction == "grad_input")

    results = self_check(OffByOne(lambda a, b: (a.double() @ b.double()).int()), "cpu")
    assert [name for name, is_right in results.items() if not is_right] == [
        "linear grad_input",
        "convolution grad_input",
    ]


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_61", "sm_80"])
def test_the_check_of_a_gpu_runs_on_the_emulated_machine(arch):
    device = EmulatedDevice(arch)
    results = self_check(CuPyBackend(lambda tensor: device), "cpu")
    assert len(results) == 8
    assert all(results.values())


# --- what is looked at ---------------------------------------------------------------------------------------------

STUB = """
#define EXPORT extern "C"
EXPORT int cuDriverGetVersion(int *v) { *v = 12020; return 0; }
EXPORT int cuInit(unsigned) { return INIT; }
EXPORT int cuDeviceGetCount(int *n) { *n = 2; return 0; }
EXPORT int cuDeviceGet(int *d, int i) { *d = 10 + i; return 0; }
EXPORT int cuDeviceGetName(char *s, int, int d) { s[0] = 'A' + d - 10; s[1] = 0; return 0; }
EXPORT int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 7 + d - 10 : a == 76 ? 5 : -1; return 0; }
EXPORT int cuGetErrorString(int, const char **s) { *s = "no CUDA-capable device is detected"; return 0; }
"""


@needs_compiler
@pytest.mark.parametrize(
    ("status", "gpus", "problem"),
    [
        (0, (Gpu(name="A", capability=(7, 5)), Gpu(name="B", capability=(8, 5))), ""),
        (100, (), "cuInit: no CUDA-capable device is detected (100)"),
    ],
)
def test_the_driver_is_asked_through_its_own_interface(tmp_path, status, gpus, problem):
    source, library, module = tmp_path / "stub.cpp", tmp_path / f"libcuda{status}.so", tmp_path / "version"
    source.write_text(STUB)
    subprocess.run([gpp(), "-shared", "-fPIC", f"-DINIT={status}", source, "-o", library], check=True)
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert driver(str(library), module) == Driver(cuda=(12, 2), release="535.104.05", gpus=gpus, problem=problem)


def test_a_machine_without_a_driver(monkeypatch, tmp_path):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", missing)
    assert driver("libcuda.so.1", tmp_path / "none") == Driver(problem="libcuda.so.1 cannot be loaded")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "not installed"),
        (ImportError("libcublas.so.12: cannot open shared object file"), "libcublas.so.12: cannot open shared"),
    ],
)
def test_a_cupy_that_does_not_import(monkeypatch, error, message):
    from lightning_int8.cli import found

    real = found.importlib.import_module

    def importing(name):
        if name in ("cupy", "numba"):
            raise error
        return real(name)

    monkeypatch.setattr(found.importlib, "import_module", importing)
    seen = look()
    assert seen.cupy.cuda is None
    assert seen.cupy.error.startswith(message)
    assert seen.numba == ""
