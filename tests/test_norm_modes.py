"""Around the batch statistics both batch norms are torch's: modes, running statistics, errors, keys; and over ranks."""

import copy
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_int8.norm import FIXED_POINT_SWAPS, RANGE_SWAPS

ALL = [
    pytest.param(kind, swapped, id=swapped.__name__)
    for swaps in (RANGE_SWAPS, FIXED_POINT_SWAPS)
    for kind, swapped in swaps.items()
]
SHAPES = {
    nn.BatchNorm1d: (20, 3, 4),
    nn.BatchNorm2d: (8, 3, 4, 4),
    nn.BatchNorm3d: (4, 3, 2, 3, 2),
    nn.SyncBatchNorm: (8, 3, 4, 4),
}


def swapped_pair(kind, swapped, **arguments):
    """A module and its float twin."""
    module = kind(3, **arguments)
    twin = copy.deepcopy(module)
    module.__class__ = swapped
    return module, twin


def statistics(module):
    return [module.running_mean, module.running_var, module.num_batches_tracked]


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_swapping_the_class_leaves_the_module_as_it_was(kind, swapped):
    module, twin = swapped_pair(kind, swapped)
    assert type(module) is swapped
    assert isinstance(module, kind)
    assert module.__dict__.keys() == twin.__dict__.keys()
    assert list(module.state_dict()) == list(twin.state_dict())
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(duplicate) is swapped
    module(torch.randn(SHAPES[kind]))
    assert module.__dict__.keys() == twin.__dict__.keys()
    module.__class__ = kind
    assert module(torch.randn(SHAPES[kind])).shape == SHAPES[kind]


