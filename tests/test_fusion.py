"""Fusion: deferred tensors are tensors, and batch norm, ReLU and addition of them are torch's."""

import copy
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_int8 import ContractionSpec, Recipe, convert, gemm_counts
from lightning_int8.backends import load
from lightning_int8.backends.cpu import implicit_route
from lightning_int8.backends.cpu.expression import Expression, Mask, Term, passes
from lightning_int8.fusion import Deferred
from lightning_int8.spec import OperandSpec

if passes() is None:
    pytest.skip("expressions need numba", allow_module_level=True)


class Defer(torch.autograd.Function):
    """The identity; its result is deferred, as that of a convolution."""

    gradients: list[type] = []  # noqa: RUF012 - what backward got, emptied by the test that reads it

    @staticmethod
    def forward(ctx, x, channels_last):
        return Deferred(Expression((Term(x.movedim(1, -1).contiguous().clone()),)), channels_last)

    @staticmethod
    def backward(ctx, grad):
        Defer.gradients.append(type(grad))
        return grad.plain() if isinstance(grad, Deferred) else grad, None


def norms(channels, train):
    out = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
    for norm in out:
        nn.init.uniform_(norm.weight, -1.0, 1.0)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return out.train(train)


def block(defer, a, b, skip, norm, inplace):
    """What lies between convolutions: norms, rectified or not, sums of everything, and readers that know no fusion."""
    first = functional.relu(norm[0](defer(a)), inplace=inplace)
    second = norm[1](defer(b))
    if inplace:
        second += skip
        second = functional.relu(second, inplace=True)
    else:
        second = torch.relu(second + skip)
    third = norm[2](defer(skip)) + second
    fourth = (defer(a) + first) + third
    twice = first + first
    return [first, functional.max_pool2d(second, 2), functional.relu(third) ** 2, fourth.sin(), twice.mean((2, 3))]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (3, 5, 7, 9), (2, 64, 9, 8), (1, 1, 2, 70)])
def test_values_gradients_and_statistics_are_those_of_torch(channels_last, train, inplace, shape):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    inputs = [(2 * torch.randn(shape) + 1).to(memory_format=memory_format).requires_grad_() for _ in range(3)]
    seeds = None
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, channels_last)):
        torch.manual_seed(1)
        norm = norms(shape[1], train)
        results = block(defer, *inputs, norm, inplace)
        seeds = seeds or [torch.randn_like(r) for r in results]
        sum((r * s).sum() for r, s in zip(results, seeds, strict=True)).backward()
        gradients = [x.grad for x in inputs] + [p.grad for p in norm.parameters()]
        found.append(([r.detach() for r in results], gradients, list(norm.buffers())))
        for x in inputs:
            x.grad = None
    (values, gradients, buffers), (own_values, own_gradients, own_buffers) = found
    torch.testing.assert_close(own_values, values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(own_buffers, buffers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (3, 5, 7, 9), (2, 64, 9, 8)])
def test_bfloat16_loses_no_more_digits_than_in_torch(inplace, shape):
    torch.manual_seed(0)
    inputs = [(2 * torch.randn(shape) + 1).bfloat16() for _ in range(3)]
    found, sums, seeds = [], [], None
    for dtype, defer in (
        (torch.float64, lambda x: x + 0),
        (torch.bfloat16, lambda x: x + 0),
        (torch.bfloat16, lambda x: Defer.apply(x, True)),
    ):
        torch.manual_seed(1)
        norm = norms(shape[1], True).to(torch.float64 if dtype == torch.float64 else torch.float32)
        own = [x.to(dtype, memory_format=torch.channels_last).requires_grad_() for x in inputs]
        results = block(defer, *own, norm, inplace)
        assert all(r.dtype == dtype for r in results)
        seeds = seeds or [torch.randn_like(r).bfloat16() for r in results]
        sum((r * s.to(dtype)).sum() for r, s in zip(results, seeds, strict=True)).backward()
        found.append([t.detach().double() for t in (*results, *(x.grad for x in own))])
        sums.append(torch.cat([p.grad.double() for p in norm.parameters()]))
    for exact, of_torch, fused in zip(*found, strict=True):
        # All but a few elements, which may fall on the other side of a kink.
        own, others = ((x - exact).abs().flatten().quantile(0.95) for x in (fused, of_torch))
        assert own <= 1.2 * others + 1e-3 * exact.abs().max()
    torch.testing.assert_close(sums[2], sums[0], rtol=0.03, atol=0.03 * float(sums[0].abs().max()))


