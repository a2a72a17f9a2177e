"""The emulated machine itself: its instructions, its launches, and that it sees the bugs it is there to see."""

import re
import shutil

import numpy as np
import pytest
import torch
from emulator import KernelError, Machine, Module, sanitizers

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: kernels cannot be compiled for the emulated machine", allow_module_level=True)


def run(source, entry, grid, block, args, shared=0, options=(), **machine):
    kernel = Module(source, options=options, machine=Machine(**machine)).get_function(entry)
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    kernel(grid, block, args, shared_mem=shared)


# --- launches --------------------------------------------------------------------------------------------------------

WHO_AM_I = """
extern "C" __global__ void __launch_bounds__(64) who_am_i(int* out, int step) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = step * (100 * block + thread);
}
"""


def test_every_thread_of_every_block_runs_once():
    out = torch.full((3 * 2 * 2, 4 * 3 * 2), -1, dtype=torch.int32)
    run(WHO_AM_I, "who_am_i", (3, 2, 2), (4, 3, 2), (out.data_ptr(), np.int32(5)))
    assert torch.equal(out, 5 * (100 * torch.arange(12)[:, None] + torch.arange(24)).int())


@pytest.mark.parametrize(
    ("grid", "block", "args", "shared", "message"),
    [
        ((1,), (32,), (0, 5), 0, "arguments of \\[8, 8\\] bytes for parameters of \\[8, 4\\] bytes"),
        ((1,), (32,), (0, np.int32(5), 0), 0, "arguments of"),
        ((1,), (32,), (torch.zeros(1), np.int32(5)), 0, "does not take Tensor"),
        ((1,), (32,), (np.zeros(2), np.int32(5)), 0, "does not take ndarray"),
        ((1,), (33, 32), (0, np.int32(5)), 0, "1056 threads"),
        ((1, 70000), (32,), (0, np.int32(5)), 0, "grid .* is not possible"),
        ((0,), (32,), (0, np.int32(5)), 0, "grid .* is not possible"),
        ((1,), (32,), (0, np.int32(5)), 48 * 1024 + 1, "raise max_dynamic_shared_size_bytes"),
    ],
)
def test_launches_that_a_gpu_would_refuse_or_misread_are_refused(grid, block, args, shared, message):
    kernel = Module(WHO_AM_I).get_function("who_am_i")
    with pytest.raises((TypeError, ValueError), match=message):
        kernel(grid, block, args, shared_mem=shared)


def test_structures_go_by_value():
    source = """
struct Pair { const float* x; int count; double factor; };
extern "C" __global__ void scale(const Pair p, float* out) { out[threadIdx.x] = p.x[threadIdx.x] * p.factor; }
"""
    x, out = torch.arange(4.0), torch.zeros(4)
    pair = np.zeros(1, np.dtype([("x", "u8"), ("count", "i4"), ("factor", "f8")], align=True))
    pair[0] = (x.data_ptr(), 4, 2.5)
    run(source, "scale", (1,), (4,), (pair, out.data_ptr()))
    assert torch.equal(out, x * 2.5)


def test_compiler_errors_are_shown():
    with pytest.raises(RuntimeError, match=r"broken.cu:2.*no_such_function"):
        Module('\nextern "C" __global__ void f() { no_such_function(); }', name="broken.cu")


# --- threads that wait for each other ------------------------------------------------------------------------------

REVERSE = """
extern "C" __global__ void reverse(const int* in, int* out) {
  DYNAMIC_SHARED(bytes);
  int* shared = reinterpret_cast<int*>(bytes);
  shared[threadIdx.x] = in[threadIdx.x];
#ifdef BARRIER
  __syncthreads();
#endif
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
"""


def reverse(options, **machine):
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    run(REVERSE, "reverse", (1,), (128,), (x.data_ptr(), out.data_ptr()), 512, options, **machine)
    return torch.equal(out, x.flip(0))


@pytest.mark.parametrize("schedule", range(5))
def test_barriers_hold_in_every_schedule(schedule):
    assert reverse(["-DBARRIER"], schedule=schedule)


def test_a_missing_barrier_gives_wrong_results():
    assert not any(reverse([], schedule=schedule) for schedule in range(5))