@pytest.mark.parametrize(("kind", "swapped"), ALL)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": 0.3}, {"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}],
    ids=str,
)
def test_running_statistics_are_kept_as_torch_keeps_them(kind, swapped, arguments):
    if "bias" in arguments and "bias" not in kind.__init__.__code__.co_varnames:
        pytest.skip("this torch has no such argument")
    module, twin = swapped_pair(kind, swapped, **arguments)
    squares = []
    for step in range(4):
        x = torch.randn(SHAPES[kind]) * (step + 1) + step
        module(x)
        twin(x)
        if module.running_var is not None and module.momentum is None:
            single = kind(3, momentum=1.0)
            single.__class__ = swapped
            single(x)
            squares.append(single.running_var)
    if not module.track_running_stats:
        assert statistics(module) == statistics(twin) == [None] * 3
    else:
        torch.testing.assert_close(module.running_mean, twin.running_mean)
        assert module.num_batches_tracked == twin.num_batches_tracked == 4
        if kind in FIXED_POINT_SWAPS and swapped is FIXED_POINT_SWAPS[kind]:
            torch.testing.assert_close(module.running_var, twin.running_var)
        elif squares:
            torch.testing.assert_close(module.running_var, torch.stack(squares).mean(0))
        else:
            assert (module.running_var / twin.running_var).sub(1).abs().max() < 0.5  # range and deviation


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_evaluation_changes_nothing_and_uses_running_statistics(kind, swapped):
    module, _ = swapped_pair(kind, swapped)
    module(torch.randn(SHAPES[kind]))
    module.eval()
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(SHAPES[kind])
    assert torch.equal(module(x)[:1], module(x[:1]))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    x.requires_grad_()
    module(x).sum().backward()
    # A frozen norm is affine: each element has its own gradient, the same within a channel.
    slope = x.grad.transpose(0, 1).flatten(1)
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope))
    assert (slope > 0.5).all()


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_without_running_statistics_evaluation_is_by_the_batch(kind, swapped):
    module, _ = swapped_pair(kind, swapped, track_running_stats=False)
    x = torch.randn(SHAPES[kind])
    assert torch.equal(module(x), module.eval()(x))
    # The same for statistics taken away later, while a counter of batches is still there.
    module, _ = swapped_pair(kind, swapped)
    module.running_mean = module.running_var = None
    assert torch.equal(module(x), module.eval()(x))
    assert module.num_batches_tracked == 1


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_tracking_switched_off_later_is_as_in_torch(kind, swapped):
    module, _ = swapped_pair(kind, swapped)
    module.track_running_stats = False
    module(torch.randn(SHAPES[kind]))
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_var, torch.ones(3))
    module.eval()
    torch.testing.assert_close(module(torch.ones(SHAPES[kind])), torch.ones(SHAPES[kind]))  # by the buffers


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_an_empty_batch_and_a_single_value_are_as_in_torch(kind, swapped):
    module, twin = swapped_pair(kind, swapped)
    for m in (module, twin):
        x = torch.empty(0, *SHAPES[kind][1:], requires_grad=True)
        y = m(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
    for a, b in zip(statistics(module), statistics(twin), strict=True):
        assert torch.equal(a, b)
    single = torch.randn(1, 3, *[1] * (len(SHAPES[kind]) - 2))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(single)
    assert module.eval()(single).shape == single.shape


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_wrong_shapes_are_refused(kind, swapped):
    module, _ = swapped_pair(kind, swapped)
    with pytest.raises(ValueError, match=r"expected (at least )?[2345].*D input"):
        module(torch.randn(3))
    for affine in (True, False):
        module, _ = swapped_pair(kind, swapped, affine=affine)
        for channels in (1, 4):
            wrong = torch.randn(SHAPES[kind][0], channels, *SHAPES[kind][2:])
            with pytest.raises(ValueError, match=f"has {channels} channels, not 3"):
                module(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_narrow_modules_and_autocast(kind, swapped, dtype):
    module, twin = swapped_pair(kind, swapped)
    x = torch.randn(SHAPES[kind])
    with torch.autocast("cpu", dtype=dtype):
        for value in (x, x.to(dtype)):
            assert module(value).dtype == twin(value).dtype
    module, twin = module.to(dtype), twin.to(dtype)
    value = x.to(dtype).requires_grad_()
    y = module(value)
    y.sum().backward()
    assert (y.dtype, value.grad.dtype, module.weight.grad.dtype) == (dtype,) * 3
    assert module.running_var.dtype == dtype


@pytest.mark.parametrize(("kind", "swapped"), ALL)
def test_frozen_parameters_and_inputs_without_gradient(kind, swapped):
    module, _ = swapped_pair(kind, swapped)
    module(torch.randn(SHAPES[kind])).sum().backward()
    assert module.weight.grad is not None
    module.requires_grad_(False)
    x = torch.randn(SHAPES[kind], requires_grad=True)
    module.weight.grad = None
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None


# --- Two processes: the program below is this file, run as a script --------------------------------------------------


def sync_module(swaps, **arguments):
    module = nn.SyncBatchNorm(3, momentum=1.0, **arguments).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        module.bias.copy_(torch.tensor([0.0, 1.0, 0.25]))
    module.__class__ = swaps[nn.SyncBatchNorm]
    module.error_bits = None  # R(x) of a part is not R(x) of the whole
    return module


def run(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad, module.weight.grad, module.bias.grad, module.running_mean, module.running_var


def compare(swaps, sizes, rank):
    """Each rank's part of a batch gives what one process makes of the whole; chunks are 17 values everywhere."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(sum(sizes), 3, 17, generator=generator, dtype=torch.float64) for _ in range(2))
    # Alone: outside of a group of several ranks, a module shares nothing.
    alone = sync_module(swaps)
    alone.process_group = SELF
    y, grad_x, *grads, mean, variance = run(alone, x, grad)
    first = sum(sizes[:rank])
    part = slice(first, first + sizes[rank])
    ours = run(sync_module(swaps), x[part], grad[part])
    for a, b in zip(ours[2:4], grads, strict=True):
        dist.all_reduce(a)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours[0], y[part])
    torch.testing.assert_close(ours[1], grad_x[part])
    torch.testing.assert_close(ours[4], mean)
    torch.testing.assert_close(ours[5], variance)
    # And it is not what this rank would compute by itself.
    if sizes[rank] not in (0, sum(sizes)):
        single = sync_module(swaps)
        single.process_group = SELF
        assert not torch.allclose(run(single, x[part], grad[part])[0], y[part], rtol=1e-3)


def single_value(rank):
    """A rank with one value per channel adds to the mean; the range is the other's."""
    x = torch.arange(33.0, dtype=torch.float64).repeat_interleave(3).reshape(33, 3)
    own = x[:32] if rank == 0 else x[32:]
    y, grad_x, *_, mean, variance = run(sync_module(RANGE_SWAPS), own, torch.ones_like(own))
    reference = sync_module(RANGE_SWAPS)
    reference.process_group = SELF
    run(reference, x[:32], torch.ones(32, 3, dtype=torch.float64))
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, reference.running_var)
    assert y.isfinite().all()
    assert grad_x.isfinite().all()


def evaluation(swaps, rank):
    """No communication in evaluation, be it by the statistics of the batch: one rank alone may evaluate."""
    for tracks in (True, False):
        module = sync_module(swaps, track_running_stats=tracks).eval()
        if rank == 0:
            module(torch.randn(4, 3, dtype=torch.float64))


def main(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    global SELF
    SELF = [dist.new_group([r]) for r in range(2)][rank]
    for swaps in (RANGE_SWAPS, FIXED_POINT_SWAPS):
        for sizes in ((8, 8), (8, 4), (8, 0)):
            compare(swaps, sizes, rank)
        evaluation(swaps, rank)
    single_value(rank)
    dist.destroy_process_group()
    print("ranks agree")


@pytest.mark.slow
def test_ranks_share_statistics_and_gradients(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output
        assert "ranks agree" in output


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
