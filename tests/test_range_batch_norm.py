"""Range BN against a NumPy twin and torch's own autograd; near the standard deviation; checkpoints of float BN."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from lightning_int8.norm import RANGE_SWAPS
from lightning_int8.norm.range_batch_norm import chunk_count, piece_length, range_to_std

FLOAT_CLASS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

RATIO_TO_STD = {256: 0.92, 4096: 0.96, 50176: 0.98}
"""Scale over standard deviation of Gaussian values, by chunk size (methods, 3a)."""


def range_norm(dim, channels, **arguments):
    module = FLOAT_CLASS[dim](channels, **arguments)
    module.__class__ = RANGE_SWAPS[type(module)]
    return module


def numpy_chunks(n):
    return max([d for d in range(1, 17) if n % d == 0 and n // d >= 16], default=1)


def numpy_range_norm(x, gamma, beta, eps):
    """Section 3a with the authors' constant: output, mean, scale."""
    channels = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    chunks = numpy_chunks(channels.shape[1])
    view = channels.reshape(len(channels), chunks, -1)
    c = 0.5 * 0.35 * (1 + (math.pi * math.log(4)) ** 0.5) / (2 * math.log(view.shape[2])) ** 0.5
    scale = c * (view.max(2) - view.min(2)).mean(1)
    mean = channels.mean(1)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean_, scale_, gamma, beta = (v.reshape(shape) for v in (mean, scale, gamma, beta))
    return (x - mean_) / np.sqrt(scale_**2 + eps) * gamma + beta, mean, scale


def autograd_twin(x, gamma, beta, eps):
    """The same in torch operations whose derivative is torch's: max and min pass it to the first of equals."""
    channels = x.transpose(0, 1).reshape(x.shape[1], -1)
    chunks = numpy_chunks(channels.shape[1])
    view = channels.reshape(len(channels), chunks, -1)
    c = 0.5 * 0.35 * (1 + (math.pi * math.log(4)) ** 0.5) / (2 * math.log(view.shape[2])) ** 0.5
    scale = c * (view.max(2).values - view.min(2).values).mean(1)
    shape = (-1,) + (1,) * (x.dim() - 2)
    normalized = (x - channels.mean(1).reshape(shape)) / (scale.square() + eps).sqrt().reshape(shape)
    return normalized * gamma.reshape(shape) + beta.reshape(shape)


def draw(shape, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 1.5).round() if ties else x


shapes = st.tuples(st.integers(1, 40), st.integers(1, 3), st.lists(st.integers(1, 8), min_size=0, max_size=3)).map(
    lambda s: (s[0], s[1], *s[2])
)


@given(shapes, st.integers(0, 99), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_output_and_gradients(shape, seed, ties, channels_last):
    x = draw(shape, seed, ties)
    if x.numel() == x.shape[1]:
        x = torch.cat((x, x + 1))
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    elif channels_last and x.dim() == 5:
        x = x.to(memory_format=torch.channels_last_3d)
    elif channels_last and x.dim() == 3:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    module = range_norm(x.dim(), x.shape[1], dtype=torch.float64)
    gamma, beta, grad = (draw(s, seed + i, False) for i, s in enumerate((x.shape[1:2], x.shape[1:2], x.shape)))
    module.load_state_dict({"weight": gamma, "bias": beta}, strict=False)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = module(ours)
    expected, mean, scale = numpy_range_norm(x.numpy(), gamma.numpy(), beta.numpy(), module.eps)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(module.running_mean.numpy(), 0.1 * mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(module.running_var.numpy(), 0.9 + 0.1 * scale**2, rtol=1e-9)

    gamma_, beta_ = gamma.clone().requires_grad_(), beta.clone().requires_grad_()
    autograd_twin(theirs, gamma_, beta_, module.eps).backward(grad)
    y.backward(grad)
    # A constant channel is divided by sqrt(eps) alone: gradients there are some 300 times as large.
    for mine, reference in ((ours, theirs), (module.weight, gamma_), (module.bias, beta_)):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 7), (8, 2, 2, 3), (17, 1, 1, 2, 1)])
