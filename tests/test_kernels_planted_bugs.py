"""One planted bug of each class, in the sources that ship: the tests of the kernels would see it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulator import KernelError, Machine, sanitizers
from emulator.device import EmulatedDevice
from kernel_cases import SCHEDULES, SMALL, expected_sums, needs_compiler, random_plane

from lightning_int8.kernels.gemm import gemm
from lightning_int8.kernels.result import Result

pytestmark = needs_compiler


@pytest.fixture(scope="module", autouse=True)
def sanitized(request):
    """Reports of each sanitizer, from processes that run beside the other tests of this file."""
    names = {item.name for item in request.session.items}
    wanted = [s for s in ("thread", "address") if f"test_sanitizers_report[{s}]" in names]
    with ThreadPoolExecutor() as pool:
        yield {s: pool.submit(sanitizers.reports, s, SANITIZED.replace("@@", repr(cases_of(s)))) for s in wanted}


def cases_of(sanitizer):
    return {name: case for name, case in SANITIZER_CASES.items() if case[0] == sanitizer}


BARRIER = "      __syncthreads();  // everyone's part of this tile is there, and everyone is done with the one before\n"

RELEASE = """      multiply(shared + tile % STAGES * STAGE_BYTES);
      wait_for_products<1>();  // the tile before this one has been read
      if (tile > 0 && threadIdx.x % 32 == 0) barrier_arrive(empty + (tile - 1) % STAGES);
"""
RELEASED_BEFORE_IT_IS_READ = """      if (threadIdx.x % 32 == 0) barrier_arrive(empty + tile % STAGES);
      multiply(shared + tile % STAGES * STAGE_BYTES);
      wait_for_products<1>();
"""

WRONG_RESULTS = {  # class of bug: family, contraction, file, text, replacement
    "missing barrier (imma)": ("imma", "output", "imma.cuh", BARRIER, ""),
    "missing barrier (dp4a)": (
        "dp4a",
        "output",
        "dp4a.cuh",
        "      __syncthreads();  // this tile is there, and everyone is done with the one before\n",
        "",
    ),
    "slot reused early": (
        "imma",
        "output",
        "imma.cuh",
        "char* stage = shared + issued % STAGES * STAGE_BYTES",
        "char* stage = shared + (issued < STAGES ? issued : issued + 1) % STAGES * STAGE_BYTES",
    ),
    "missing wait": ("imma", "output", "imma.cuh", "wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>"),
    "wrong fragment, left": ("imma", "grad_weight", "imma_tile.cuh", "pairs[1], 0x7531", "pairs[1], 0x7351"),
    "wrong fragment, right": (
        "imma",
        "output",
        "imma_tile.cuh",
        "first[0] = f[0], first[1] = f[1], second[0]",
        "first[0] = f[1], first[1] = f[0], second[0]",
    ),
    "wrong byte transpose": ("dp4a", "grad_weight", "byte_transpose.cuh", "(a, b, 0x5140)", "(a, b, 0x1540)"),
    "missing barrier (wgmma)": (
        "wgmma",
        "output",
        "wgmma.cuh",
        "    __syncthreads();  // the buffers are free for drain()\n",
        "",
    ),
    "missing wait (wgmma)": (
        "wgmma",
        "output",
        "wgmma.cuh",
        "wait_for_copies<UNDER_WAY>",
        "wait_for_copies<UNDER_WAY + 1>",
    ),
    "slot reused early (wgmma)": ("wgmma", "output", "wgmma.cuh", "wait_for_products<1>", "wait_for_products<2>"),
    "wrong phase": ("wgmma", "output", "wgmma.cuh", "STAGES, tile / STAGES & 1)", "STAGES, tile / STAGES + 1 & 1)"),
    "missing fence": ("wgmma", "output", "wgmma.cuh", "      fence_operands();\n", ""),
    "missing fence (transposed)": ("wgmma", "grad_weight", "wgmma.cuh", "      fence_operands();\n", ""),
    "wrong descriptor: groups of rows": (
        "wgmma",
        "output",
        "wgmma_tile.cuh",
        "STRIDE = GROUP_BYTES / 16",
        "STRIDE = ROW_BYTES / 16",
    ),
    "wrong descriptor: k permuted twice": (
        "wgmma",
        "output",
        "wgmma_tile.cuh",
        "shared_address(tile) + row * ROW_BYTES + k;",
        "shared_address(tile) + offset(row + 1, k) - ROW_BYTES;",
    ),
    "wrong swizzle": ("wgmma", "output", "wgmma_tile.cuh", "(k / 16 ^ row % 8)", "(k / 16 ^ row / 2 % 8)"),
    "last piece of k dropped": ("imma", "output", "sources.cuh", "k_left > 0", "k_left > 16"),
}


@pytest.mark.parametrize("bug", WRONG_RESULTS)
def test_wrong_results_or_a_deadlock_in_some_schedule(bug):
    family, contraction, file, text, replacement = WRONG_RESULTS[bug]
    arch, variant = SMALL[family]
    a, b = random_plane((80, 700)), random_plane((72, 700))  # more tiles than buffers
    if contraction == "grad_weight":
        a, b = random_plane((700, 80)), random_plane((700, 72))
    truth = expected_sums(contraction, a, b)
    wrong = []
    for schedule, copies in SCHEDULES:
        device = EmulatedDevice(arch, Machine(schedule=schedule, copies=copies), edits={file: (text, replacement)})
        try:
            sums = gemm(device, contraction, a, b, Result(dtype=torch.int64), variant)
            wrong.append(not torch.equal(sums, truth))
        except KernelError as error:
            wrong.append("deadlock" in str(error))
    assert any(wrong)


SANITIZER_CASES = {  # name: sanitizer, kernel, family, {file: (text, replacement)}, report
    "gemm_imma races": ("thread", "gemm", "imma", {}, ""),
    "gemm_dp4a races": ("thread", "gemm", "dp4a", {}, ""),
    "gemm_wgmma races": ("thread", "gemm", "wgmma", {}, ""),
    "conv_wgmma races": ("thread", "conv", "wgmma", {}, ""),
    "slot reused early (wgmma)": (
        "thread",
        "gemm",
        "wgmma",
        {"wgmma.cuh": (RELEASE, RELEASED_BEFORE_IT_IS_READ)},
        "data race",
    ),
    "conv_imma races": ("thread", "conv", "imma", {}, ""),
    "columns races": ("thread", "columns", "imma", {}, ""),
    "missing barrier (columns)": (
        "thread",
        "columns",
        "imma",
        {"error_sums.cu": ("  __syncthreads();\n", "")},
        "data race",
    ),
    "missing barrier": ("thread", "gemm", "imma", {"imma.cuh": (BARRIER, "")}, "data race"),
    "slot reused early": ("thread", "gemm", "imma", {"imma.cuh": WRONG_RESULTS["slot reused early"][3:]}, "data race"),
    "gemm_imma bounds": ("address", "gemm", "imma", {}, ""),
    "gemm_dp4a bounds": ("address", "gemm", "dp4a", {}, ""),
    "gemm_wgmma bounds": ("address", "gemm", "wgmma", {}, ""),
    "conv_wgmma bounds": ("address", "conv", "wgmma", {}, ""),
    "conv_imma bounds": ("address", "conv", "imma", {}, ""),
    "conv_direct bounds": ("address", "direct", "imma", {}, ""),
    "columns bounds": ("address", "columns", "imma", {}, ""),
    "a row beyond the end": (
        "address",
        "gemm",
        "imma",
        {"sources.cuh": ("rows_left(rows - first_row", "rows_left(rows + 1 - first_row")},
        "heap-buffer-overflow",
    ),
    "a result beyond the end": (
        "address",
        "gemm",
        "imma",
        {"gemm.cuh": ("if (m >= g.m || n >= g.n) return;", "if (n >= g.n) return;")},
        "heap-buffer-overflow",
    ),
}

SANITIZED = """
import torch
from emulator import Machine, sanitizers
from emulator.device import EmulatedDevice
from kernel_cases import SMALL, random_plane
from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels.convolution import convolution
from lightning_int8.kernels.gemm import gemm
from lightning_int8.kernels.quantize import quantize
from lightning_int8.kernels.reductions import absmax, error_sums, histogram