def test_a_barrier_that_some_never_reach_is_a_deadlock():
    source = 'extern "C" __global__ void hang() { if (threadIdx.x < 40) __syncthreads(); }'
    with pytest.raises(KernelError, match=r"block \(0, 0, 0\): deadlock: 40 threads wait at a barrier"):
        run(source, "hang", (2,), (64,), ())


def test_shared_memory_starts_as_noise():
    source = 'extern "C" __global__ void read(int* out) { DYNAMIC_SHARED(s); out[blockIdx.x] = *(int*)s; }'
    out = torch.zeros(64, dtype=torch.int32)
    run(source, "read", (64,), (1,), (out.data_ptr(),), 16)
    assert len(out.unique()) > 60


# --- instructions --------------------------------------------------------------------------------------------------

WARP = """
extern "C" __global__ void sum(int* out) {
  int value = 1 << threadIdx.x % 31;
  for (int mask = 16; mask; mask /= 2) value = max(value, __shfl_xor_sync(~0u, value, mask));
  atomicAdd(out, value == 1 << 30 && __any_sync(~0u, threadIdx.x % 32 == 7));
  atomicMax(reinterpret_cast<unsigned*>(out + 1), 1000u - threadIdx.x);
}
"""


def test_lanes_exchange_and_atomics_add_up():
    out = torch.zeros(2, dtype=torch.int32)
    run(WARP, "sum", (3,), (96,), (out.data_ptr(),))
    assert out.tolist() == [3 * 96, 1000]


BYTES = """
extern "C" __global__ void bytes(const int* in, int* out) {
  const int a = in[2 * threadIdx.x], b = in[2 * threadIdx.x + 1];
  int* o = out + 4 * threadIdx.x;
  o[0] = __dp4a(a, b, 7), o[1] = __byte_perm(a, b, 0x7531), o[2] = __byte_perm(a, b, 0x9c04), o[3] = __umulhi(a, b);
}
"""


def test_byte_instructions():
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (64, 2)).astype(np.int32)
    out = torch.zeros(64, 4, dtype=torch.int32)
    run(BYTES, "bytes", (1,), (64,), (torch.from_numpy(words).data_ptr(), out.data_ptr()))
    signed = words.view(np.int8).reshape(64, 2, 4).astype(np.int64)
    unsigned = words.view(np.uint8).reshape(64, 8)
    assert np.array_equal(out[:, 0].numpy(), 7 + (signed[:, 0] * signed[:, 1]).sum(1))
    assert np.array_equal(out[:, 1].contiguous().numpy().view(np.uint8).reshape(64, 4), unsigned[:, [1, 3, 5, 7]])
    sign = [np.where(unsigned[:, i] > 127, 255, 0) for i in (4, 1)]  # nibbles 0xc and 0x9 replicate a sign
    assert np.array_equal(
        out[:, 2].contiguous().numpy().view(np.uint8).reshape(64, 4),
        np.stack([unsigned[:, 4], unsigned[:, 0], *sign], 1),
    )
    high = words.view(np.uint32)[:, 0].astype(np.uint64) * words.view(np.uint32)[:, 1] >> np.uint64(32)
    assert np.array_equal(out[:, 3].contiguous().numpy().view(np.uint32), high)


MMA = """
extern "C" __global__ void mma(const i8* a, const i8* b, int* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const u32 left[4] = {*(const u32*)(a + g * 32 + 4 * t), *(const u32*)(a + (g + 8) * 32 + 4 * t),
                       *(const u32*)(a + g * 32 + 16 + 4 * t), *(const u32*)(a + (g + 8) * 32 + 16 + 4 * t)};
  const u32 right[2] = {*(const u32*)(b + g * 32 + 4 * t), *(const u32*)(b + g * 32 + 16 + 4 * t)};
  int sums[4] = {1, 1, 1, 1};
  mma_m16n8k32(sums, left, right);
  c[g * 8 + 2 * t] = sums[0], c[g * 8 + 2 * t + 1] = sums[1];
  c[(g + 8) * 8 + 2 * t] = sums[2], c[(g + 8) * 8 + 2 * t + 1] = sums[3];
}
"""


def test_tensor_core_product_has_the_layout_of_the_ptx_isa():
    a, b = (torch.randint(-128, 128, (rows, 32), dtype=torch.int8) for rows in (16, 8))
    c = torch.zeros(16, 8, dtype=torch.int32)
    run(MMA, "mma", (1,), (32,), (a.data_ptr(), b.data_ptr(), c.data_ptr()))
    assert torch.equal(c, 1 + a.int() @ b.int().t())


