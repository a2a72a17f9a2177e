"""Memory that is kept: it is handed out again when nobody uses it, and never before."""

import gc
import threading

import pytest
import torch
from torch import nn

from lightning_int8 import convert
from lightning_int8.backends.cpu import buffers

LARGE = buffers.SMALLEST


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    buffers.clear()


def test_it_is_a_tensor_like_any_other():
    x = buffers.empty(LARGE // 8, 2)
    assert (x.shape, x.dtype, x.is_contiguous(), x._is_view()) == ((LARGE // 8, 2), torch.float32, True, False)
    assert x.data_ptr() % 64 == 0
    assert buffers.empty(3, 0, dtype=torch.int8).shape == (3, 0)


def test_memory_is_used_again_when_the_tensor_is_gone():
    x = buffers.empty(LARGE, dtype=torch.int8)
    address = x.data_ptr()
    del x
    assert buffers.empty(LARGE // 4).data_ptr() == address


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[10:20],
        lambda x: x.data,
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: memoryview(x.numpy()),
        lambda x: x.view(torch.int8),
        lambda x: x.untyped_storage(),
    ],
    ids=["slice", "data", "detach", "numpy", "memoryview", "other dtype", "storage"],
)
def test_memory_is_not_used_again_while_anything_refers_to_it(other):
    x = buffers.empty(LARGE // 4)
    address, holder = x.data_ptr(), other(x)
    del x
    assert buffers.empty(LARGE // 4).data_ptr() != address
    del holder
    gc.collect()
    assert address in {t.data_ptr() for t in [buffers.empty(LARGE // 4) for _ in range(2)]}


def test_autograd_keeps_what_it_saves():
    x = buffers.empty(LARGE // 4).fill_(3.0).requires_grad_()
    y = (x * x).sum()
    for _ in range(3):
        buffers.empty(LARGE // 4).fill_(7.0)
    y.backward()
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


def test_a_block_is_not_much_larger_than_what_is_asked_for():
    x = buffers.empty(8 * LARGE, dtype=torch.int8)
    address = x.data_ptr()
    del x
    assert buffers.empty(LARGE, dtype=torch.int8).data_ptr() != address
    assert buffers.empty(7 * LARGE, dtype=torch.int8).data_ptr() == address


def test_memory_that_is_not_wanted_is_given_back():
    pool = buffers._Pool()
    pool.give(pool.take(100))
    for size in (1000, 2000, 4000, 8000):
        pool.give(pool.take(size))
    assert pool.held == 1000 + 2000 + 4000 + 8000  # but not 100
    pool.clear()
    assert pool.held == 0


def test_sizes_that_come_again_and_again_stay():
    pool, sizes = buffers._Pool(), (1000, 3000, 9000, 27000)
    first = [pool.take(size) for size in sizes]
    for _ in range(10):
        for block in first:
            pool.give(block)
        again = [pool.take(size) for size in sizes]
        assert {b.ctypes.data for b in again} == {b.ctypes.data for b in first}
        first = again


def test_threads_never_share_a_block():
    failures = []

    def work(value):
        for _ in range(200):
            x = buffers.empty(LARGE, dtype=torch.int8).fill_(value)
            if not torch.equal(x[::4096], torch.full((LARGE // 4096,), value, dtype=torch.int8)):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_steps_take_no_fresh_memory():
    layers = nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    convert(model, refresh=2)
    x = torch.randn(4, 16, 64, 64).to(memory_format=torch.channels_last)

    def kept():
        model.zero_grad()
        model(x).square().mean().backward()
        return buffers._pool.held

    sizes = [kept() for _ in range(20)]
    assert len(set(sizes[5:])) == 1
    assert sizes[-1] > 4 * x.numel() * x.itemsize  # as large as an output, at least