def test_gradients_stay_deferred_where_one_operation_follows_another():
    Defer.gradients.clear()
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    functional.relu(nn.BatchNorm2d(8)(Defer.apply(x, True))).sum().backward()
    assert Defer.gradients == [Deferred]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, lambda inplace: nn.Hardtanh(0.0, 0.5, inplace)])
@pytest.mark.parametrize("inplace", [True, False])
def test_bounded_activations_are_those_of_torch(activation, inplace):
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 7, 5, 6)).requires_grad_()
    with torch.no_grad():
        x[0, 0, 0, :5] = torch.tensor([0.0, 6.0, 0.5, torch.inf, -torch.inf])
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, False)):
        y = activation(inplace)(defer(x))
        (grad,) = torch.autograd.grad(y, x, torch.arange(x.numel()).view(x.shape).cos())
        found.append((y.detach(), grad))
    assert isinstance(y, Deferred)
    for own, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (3, 16, 7, 9), (1, 4, 12, 12)])
@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), (3, 2), (2, 1), ((2, 3), (2, 1), (1, 1)), (5, 3, 2)])
@pytest.mark.parametrize("rectified", [True, False])
def test_pooling_is_that_of_torch(shape, arguments, rectified):
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, True)):
        z = nn.BatchNorm2d(shape[1])(defer(x))
        y = functional.max_pool2d(torch.relu(z) if rectified else z, *arguments)
        Defer.gradients.clear()
        (grad,) = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).sin()).sum(), x)
        found.append((y.detach(), grad))
    assert type(y) is Deferred
    assert Defer.gradients == [Deferred]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", [(3, 1, 1), ((3, 5), 1, (1, 2)), (2,), (3, 1, 0), (3, 1, 1, False, False), (3, 2, 1)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_averages_over_windows_are_those_of_torch(arguments, channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 7, 9, requires_grad=True)
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, channels_last)):
        y = functional.avg_pool2d(torch.relu(defer(x)), *arguments)
        (grad,) = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).sin()).sum(), x)
        found.append((y.detach(), grad))
    assert (type(y) is Deferred) == (arguments in ((3, 1, 1), ((3, 5), 1, (1, 2))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_concatenation_is_that_of_torch_and_followed_by_fused_operations(channels_last):
    torch.manual_seed(0)
    inputs = [torch.randn(2, channels, 5, 6, requires_grad=True) for channels in (16, 3, 40)]
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, channels_last)):
        norm = nn.BatchNorm2d(59)
        whole = torch.cat([torch.relu(defer(inputs[0])), inputs[1] * 1, defer(inputs[2])], dim=1)
        y = torch.relu(norm(whole)) + whole
        Defer.gradients.clear()
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        found.append([y.detach(), *(x.grad for x in inputs), norm.weight.grad])
        for x in inputs:
            x.grad = None
    assert type(y) is Deferred
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_other_concatenations_are_left_to_torch():
    y = Defer.apply(torch.randn(2, 16, 5, 5), True)
    assert type(torch.cat([y, y], 2)) is torch.Tensor
    assert torch.cat([y, torch.ones(2, 3, 5, 5, dtype=torch.float64)], 1).dtype == torch.float64
    out = torch.empty(2, 32, 5, 5)
    assert torch.cat([y, y], 1, out=out) is out
    assert torch.cat([torch.ones(2, 3, 4, 4)] * 2, 1, out=Defer.apply(torch.randn(2, 6, 4, 4), True)).sum() == 192
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([y, torch.ones(2, 3, 5, 6)], 1)


def test_windows_of_nothing_but_infinity_have_a_gradient():
    torch.manual_seed(0)
    x = torch.randn(4, 24, 3, 4)
    x[torch.rand(x.shape) < 0.6] = -torch.inf
    found = []
    for defer in (lambda x: x + 0, lambda x: Defer.apply(x, True)):
        own = x.clone(memory_format=torch.channels_last).requires_grad_()
        y = functional.max_pool2d(nn.BatchNorm2d(24).eval()(defer(own)), (1, 2), 2, (0, 1))
        found.append(torch.autograd.grad(y, own, torch.ones_like(y))[0])
    torch.testing.assert_close(*found)