def test_gradcheck(shape):
    module = range_norm(len(shape), shape[1], track_running_stats=False, dtype=torch.float64)

    def f(x, weight, bias):
        return functional_call(module, {"weight": weight, "bias": bias}, x)

    inputs = [draw(s, i, False).requires_grad_() for i, s in enumerate((shape, shape[1:2], shape[1:2]))]
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize(("chunk_size", "ratio"), RATIO_TO_STD.items())
def test_the_scale_is_near_the_standard_deviation_of_gaussian_values(chunk_size, ratio):
    channels = 8 if chunk_size > 10_000 else 64
    x = torch.randn(16, channels, chunk_size, generator=torch.Generator().manual_seed(0)) * 3 + 1
    module = range_norm(3, channels, momentum=1.0)
    module(x)
    assert module.running_var.sqrt().mean() / 3 == pytest.approx(ratio, abs=0.01)
    assert pytest.approx(range_to_std(chunk_size) * math.sqrt(2 * math.log(chunk_size)), abs=5e-4) == 0.540


@given(st.integers(2, 20_000))
def test_chunks(values):
    count = chunk_count(values)
    assert values % count == 0
    assert count == numpy_chunks(values)


def test_chunks_of_common_sizes():
    assert [chunk_count(n) for n in (2, 16, 31, 32, 47, 49, 128, 240, 256, 3136)] == [1, 1, 1, 2, 1, 1, 8, 15, 16, 16]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_pieces_divide_chunks_and_samples(chunk_size, positions):
    length = piece_length(chunk_size, positions)
    assert chunk_size % length == 0
    assert positions % length == 0


def test_pieces_of_common_sizes():
    assert [piece_length(196 * k, 28 * 28) for k in (1, 4, 2)] == [196, 196, 196]
    assert [piece_length(4096, 1024), piece_length(98, 49), piece_length(961, 961)] == [128, 49, 961]


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_float_batch_norm_evaluates_the_checkpoint(dim):
    shape = (40, 3, 4, 2, 3)[:dim]
    trained = range_norm(dim, 3, momentum=1.0)
    x = torch.randn(shape) * 2 + 1
    in_training = trained(x)
    evaluated = FLOAT_CLASS[dim](3)
    evaluated.load_state_dict(trained.state_dict())
    assert torch.equal(trained.eval()(x), evaluated.eval()(x))
    # The same scale in training: with momentum 1 the running statistics are the batch's.
    torch.testing.assert_close(in_training, evaluated(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_stays(channels_last):
    x = torch.randn(4, 3, 8, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = range_norm(4, 3)(x)
    y.backward(torch.ones_like(y))
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_gradients_that_are_views_are_not_written_to():
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    y = range_norm(4, 3)(x)
    y.sum().backward(retain_graph=True)  # an expanded scalar
    first = x.grad.clone()
    x.grad = None
    y.sum().backward()
    assert torch.equal(x.grad, first)
    torch.testing.assert_close(first, torch.zeros_like(first), atol=1e-5, rtol=0)  # a norm takes constants away


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_have_statistics_in_float32(dtype):
    x = (torch.randn(64, 3, 8, 8) * 2 + 3).to(dtype)
    narrow, wide = range_norm(4, 3, momentum=1.0), range_norm(4, 3, momentum=1.0)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    y, reference = narrow(a), wide(b)
    assert y.dtype == dtype
    assert torch.equal(y, reference.to(dtype))
    torch.testing.assert_close(narrow.running_mean, wide.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(narrow.running_var, wide.running_var, rtol=1e-6, atol=0)
    grad = torch.randn_like(x)
    y.backward(grad)
    reference.backward(grad.float())
    assert a.grad.dtype == dtype
    torch.testing.assert_close(a.grad.float(), b.grad, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(narrow.weight.grad, wide.weight.grad, rtol=1e-4, atol=1e-3)


def test_the_range_of_large_float16_values_does_not_overflow():
    x = torch.tensor([[-6e4], [6e4]], dtype=torch.float16)
    assert range_norm(2, 1)(x).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_channel(bad):
    x = torch.randn(32, 3, 2, 2)
    x[3, 1, 0, 1] = bad
    module = range_norm(4, 3)
    y = module(x)
    assert y[:, 1].isnan().all()
    assert y[:, (0, 2)].isfinite().all()
    y.sum().backward()
    assert module.weight.grad.isnan().tolist() == [False, True, False]


def test_there_is_no_second_derivative():
    x = torch.randn(8, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(range_norm(2, 3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
