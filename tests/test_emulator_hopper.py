"""Barriers in memory and warpgroup products of the emulated machine, and the tile in memory that they take."""

import numpy as np
import pytest
import torch
from emulator import KernelError, Machine, Module
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEDULES, needs_compiler

from lightning_int8.kernels.build import headers

pytestmark = needs_compiler


def run(source, entry, threads, args, shared=0, options=(), **machine):
    kernel = Module(source, headers(), options, Machine(**machine)).get_function(entry)
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    kernel((1,), (threads,), args, shared_mem=shared)


# --- barriers --------------------------------------------------------------------------------------------------------

PING_PONG = """
#include "hopper_primitives.cuh"
extern "C" __global__ void ping_pong(int* out, int rounds) {
  DYNAMIC_SHARED(shared);
  u64 *full = reinterpret_cast<u64*>(shared), *empty = full + 1;
  volatile int* value = reinterpret_cast<int*>(full + 2);
#ifndef NOT_SET_UP
  if (threadIdx.x == 0) barrier_init(full, 1), barrier_init(empty, 32);
#endif
  __syncthreads();
  if (threadIdx.x == 32)
    for (int i = 0; i < rounds; i++) {
      barrier_wait(empty, i + FIRST_EMPTY & 1);
      *value = i;
      barrier_arrive(full);
    }
  if (threadIdx.x < 32)
    for (int i = 0; i < rounds; i++) {
      barrier_wait(full, i & 1);
      out[32 * i + threadIdx.x] = *value;
      barrier_arrive(empty);
    }
}
"""


def ping_pong(*options, first_empty=1, **machine):
    out = torch.full((7, 32), -1, dtype=torch.int32)
    options = (f"-DFIRST_EMPTY={first_empty}", *options)
    run(PING_PONG, "ping_pong", 64, (out.data_ptr(), np.int32(7)), 24, options, **machine)
    return out


@pytest.mark.parametrize("schedule", range(5))
def test_a_barrier_hands_a_value_over_in_every_phase(schedule):
    assert torch.equal(ping_pong(schedule=schedule), torch.arange(7, dtype=torch.int32)[:, None].expand(7, 32))


def test_a_wait_for_the_wrong_phase_is_a_deadlock():
    with pytest.raises(KernelError, match="deadlock: 33 threads wait"):
        ping_pong(first_empty=0)


def test_a_barrier_that_was_not_set_up_is_refused():
    with pytest.raises(KernelError, match="mbarrier: it was not set up"):
        ping_pong("-DNOT_SET_UP")


# --- warpgroup products ----------------------------------------------------------------------------------------------

# Operands come swizzled from the test, and descriptors too: nothing here is code of the kernels.
WGMMA = """
#include "hopper_primitives.cuh"
extern "C" __global__ void multiply(const u32* operands, int words, u64 left, u64 right, int* c) {
  DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) barrier_init(reinterpret_cast<u64*>(shared + 4 * words), 1);
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += 128) store_operand(shared + 4 * i, operands[i]);
#ifndef NO_OPERAND_FENCE
  fence_operands();
#endif
  __syncthreads();
  int sums[COLUMNS / 2];
  for (int& sum : sums) sum = 1;
#ifndef NO_SUM_FENCE
  fence_sums();
#endif
  wgmma_s8(sums, left, right);
  commit_products();
#ifndef NO_WAIT
  wait_for_products<0>();
#endif
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < COLUMNS / 2; i++)
    c[(16 * warp + g + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + 2 * t + i % 2] = sums[i];
}
"""


def swizzled(x):
    """(rows, 128) as the PTX ISA draws it: 16-byte piece c of row r in place c ^ (r % 8) of the row."""
    rows, pieces = np.indices((x.shape[0], 8))
    out = np.empty((x.shape[0], 8, 16), np.int8)
    out[rows, pieces ^ rows % 8] = x.reshape(-1, 8, 16)
    return out