def test_the_maximum_takes_what_is_no_number_as_torch_does():
    values = torch.randn(1, 4, 4, 16)
    values[0, 1, 1, 3], values[0, 0, 0, 5] = torch.nan, -torch.inf
    pooled = functional.max_pool2d(Deferred(Expression((Term(values),), rectified=True), True), 2)
    expected = functional.max_pool2d(torch.relu(values.movedim(-1, 1)), 2)
    assert torch.equal(pooled.nan_to_num(7.0), expected.nan_to_num(7.0))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 3, 16, 40])),
    terms=st.integers(1, 2),
    rectified=st.booleans(),
    bits=st.sampled_from([8, 9, 16, 24]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    per=st.sampled_from(["tensor", "channel"]),
    kept=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_planes_of_an_expression_are_those_of_its_values(
    shape, terms, rectified, bits, rounding, per, kept, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    mask = Mask()
    first = torch.randn(shape, generator=generator).to(dtype)
    Expression((Term(first),), rectified=True, mask=mask).values()  # fills the mask
    factor, offset = torch.randn(2, channels, generator=generator)
    expression, twin = (
        Expression((Term(x, factor, mask), Term(y))[:terms], offset, rectified, kept=kept)
        for x, y in ((first, first + 1), (first.float(), (first + 1).float()))
    )
    spec = OperandSpec(bits=bits, rounding=rounding, per=per)
    axis, clip = (None, torch.tensor(2.0)) if per == "tensor" else (-1, torch.rand(channels, generator=generator))
    key = torch.tensor([seed, 0, 1])
    planes = load("onednn").quantize(expression, clip, spec, axis, key).planes
    expected = load("onednn").quantize(twin.values(), clip, spec, axis, key).planes
    assert all(
        torch.equal(p.data, e.data) and torch.equal(p.scale, e.scale) for p, e in zip(planes, expected, strict=True)
    )
    assert expression.is_plain == kept
    assert torch.equal(expression.values(), twin.values().to(dtype))


@pytest.mark.skipif(not implicit_route.is_exact(), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "bias", "walks"), [(1, False, 0), (1, True, 1), (32, False, 1)])
def test_the_product_sums_what_a_batch_norm_needs(groups, bias, walks, dtype, monkeypatch):
    found, calls = [], []
    moments = passes().moments
    monkeypatch.setattr(passes(), "moments", lambda values: calls.append(1) or moments(values))
    for fuse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(32, 32, 3, groups=groups, bias=bias), nn.BatchNorm2d(32), nn.ReLU())
        convert(net, fuse=fuse)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = net(torch.randn(4, 32, 30, 31) + 1)
        y.float().square().mean().backward()
        found.append([y.detach().float(), net[1].running_mean, net[1].running_var, net[1].weight.grad])
    assert len(calls) == walks
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1], found[0], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 37, 3, padding=1), nn.Linear(8, 37)])
def test_the_gradient_of_a_bias_is_summed_while_the_gradient_is_rounded(layer, affine, monkeypatch):
    gradient = OperandSpec(affine=affine, rounding="stochastic")
    recipe = Recipe(
        name="a rounded gradient",
        grad_input=ContractionSpec(lhs=gradient, rhs=OperandSpec()),
        grad_weight=ContractionSpec(lhs=gradient, rhs=OperandSpec()),
    )
    net = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
    convert(net, recipe=recipe)
    x = torch.randn(5, 8, 9, 7) if isinstance(layer, nn.Conv2d) else torch.randn(5, 9, 7, 8)
    y = net(x)
    monkeypatch.setattr(passes(), "channel_sums", lambda *_: pytest.fail("a walk of its own"))
    g = torch.randn(y.shape) * 1e3 + 1e5
    y.backward(g)
    kept = (g * (y > 0)).double().movedim(1 if x.shape[1] == 8 else -1, -1).flatten(0, -2).sum(0)
    torch.testing.assert_close(net[0].bias.grad.double(), kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1.0, 255.0])
