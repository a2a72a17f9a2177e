"""Kernels to machine code without a GPU: the compile matrix, the cache on disk, and the launch through CuPy (faked)."""

import contextlib
import io
import json
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from lightning_int8.cli import main
from lightning_int8.kernels import build, cuda_device, machine_code, nvrtc
from lightning_int8.kernels.catalogue import PLAIN, TILED, catalogue
from lightning_int8.kernels.device import Program
from lightning_int8.kernels.variants import compute_capability

FOUR_STAGES = {
    "128x256": ("IMMA.16832.S8.S8", 64),
    "128x128": ("IMMA.16832.S8.S8", 64),
    "64x64": ("IMMA.16832.S8.S8", None),
}
THREE_STAGES = {tile: FOUR_STAGES[tile] for tile in ("128x128", "64x64")}

ARCHITECTURES = {  # INT8 instructions, and how many of them the kernel of a tile has
    "61": {"128x128": ("dp4a.s32.s32", 512), "64x64": ("dp4a.s32.s32", None)},
    "75": {"128x128": ("IMMA.8816.S8.S8", 256), "64x64": ("IMMA.8816.S8.S8", None)},
    "80": FOUR_STAGES,
    "86": THREE_STAGES,
    "89": THREE_STAGES,
    "90a": {
        "128x256": ("IGMMA.64x128x32.S8.S8", 8),
        "128x128": ("IGMMA.64x128x32.S8.S8", 4),
        "128x64": ("IGMMA.64x64x32.S8.S8", 4),
    },
    "100": FOUR_STAGES,
    "120": THREE_STAGES,
}
MOST_REGISTERS = 255


def needs_nvrtc(*architectures):
    architectures = {compute_capability(str(a)) for a in architectures}
    known = {a for n in nvrtc.installed() for a in n.architectures}
    missing = sorted(architectures - known)
    return pytest.mark.skipif(bool(missing), reason=f"no NVRTC that compiles for {missing} is installed")


# --- the compile matrix --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix():
    """Every kernel of every architecture that can be compiled here, by one command that uses all cores."""
    known = {a for n in nvrtc.installed() for a in n.architectures}
    architectures = [a for a in ARCHITECTURES if compute_capability(a) in known]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["kernels", "--arch", ",".join(architectures), "--json"]) == 0
    rows = json.loads(out.getvalue())
    return {a: [row for row in rows if row["arch"] == f"sm_{a}"] for a in architectures}