def descriptor(address, swizzle=1, base_offset=0):
    """The matrix descriptor of the PTX ISA: K-major, groups of eight rows 1024 bytes apart."""
    return address >> 4 | 1 << 16 | 1024 >> 4 << 32 | base_offset << 49 | swizzle << 62


def product(columns, step, options=(), copies="late", schedule=0, **fields):
    rng = np.random.default_rng(step)
    a, b = (rng.integers(-128, 128, (rows, 128), dtype=np.int8) for rows in (64, columns))
    operands = np.concatenate([swizzled(a), swizzled(b)])
    c = np.zeros((64, columns), np.int32)
    left, right = (descriptor(start + 32 * step, **fields) for start in (0, 64 * 128))
    words = np.int32(operands.nbytes // 4)
    args = (operands.ctypes.data, words, np.uint64(left), np.uint64(right), c.ctypes.data)
    options = (f"-DCOLUMNS={columns}", *options)
    run(WGMMA, "multiply", 128, args, operands.nbytes + 8, options, copies=copies, schedule=schedule)
    k = slice(32 * step, 32 * step + 32)
    return np.array_equal(c, 1 + a[:, k].astype(np.int32) @ b[:, k].astype(np.int32).T)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("step", range(4))
def test_a_product_has_the_layout_of_the_ptx_isa(columns, step):
    assert all(product(columns, step, copies=copies, schedule=schedule) for schedule, copies in SCHEDULES)


def test_operands_that_nobody_fenced_are_not_seen():
    assert not product(64, 0, ["-DNO_OPERAND_FENCE"])


def test_sums_are_there_once_they_are_waited_for():
    assert product(64, 0, ["-DNO_WAIT"], copies="early")  # nobody waits, and nothing shows
    assert not product(64, 0, ["-DNO_WAIT"], copies="late")


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (["-DNO_SUM_FENCE"], {}, "no wgmma.fence"),
        ([], {"swizzle": 2}, "the 128-byte swizzle alone"),
        ([], {"base_offset": 1}, "start at 1024 bytes alone"),
    ],
)
def test_what_the_machine_does_not_know_is_refused(options, fields, message):
    with pytest.raises(KernelError, match=message):
        product(64, 0, options, **fields)


# --- the tile of the kernels -----------------------------------------------------------------------------------------

TILE = """
#include "wgmma_tile.cuh"
extern "C" __global__ void describe(int tile, int row, int k, int* offset, u64* descriptor) {
  DYNAMIC_SHARED(shared);
  *offset = WgmmaTile::offset(row, k);
  *descriptor = WgmmaTile::descriptor(shared + tile, row, k);
}
"""


def describe(tile, row, k):
    offset, bits = np.zeros(1, np.int32), np.zeros(1, np.uint64)
    args = (*(np.int32(v) for v in (tile, row, k)), offset.ctypes.data, bits.ctypes.data)
    run(TILE, "describe", 1, args)
    return int(offset[0]), int(bits[0])


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 255), st.integers(0, 127))
def test_the_place_of_an_element_is_that_of_the_swizzle(row, k):
    places = swizzled_places(16)
    assert describe(0, row, k)[0] == row // 16 * 16 * 128 + places[row % 16, k]


def swizzled_places(rows):
    """Where each byte of (rows, 128) lies: the inverse of ``swizzled``, read off a tile of row and byte numbers."""
    row_numbers = swizzled(np.repeat(np.arange(rows, dtype=np.int8)[:, None], 128, 1)).ravel()
    byte_numbers = swizzled(np.tile(np.arange(128, dtype=np.uint8).view(np.int8), (rows, 1))).ravel()
    places = np.empty((rows, 128), int)
    places[row_numbers, byte_numbers.view(np.uint8)] = np.arange(rows * 128)
    return places


@given(st.integers(0, 200), st.integers(0, 31), st.integers(0, 3))
def test_the_descriptor_has_the_fields_of_the_ptx_isa(tile, group, step):
    address = 1024 * tile + 1024 * group + 32 * step
    assert describe(1024 * tile, 8 * group, 32 * step)[1] == descriptor(address)
