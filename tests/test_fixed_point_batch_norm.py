"""Fixed-point batch norm against a twin of the paper's formulas with straight-through roundings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grids import numpy_q, numpy_sq
from test_range_batch_norm import FLOAT_CLASS, draw, shapes
from torch import nn

from lightning_int8.norm import FIXED_POINT_SWAPS


def fixed_point_norm(dim, channels, **arguments):
    module = FLOAT_CLASS[dim](channels, **arguments)
    module.__class__ = FIXED_POINT_SWAPS[type(module)]
    return module


def through(x, rounded):
    """The value of ``rounded`` with the derivative of ``x``."""
    return x + (torch.from_numpy(rounded) - x).detach()


def twin(x, gamma, beta, mean, variance, k):
    """Section 4b, forward: every Q is straight-through."""
    shape = (-1,) + (1,) * (x.dim() - 2)

    def q(t, bits):
        return through(t, numpy_q(t.detach().numpy(), bits))

    normalized = q((x - q(mean, 16).reshape(shape)) / (q(variance.sqrt(), 16).reshape(shape) + 2**-15), k)
    return q(gamma, 8).reshape(shape) * normalized + q(beta, 8).reshape(shape)


def assert_equal_but_for_ties(ours, theirs, step):
    """Equal, save few values that lie so near a tie that the order of operations decides: those are one step off."""
    off = (ours - theirs).abs() > 1e-9
    assert off.double().mean() < 1e-3
    assert ((ours - theirs).abs() <= 1.001 * step).all()


@given(shapes, st.integers(0, 99), st.sampled_from((8, 16)), st.sampled_from((8, None)), st.booleans())
@settings(deadline=None, max_examples=100)
def test_output_and_gradients(shape, seed, bits, error_bits, training):
    x = draw(shape, seed, False) * 2 + 0.3
    x = torch.cat((x, x * 0.7 + 1))
    module = fixed_point_norm(x.dim(), x.shape[1], dtype=torch.float64)
    gamma, beta, grad = (draw(s, seed + i, False) for i, s in enumerate((x.shape[1:2], x.shape[1:2], x.shape)))
    state = {"weight": gamma, "bias": beta, "running_mean": beta / 3, "running_var": gamma.square() + 0.1}
    module.load_state_dict(state, strict=False)
    module.normalized_bits, module.error_bits = bits, error_bits
    module.train(training)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gamma_, beta_ = gamma.clone().requires_grad_(), beta.clone().requires_grad_()
    dims = [d for d in range(x.dim()) if d != 1]
    if training:
        mean, variance = theirs.mean(dims), theirs.var(dims, correction=0)
    else:
        mean, variance = state["running_mean"], state["running_var"]
    reference = twin(theirs, gamma_, beta_, mean, variance, bits)
    y = module(ours)
    assert_equal_but_for_ties(y, reference, gamma.abs().max().item() * 2 ** (1 - bits))

    y.backward(grad)
    reference.backward(grad if error_bits is None else torch.from_numpy(numpy_sq(grad.numpy(), error_bits)))
    for mine, other in ((ours, theirs), (module.bias, beta_)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(module.weight.grad, gamma_.grad, rtol=0, atol=2 ** (2 - bits))


def test_values_lie_on_their_grids():
    x = torch.randn(64, 5, 6, 6) * 3
    module = fixed_point_norm(4, 5, affine=False)
    y = module(x) * 2**7
    assert torch.equal(y, y.round())
    assert y.abs().max() > 2 * 128  # no clip: integer bits beyond the "8 bits"
    module.normalized_bits = 6
    assert torch.equal(module(x) * 2**5, (module(x) * 2**5).round())


def test_the_gradient_is_quantized_to_8_bits_before_anything_else():
    x = torch.randn(64, 5, 6, 6)
    grad = torch.randn_like(x)
    module = fixed_point_norm(4, 5)
    module(x).backward(grad)
    quantized = torch.from_numpy(numpy_sq(grad.double().numpy(), 8)).float()
    torch.testing.assert_close(module.bias.grad, quantized.sum((0, 2, 3)))
    assert not torch.allclose(module.bias.grad, grad.sum((0, 2, 3)), rtol=1e-3)


def test_a_constant_channel_has_finite_gradients():
    x = torch.randn(16, 3)
    x[:, 1] = 0.5
    x.requires_grad_()
    y = fixed_point_norm(2, 3)(x)
    y.backward(torch.randn(16, 3))
    assert (y[:, 1] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_normalised_in_float32(dtype):
    x = torch.randn(32, 3, 4, 4).to(dtype)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    y, reference = fixed_point_norm(4, 3)(a), fixed_point_norm(4, 3)(b)
    assert y.dtype == dtype
    assert torch.equal(y, reference.to(dtype))
    grad = torch.randn_like(x)
    y.backward(grad)
    reference.backward(grad.float())
    assert torch.equal(a.grad, b.grad.to(dtype))


def test_divergence_shows():
    x = torch.randn(8, 3, requires_grad=True)
    grad = torch.ones(8, 3)
    grad[0, 0] = torch.inf
    fixed_point_norm(2, 3)(x).backward(grad)
    assert x.grad.isnan().all()
    with torch.no_grad():
        x[2, 1] = torch.nan
    assert fixed_point_norm(2, 3)(x)[:, 1].isnan().all()


def test_evaluation_rounds_by_the_running_statistics():
    module, floating = fixed_point_norm(2, 3), nn.BatchNorm1d(3)
    x = torch.randn(50, 3) * 2
    for _ in range(20):
        module(x)
    floating.load_state_dict(module.state_dict())
    y, reference = module.eval()(x), floating.eval()(x)
    assert torch.equal(y * 2**7, (y * 2**7).round())
    torch.testing.assert_close(y, reference, rtol=0, atol=0.6 * 2**-7)


def test_widths_are_checked():
    module = fixed_point_norm(2, 3)
    module.normalized_bits = 40
    with pytest.raises(ValueError, match="bits: 40 is not an integer"):
        module(torch.randn(4, 3))