def run_gemm(device, variant):
    gemm(device, "output", random_plane((61, 530)), random_plane((70, 530)), None, variant)
    gemm(device, "grad_weight", random_plane((530, 62)), random_plane((530, 70)), None, variant)

def run_conv(device, variant, channels=16, groups=1):
    both = dict(kernel_size=(3, 3), stride=(2, 1), dilation=(1, 2), padding=((1, 1), (0, 2)), groups=groups)
    geometry = ConvGeometry(input_size=(5, 7), **both)
    x, w = random_plane((1, 5, 7, channels)), random_plane((channels, 3, 3, channels // groups))
    g = random_plane((1, *geometry.output_size, channels))
    for contraction, a, b in (("output", x, w), ("grad_input", g, w), ("grad_weight", g, x)):
        convolution(device, contraction, a, b, geometry, None, variant)

def run_columns(device, variant):
    for dtype in (torch.float32, torch.bfloat16):
        x, key = torch.randn(7, 37).to(dtype), torch.tensor([1, 2, 3])
        clip_value = absmax(device, x, -1, sides=True)
        quantize(device, x, clip_value, 24, True, -1, key)
        error_sums(device, x, torch.stack((clip_value, clip_value)), (8, 24), True, -1)
        histogram(device, x, absmax(device, x, None))

RUN = dict(gemm=run_gemm, conv=run_conv, columns=run_columns, direct=lambda d, v: run_conv(d, v, 6, 3))
for name, (sanitizer, kernel, family, edits, report) in @@.items():
    sanitizers.case(name)
    arch, variant = SMALL[family]
    for schedule, copies in ((2, "early"),) if report else ((1, "late"), (2, "early")):
        machine = Machine(schedule=schedule, copies=copies, sanitizer=sanitizer)
        RUN[kernel](EmulatedDevice(arch, machine, 2, edits), variant)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_report(sanitizer, sanitized):
    """One process for all: it takes longer to start than to run. The symbols of its later modules are not known."""
    cases, found = cases_of(sanitizer), sanitized[sanitizer].result()
    assert list(found) == list(cases)
    for name, summary in found.items():
        expected = cases[name][-1]
        assert expected in summary if expected else not summary, (name, summary)