def test_channels_of_one_value_become_zero(value):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64))
    convert(net)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.full((8, 16, 32, 32), value))
    assert y.float().abs().max() < 0.05


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(special):
    values = torch.randn(2, 3, 8)
    values[1, 2, 3] = special
    rectified = Expression((Term(values),), rectified=True, mask=Mask())
    planes = load("onednn").quantize(rectified, torch.tensor(1.0), OperandSpec(), None, torch.tensor([0, 0, 0])).planes
    expected = torch.relu(values)
    assert torch.equal(rectified.values(), expected) or special is torch.nan
    assert planes[0].scale.isnan() == (not bool(torch.isfinite(expected).all()))


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e4])
def test_moments_keep_their_digits_far_from_zero(shift):
    values = torch.randn(7, 33, 20) + shift
    mean, var = passes().moments(values)
    torch.testing.assert_close(mean, values.double().mean((0, 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, values.double().var((0, 1), unbiased=False), rtol=1e-5, atol=0)


def network(inplace=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace),
    )


def converted(fuse=True, inplace=True, **arguments):
    net = network(inplace)
    convert(net, fuse=fuse, **arguments)
    return net


IMAGES = torch.randn(4, 3, 9, 10, generator=torch.Generator().manual_seed(2))


def test_a_convolution_defers_unless_told_otherwise():
    assert type(converted()(IMAGES)) is Deferred
    assert type(converted(fuse=False)(IMAGES)) is torch.Tensor
    assert type(converted(backend="reference")(IMAGES)) is torch.Tensor
    with torch.autocast("cpu", torch.bfloat16):
        assert (type(y := converted()(IMAGES)), y.dtype) == (Deferred, torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert type(converted()(IMAGES)) is torch.Tensor


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_training_is_unfused_training(train, memory_format, dtype):
    found = []
    for fuse in (False, True):
        net = converted(fuse).to(memory_format=memory_format).train(train)
        for _ in range(4):  # the last one needs no fresh ranges
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = net(IMAGES.to(memory_format=memory_format))
            assert y.dtype == dtype
            y.square().mean().backward()
        assert y.is_contiguous(memory_format=memory_format)
        found.append([y.detach().clone(), *(p.grad for p in net.parameters())])
        assert all(all(n == 4 for c, n in count.items() if c != "grad_input") for count in gemm_counts(net).values())
    for fused, plain in zip(*found, strict=True):
        # Another order of summation in batch norm moves a few elements across a rounding boundary.
        cosine = functional.cosine_similarity(fused.flatten(), plain.flatten(), dim=0)
        assert cosine > (0.999 if dtype == torch.float32 else 0.99)


def test_the_same_memory_is_not_quantized_from_floats():
    """Between the two convolutions no float activation exists outside refreshes."""
    net = converted()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(5):  # ranges are refreshed at steps 0, 1, 2 and 4
        optimizer.zero_grad()
        net(IMAGES).square().mean().backward()
        optimizer.step()
    calls = []
    original = Expression.values

    def noted(self):
        calls.append(self.is_plain)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expression, "values", noted)
        y = net[:6](IMAGES)
        y.backward(torch.randn_like(y.detach()))
    assert calls
    assert all(calls)


def test_deferred_tensors_can_be_looked_at():
    z = converted()(IMAGES)
    values = z.detach().clone()
    assert type(values) is torch.Tensor
    assert z.shape == values.shape
    assert z.requires_grad
    assert not z.is_leaf
    assert np.array_equal(np.asarray(z.detach()), values.numpy())
    assert z.tolist() == values.tolist()
    assert repr(values)[:30] in repr(z)
    assert torch.equal(copy.deepcopy(z.detach()), values)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(converted()(IMAGES))
    file = io.BytesIO()
    torch.save(converted()(IMAGES), file)
    file.seek(0)
    assert torch.equal(torch.load(file), values)


def test_changes_in_place_and_views_are_seen_both_ways():
    z = converted()(IMAGES)
    values = z.detach().clone()
    z = converted()(IMAGES)
    z.view(4, -1).mul_(2)
    z[0] = 0
    z += 1
    values.mul_(2)[0] = 0
    assert torch.equal(z, values + 1)
    (z * z).sum().backward()


def test_what_was_read_is_not_changed_by_a_later_change_in_place():
    y = converted()[0](IMAGES)
    norm = nn.BatchNorm2d(16)
    expected = norm(y.detach().clone())
    z = norm(y)
    y.mul_(3)
    assert torch.equal(y, 3 * converted()[0](IMAGES))
    torch.testing.assert_close(z, expected)


def test_a_change_that_would_be_read_too_late_is_an_error():
    y = converted()[0](IMAGES)
    other = torch.zeros(y.shape).to(memory_format=torch.channels_last)
    total = y + other
    other.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        total.sum()


def test_hooks_see_tensors():
    net = converted(inplace=False)  # torch itself refuses to change what went through a backward hook
    seen = []
    for module in net:
        module.register_forward_hook(lambda m, args, out: seen.append(out.mean().item()))
        module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].norm().item()))
    z = net(IMAGES)
    z.register_hook(lambda g: seen.append(g.sum().item()))
    z.sum().backward()
    assert len(seen) == 2 * len(net) + 1
    assert all(np.isfinite(seen))