@pytest.mark.slow
@pytest.mark.skipif(machine_code.disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("arch", [pytest.param(a, marks=needs_nvrtc(a)) for a in ARCHITECTURES])
def test_no_kernel_spills_and_products_are_int8_instructions(arch, matrix):
    rows, items = matrix[arch], catalogue(f"sm_{arch}")
    assert {row["program"] for row in rows} == {item.label for item in items}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= MOST_REGISTERS
        tiled = row["program"].partition(".")[0] not in {name.partition(".")[0] for name in PLAIN}
        counts = row["int8_instructions"]
        if not tiled:
            assert not counts, row
            continue
        instruction, count = ARCHITECTURES[arch][row["program"].rpartition(" ")[2]]
        assert set(counts) == {instruction}, row
        assert count in (None, counts[instruction]), row
    entries = {row["entry"] for row in rows}
    assert {"gemm_nt", "gemm_nn", "gemm_tn", "conv_output", "conv_grad_input", "conv_grad_weight"} <= entries


def test_every_source_is_in_the_catalogue():
    families = ("dp4a", "imma", "wgmma")
    named = set(PLAIN) | {source.format(family) for source in TILED for family in families}
    assert {p.name for p in build.SOURCES.glob("*.cu")} == named


def test_counting_reads_machine_code():
    text = """
\t.section .text.first,"ax"
.text.first:
        /*0000*/              IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0010*/         @!P0 IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0020*/              IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.text.second:
        /*0000*/              IDP.4A.S8.S8 R1, R2, R3, R1 ;
"""
    counts = machine_code.count_machine_code(text)
    assert counts == {"first": {"IMMA.16832.S8.S8": 2}, "second": {"IDP.4A.S8.S8": 1}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arch", "60"], "sm_60 has no INT8 dot product"), (["--arch", "75", "--wrong"], "unrecognized arguments")],
)
def test_command_line_errors(arguments, message, capsys):
    try:
        code = main(["kernels", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(nvrtc, "installed", lambda: ())
    assert main(["kernels", "--arch", "61"]) == 2
    assert (
        "no NVRTC that compiles for sm_61 (found: none); pip install nvidia-cuda-nvrtc-cu12" in capsys.readouterr().err
    )
    assert main(["kernels", "--arch", "120"]) == 2
    assert "pip install 'nvidia-cuda-nvrtc==13.0.*'" in capsys.readouterr().err


# --- the cache -----------------------------------------------------------------------------------------------------


class FakeCompiler:
    version = (13, 0)

    def __init__(self):
        self.calls = 0

    def compile(self, source, name, headers, arch, options):
        self.calls += 1
        return nvrtc.Compiled(f"{arch} {options}".encode() * 1000, "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_program_is_compiled_once(cache, capsys):
    compiler, program = FakeCompiler(), Program("quantize.cu")
    first = build.cubin(program, "sm_80", compiler)
    assert "compiled quantize.cu for sm_80 in" in capsys.readouterr().err
    assert build.cubin(program, "sm_80", compiler) == first
    assert compiler.calls == 1
    assert capsys.readouterr().err == ""
    assert len(list(cache.iterdir())) == 1


def test_what_enters_the_machine_code_enters_the_key(cache, monkeypatch):
    compiler, program = FakeCompiler(), Program("quantize.cu")
    build.cubin(program, "sm_80", compiler)
    build.cubin(program, "sm_86", compiler)
    build.cubin(Program("quantize.cu", ("-DX=1",)), "sm_80", compiler)
    compiler.version = (13, 1)
    build.cubin(program, "sm_80", compiler)
    changed = build.headers() | {"pieces.cuh": "// changed"}
    monkeypatch.setattr(build, "headers", lambda: changed)
    build.cubin(program, "sm_80", compiler)
    assert compiler.calls == 5


def test_a_folder_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.Path, "read_bytes", lambda path: (_ for _ in ()).throw(FileNotFoundError))
    assert build.cubin(Program("quantize.cu"), "sm_80", FakeCompiler())
    assert "machine code is not kept" in capsys.readouterr().err


def _rank(folder, results):
    import os

    os.environ[build.CACHE_VARIABLE] = folder
    results.put(build.cubin(Program("quantize.cu"), "sm_80", FakeCompiler()))


def test_ranks_may_compile_at_the_same_time(cache):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(str(cache), results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    images = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(images) == 1
    assert [p.suffix for p in cache.iterdir()] == [".cubin"]


@needs_nvrtc(80)
def test_real_machine_code_and_a_real_error(cache):
    compiler = nvrtc.compiler_for("sm_80")
    image = build.cubin(Program("gemm_finish.cu"), "sm_80", compiler)
    assert image[:4] == b"\x7fELF"
    with pytest.raises(nvrtc.CompileError, match=r"(?s)broken.cu for sm_80.*identifier"):
        compiler.compile("int f() { return x; }", "broken.cu", {}, "sm_80", ())


# --- launches through CuPy -----------------------------------------------------------------------------------------


class FakeCupy:
    """Records what CuPy would be told."""

    def __init__(self):
        self.launches, self.attributes = [], []
        module = SimpleNamespace(load=lambda image: None, get_function=self.get_function)
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 13000)
        driver = SimpleNamespace(funcSetAttribute=lambda *a: self.attributes.append(a))
        stream = SimpleNamespace(from_external=lambda s: ("stream", s))
        self.cuda = SimpleNamespace(
            runtime=runtime, driver=driver, Stream=stream, function=SimpleNamespace(Module=lambda: module)
        )

    def get_function(self, entry):
        function = lambda *args, **named: self.launches.append((entry, args, named))  # noqa: E731
        function.ptr = 77
        return function


def test_launches_go_to_the_current_stream_with_enough_shared_memory(monkeypatch, cache):
    cupy, compiler = FakeCupy(), FakeCompiler()
    compiler.architectures = (75, 80, 86, 90)
    properties = SimpleNamespace(major=8, minor=9, multi_processor_count=128)
    devices, torch_stream = [], SimpleNamespace(cuda_stream=1234)

    @contextlib.contextmanager
    def device(index):
        devices.append(index)
        yield

    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(cuda_device, "compiler_of", lambda major: compiler)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch_stream)
    gpu = cuda_device.CudaDevice(3)
    assert (gpu.arch, gpu.multiprocessors) == ("sm_86", 128)
    kernel = gpu.kernel(Program("quantize.cu"), "quantize_f32")
    assert gpu.kernel(Program("quantize.cu"), "quantize_f32") is kernel
    for shared in (1000, 64 << 10, 64 << 10):
        kernel([2, 3], [256], ["parameters"], shared_mem=shared)
    assert cupy.attributes == [(77, 8, 64 << 10)]
    named = {"shared_mem": 64 << 10, "stream": ("stream", torch_stream)}
    assert cupy.launches[-1] == ("quantize_f32", ((2, 3), (256,), ("parameters",)), named)
    assert set(devices) == {3}
    assert compiler.calls == 1


@pytest.mark.parametrize(
    ("known", "capability", "best"),
    [
        ((75, 80, 86), (8, 6), "sm_86"),
        ((75, 80), (8, 9), "sm_80"),
        ((90, 120), (12, 1), "sm_120"),
        ((80, 90), (9, 0), "sm_90a"),
    ],
)
def test_machine_code_is_for_an_architecture_that_the_gpu_runs(known, capability, best):
    assert cuda_device.best_architecture(SimpleNamespace(version=(13, 0), architectures=known), *capability) == best


def test_a_gpu_that_the_compiler_left_behind_is_named():
    compiler = SimpleNamespace(version=(13, 0), architectures=(75, 80))
    with pytest.raises(RuntimeError, match=r"NVRTC 13.0 does not compile for compute capability 6.1"):
        cuda_device.best_architecture(compiler, 6, 1)
    with pytest.raises(RuntimeError, match=r"no NVRTC 11 .* pip install a newer version"):
        nvrtc.compiler_of(11)