LDMATRIX = """
extern "C" __global__ void load(const u16* in, u16* out) {
  DYNAMIC_SHARED(shared);
  for (int i = 0; i < 8; i++) ((u16*)shared)[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
  __syncthreads();
  u32 registers[4];
  load_matrices<COLUMNS>(registers, shared + threadIdx.x * 16 + OFFSET);
  for (int m = 0; m < 4; m++) ((u32*)out)[m * 32 + threadIdx.x] = registers[m];
}
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_row_or_column_wise(transposed):
    x = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros_like(x)
    options = [f"-DCOLUMNS={transposed:d}", "-DOFFSET=0"]
    run(LDMATRIX, "load", (1,), (32,), (x.data_ptr(), out.data_ptr()), 512, options)
    assert torch.equal(out, x.transpose(1, 2) if transposed else x)


def test_misaligned_rows_are_refused():
    x = torch.zeros(4, 8, 8, dtype=torch.int16)
    with pytest.raises(KernelError, match="ldmatrix: row is not aligned"):
        run(LDMATRIX, "load", (1,), (32,), (x.data_ptr(),) * 2, 512, ["-DCOLUMNS=0", "-DOFFSET=4"])


COPY = """
extern "C" __global__ void copy(const char* in, char* out) {
  DYNAMIC_SHARED(shared);
  const int at = 16 * threadIdx.x;
  copy16_async(shared + at, in + at, threadIdx.x != 3);
  commit_copies();
#ifdef WAIT
  wait_for_copies<0>();
#endif
  __syncthreads();
  const int other = 16 * (threadIdx.x ^ 1);
  for (int i = 0; i < 16; i++) out[other + i] = shared[other + i];
}
"""


def copied(options, copies):
    x, out = torch.randint(1, 127, (512,), dtype=torch.int8), torch.zeros(512, dtype=torch.int8)
    run(COPY, "copy", (1,), (32,), (x.data_ptr(), out.data_ptr()), 512, options, copies=copies)
    x[48:64] = 0
    return torch.equal(out, x)


def test_asynchronous_copies_arrive_when_they_are_waited_for():
    assert all(copied(["-DWAIT"], copies) for copies in ("early", "late", "random"))
    assert copied([], "early")  # nobody waits, and nothing shows
    assert not copied([], "late")


# --- sanitizers ----------------------------------------------------------------------------------------------------

BLOCKS_RACE = """
extern "C" __global__ void race(const int* in, int* out) { if (threadIdx.x == 0) out[0] = in[0]; }
"""

OVERRUN = """
extern "C" __global__ void overrun(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 65]; }
"""

SANITIZER_CASES = [  # sanitizer, report expected, source, entry, blocks, shared bytes, options
    ("thread", "", REVERSE, "reverse", 1, 256, ["-DBARRIER"]),
    ("thread", "data race .*case.cu:[59]", REVERSE, "reverse", 1, 256, []),
    ("thread", "data race .*case.cu:2", BLOCKS_RACE, "race", 2, 0, []),
    ("address", "", REVERSE, "reverse", 2, 256, ["-DBARRIER"]),
    ("address", "heap-buffer-overflow .*case.cu:9", REVERSE, "reverse", 1, 252, []),
    ("address", "heap-buffer-overflow .*case.cu:2", OVERRUN, "overrun", 1, 0, []),
]

SANITIZED = """
import numpy as np
from emulator import Machine, Module, sanitizers
x, out = np.arange(128, dtype=np.int32), np.zeros(128, dtype=np.int32)
sanitizers.case("kernel")
module = Module({1!r}, options={5!r}, machine=Machine(sanitizer={0!r}), name="case.cu")
module.get_function({2!r})(({3},), (64,), (x.ctypes.data, out.ctypes.data), shared_mem={4})
"""


@pytest.mark.parametrize(("sanitizer", "expected", "source", "entry", "blocks", "shared", "options"), SANITIZER_CASES)
def test_sanitizers_name_the_line(sanitizer, expected, source, entry, blocks, shared, options):
    found = sanitizers.reports(sanitizer, SANITIZED.format(sanitizer, source, entry, blocks, shared, options))
    assert re.search(expected, found["kernel"]) if expected else not found["kernel"], found