def test_checkpointed_blocks():
    net = converted()
    with torch.random.fork_rng():
        z = torch.utils.checkpoint.checkpoint(net, IMAGES.requires_grad_(), use_reentrant=False)
        z.square().sum().backward()
    gradient = net[0].weight.grad.clone()
    plain = converted()
    plain(IMAGES.detach().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(gradient, plain[0].weight.grad, rtol=1e-4, atol=1e-4)
    IMAGES.requires_grad_(False)


def test_a_compiled_model_fuses_too(recwarn):
    net = converted()
    compiled = torch.compile(net, backend="eager")
    plain = converted()
    for _ in range(3):
        assert torch.equal(compiled(IMAGES), plain(IMAGES))
    assert not [w for w in recwarn if "Dynamo does not know" in str(w.message)]


def test_frozen_and_unaffine_norms():
    for norm in (nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16, track_running_stats=False), nn.BatchNorm2d(16)):
        norm.requires_grad_(False)
        x = torch.randn(2, 16, 5, 5, requires_grad=True)
        (expected,) = torch.autograd.grad(norm(x).sin().sum(), x)
        (found,) = torch.autograd.grad(norm(Defer.apply(x, True)).sin().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(16)(Defer.apply(torch.randn(1, 16, 1, 1), True))


def test_other_dtypes_and_shapes_are_left_to_torch():
    y = Defer.apply(torch.randn(2, 16, 5, 5), True)
    assert (y + torch.ones(16, 1, 1)).shape == y.shape
    assert (y + torch.ones(2, 16, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert torch.add(y, y, alpha=2).shape == y.shape
    assert functional.batch_norm(y, None, None, torch.ones(16).half().float(), None, True).shape == y.shape


def test_gradients_of_parameters_are_plain():
    map_of_biases = nn.Parameter(torch.randn(4, 16, 9, 10))
    functional.relu(converted()[0](IMAGES) + map_of_biases).square().sum().backward()
    assert type(map_of_biases.grad) is torch.Tensor


def test_results_written_into_a_deferred_tensor_leave_its_source_alone():
    net = converted()
    values = net[0](IMAGES).detach().clone()
    for write in (
        lambda y: torch.add(torch.ones_like(y), 1, out=y),
        lambda y: torch._foreach_mul_([y], 0.5),
        lambda y: y.zero_(),
    ):
        with torch.no_grad():
            y = converted()[0](IMAGES)
            z = torch.relu(y)
            write(y)
            assert not torch.equal(y, values)
            assert torch.equal(z, torch.relu(values))


def test_a_deferred_tensor_may_be_a_gradient():
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    gradient = torch.relu(nn.BatchNorm2d(16)(Defer.apply(torch.randn(2, 16, 5, 5), True))).detach()
    (expected,) = torch.autograd.grad(torch.relu(x * 1), x, gradient)
    deferred = Deferred(Expression((Term(gradient.movedim(1, -1).contiguous() - 1),), torch.ones(16), True), True)
    (found,) = torch.autograd.grad(torch.relu(Defer.apply(x, True)), x, deferred)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the CPU that is named is an x86")
def test_this_file_passes_on_vectors_of_one_register():
    """Compiled for a CPU without AVX-512 vectors are shorter; numba reads the name once per process."""
    if os.environ.get("NUMBA_CPU_NAME"):
        pytest.skip("this is the inner run")
    env = os.environ | {"NUMBA_CPU_NAME": "haswell"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
