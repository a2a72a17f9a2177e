"""Each converted layer beside its float twin: how much noise, which shapes and dtypes, what is kept for backward."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_int8 import ContractionSpec, OperandSpec, Recipe, convert, gemm_counts, ranges
from lightning_int8.numerics import largest_integer

RESULTS = ("output", "grad_input", "grad_weight")

SQNR_FLOOR_DB = {
    #                     output  grad_input  grad_weight
    "linear": (37.5, 36.0, 34.0),
    "linear 3d no bias": (37.5, 35.8, 34.0),
    "conv1d": (38.3, 35.8, 34.3),
    "conv1d strided dilated": (38.5, 35.4, 34.2),
    "conv2d": (38.2, 35.0, 33.8),
    "conv2d 1x1 strided no bias": (37.6, 36.0, 34.5),
    "conv2d strided": (38.0, 35.9, 34.6),
    "conv2d strided dilated": (38.0, 35.0, 33.6),
    "conv2d groups": (37.6, 34.3, 33.1),
    "conv2d depthwise": (37.6, 34.7, 33.1),
    "conv2d depthwise multiplier 2": (38.2, 34.3, 32.8),
    "conv2d same even": (38.2, 35.0, 33.8),
    "conv2d valid": (38.1, 35.1, 33.6),
    "conv2d reflect": (38.1, 35.0, 33.9),
    "conv2d replicate": (38.1, 35.0, 33.8),
    "conv2d circular": (38.1, 35.0, 33.9),
    "conv3d": (37.5, 35.5, 33.9),
    "conv3d strided groups": (37.4, 35.9, 34.4),
}
"""Signal to quantization noise with 8-bit operands on normal data, about 2 dB below what is measured.

Theory: rounding to a step of max/127 adds noise of step²/12 (nearest) or step²/6 (stochastic), so that one operand has
10·log10(12 · 127² · rms²/max²) dB: 41 for an activation (max about 4 rms), 48 for a weight as torch initializes it (max
1.7 rms), 38 for a stochastic gradient. The noise powers of the two operands of a contraction add.
"""

THEORY_TOLERANCE_DB = {8: 1.0, 16: 1.2, 24: 3.5}
"""Distance between the measured and the computed SQNR; at 24 bits the float32 sum of the planes is heard too."""

LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), (128, 64)),
    "linear 3d no bias": (lambda: nn.Linear(64, 48, bias=False), (4, 32, 64)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 5, padding=2), (8, 16, 40)),
    "conv1d strided dilated": (lambda: nn.Conv1d(16, 24, 4, stride=3, dilation=2, padding=1), (8, 16, 60)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (8, 16, 12, 12)),
    "conv2d 1x1 strided no bias": (lambda: nn.Conv2d(16, 24, 1, stride=2, bias=False), (8, 16, 12, 12)),
    "conv2d strided": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (8, 16, 13, 12)),
    "conv2d strided dilated": (lambda: nn.Conv2d(16, 24, 3, (1, 2), (2, 0), (2, 3)), (8, 16, 12, 16)),
    "conv2d groups": (lambda: nn.Conv2d(24, 48, 3, padding=1, groups=3), (8, 24, 12, 12)),
    "conv2d depthwise": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (8, 32, 12, 12)),
    "conv2d depthwise multiplier 2": (lambda: nn.Conv2d(20, 40, 3, padding=1, groups=20), (8, 20, 12, 12)),
    "conv2d same even": (lambda: nn.Conv2d(16, 24, (4, 3), padding="same", dilation=(1, 2)), (8, 16, 12, 12)),
    "conv2d valid": (lambda: nn.Conv2d(16, 24, 3, padding="valid"), (8, 16, 12, 12)),
    "conv2d reflect": (lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect"), (8, 16, 12, 12)),
    "conv2d replicate": (lambda: nn.Conv2d(16, 24, 3, padding=(2, 1), padding_mode="replicate"), (8, 16, 12, 12)),
    "conv2d circular": (lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="circular"), (8, 16, 12, 12)),
    "conv3d": (lambda: nn.Conv3d(8, 16, 3, padding=1), (4, 8, 6, 6, 6)),
    "conv3d strided groups": (lambda: nn.Conv3d(8, 16, (1, 2, 3), stride=(2, 1, 2), groups=2), (4, 8, 6, 6, 9)),
}
"""Layer and shape of its input."""


def recipe_of(bits):
    """The default recipe at another width."""
    activation, gradient = OperandSpec(bits=bits), OperandSpec(bits=bits, rounding="stochastic")
    weight = OperandSpec(bits=bits, per="channel", range=ranges.make("absmax", every=1))
    return Recipe(
        name=f"{bits} bits",
        output=ContractionSpec(lhs=activation, rhs=weight),
        grad_input=ContractionSpec(lhs=gradient, rhs=weight),
        grad_weight=ContractionSpec(lhs=gradient, rhs=activation),
    )


def decibel(ratio):
    return 10 * math.log10(ratio) if ratio else math.inf


def sqnr_db(truth, measured):
    truth, measured = truth.detach().double(), measured.detach().double()
    return -decibel(((measured - truth).square().sum() / truth.square().sum()).item())


def noise(x, bits, axis, stochastic=False):
    """Noise power of one quantized operand relative to its signal, by theory."""
    others = [d for d in range(x.dim()) if d != axis]
    step = (x.abs().max() if axis is None else x.abs().amax(others)) / largest_integer(bits)
    return (step.double().square().mean() / (6 if stochastic else 12) / x.double().square().mean()).item()


def run(layer, x, grad):
    """One forward and backward pass: output, grad_input, grad_weight."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(grad)
    return dict(zip(RESULTS, (y.detach(), x.grad, layer.weight.grad), strict=True))


def twins(name, recipe="default", seed=0):
    """A converted layer, its float64 twin and data for them."""
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    layer = make()
    twin = copy.deepcopy(layer).double()
    convert(layer, recipe=recipe)
    x = torch.randn(shape)
    return layer, twin, x, torch.randn(twin(x.double()).shape)


def measure(name, recipe="default"):
    """SQNR in dB of the three results, and what theory expects."""
    bits = 8 if recipe == "default" else recipe.output.lhs.bits
    layer, twin, x, grad = twins(name, recipe)
    truth = run(twin, x.double(), grad.double())
    measured = {k: sqnr_db(truth[k], v) for k, v in run(layer, x, grad).items()}
    w = layer.weight.detach()
    of_x, of_g = noise(x, bits, None), noise(grad, bits, None, stochastic=True)
    expected = (of_x + noise(w, bits, 0), of_g + noise(w, bits, 1), of_g + of_x)
    return measured, {k: -decibel(v) for k, v in zip(RESULTS, expected, strict=True)}


# --- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_noise_of_8_bits_is_what_theory_says_and_no_more(name):
    measured, expected = measure(name)
    for result, floor in zip(RESULTS, SQNR_FLOOR_DB[name], strict=True):
        assert measured[result] > floor, f"{result}: {measured[result]:.1f} dB"
        assert abs(measured[result] - expected[result]) < THEORY_TOLERANCE_DB[8], (result, measured, expected)


@pytest.mark.parametrize("name", ["linear", "conv1d strided dilated", "conv2d", "conv2d groups", "conv3d"])
@pytest.mark.parametrize("bits", [16, 24])
def test_each_plane_more_lowers_the_noise_by_48_decibel(bits, name):
    measured, expected = measure(name, recipe_of(bits))
    narrow, _ = measure(name)
    for result in RESULTS:
        gain = decibel((largest_integer(bits) / largest_integer(8)) ** 2)
        assert abs(measured[result] - expected[result]) < THEORY_TOLERANCE_DB[bits], (result, measured, expected)
        assert abs(measured[result] - narrow[result] - gain) < THEORY_TOLERANCE_DB[bits], result


def test_an_affine_activation_gains_the_half_of_the_range_that_relu_leaves_empty():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 24, 3, padding=1), torch.randn(8, 16, 12, 12).relu()
    truth = layer(x)
    sqnr = {}
    for affine in (False, True):
        other = copy.deepcopy(layer)
        lhs = OperandSpec(affine=affine)
        rhs = OperandSpec(bits=24, per="channel")
        convert(other, recipe=Recipe(name="affine", output=ContractionSpec(lhs=lhs, rhs=rhs)))
        sqnr[affine] = sqnr_db(truth, other(x))
    assert sqnr[True] - sqnr[False] == pytest.approx(decibel(2**2), abs=0.5)


def channelwise(affine):
    """A scale of its own for every channel that a contraction does not sum over."""
    channel = OperandSpec(per="channel", affine=affine)
    return Recipe(
        name="channelwise",
        output=ContractionSpec(rhs=channel),
        grad_input=ContractionSpec(rhs=channel),
        grad_weight=ContractionSpec(lhs=channel, rhs=channel),
    )


def spread(count, axis, dim):
    """Factors from 1/100 to 100 in random order, along one of ``dim`` axes."""
    shape = [1] * dim
    shape[axis] = count
    return torch.logspace(-2, 2, count)[torch.randperm(count)].reshape(shape)


SPREAD = ["linear", "conv1d", "conv2d", "conv2d groups", "conv2d depthwise multiplier 2", "conv3d strided groups"]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SPREAD)
def test_weight_channels_of_very_different_size_keep_their_own_scales(name, axis, affine):
    layer, twin, x, grad = twins(name, channelwise(affine))
    factor = spread(layer.weight.shape[axis], axis, x.dim())
    with torch.no_grad():
        twin.weight.copy_(layer.weight.mul_(factor))
    if layer.bias is not None:
        layer.bias, twin.bias = None, None
    result = RESULTS[axis]
    truth, measured = run(twin, x.double(), grad.double())[result], run(layer, x, grad)[result]
    # Onto the channels of the result; in grad_input each group repeats them.
    factor = torch.cat([factor.transpose(axis, 1)] * (truth.shape[1] // factor.numel()), dim=1)
    assert sqnr_db(truth / factor, measured / factor) > SQNR_FLOOR_DB[name][axis]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", SPREAD)
def test_activation_and_gradient_channels_of_very_different_size_keep_theirs_in_grad_weight(name, affine):
    layer, twin, x, grad = twins(name, channelwise(affine))
    of_x, of_g = spread(x.shape[1], 1, x.dim()), spread(grad.shape[1], 1, x.dim())
    truth = run(twin, (x * of_x).double(), (grad * of_g).double())["grad_weight"]
    measured = run(layer, x * of_x, grad * of_g)["grad_weight"]
    # Weight (co, ci) meets input channel group(co) * C / groups + ci.
    groups = getattr(layer, "groups", 1)
    of_pair = of_x.reshape(groups, -1).repeat_interleave(len(truth) // groups, dim=0)
    factor = of_g.transpose(0, 1) * of_pair.reshape(len(truth), -1, *[1] * (x.dim() - 2))
    assert sqnr_db(truth / factor, measured / factor) > SQNR_FLOOR_DB[name][2]


def test_bias_and_its_gradient_stay_in_float():
    for name in ("linear", "conv2d", "conv3d strided groups"):
        layer, twin, x, grad = twins(name)
        run(layer, x, grad)
        run(twin, x.double(), grad.double())
        assert sqnr_db(twin.bias.grad, layer.bias.grad) > 120
        before = layer(x)
        with torch.no_grad():
            layer.bias += 1.5
        torch.testing.assert_close(layer(x) - before, torch.full_like(before, 1.5), atol=1e-5, rtol=0)


def test_results_do_not_depend_on_the_memory_format():
    for name in ("conv2d", "conv2d groups", "conv2d strided", "conv2d reflect"):
        layer, _, x, grad = twins(name)
        other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        plain = run(layer, x, grad)
        last = run(other, x.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last))
        for result in RESULTS:
            assert torch.equal(plain[result], last[result]), (name, result)


def test_weights_of_zero_and_a_dead_channel_pass_exact_zeros():
    layer, _, x, grad = twins("conv2d")
    with torch.no_grad():
        layer.weight[3] = 0
        layer.bias[3] = 0
    results = run(layer, x, grad)
    assert not results["output"][:, 3].any()
    assert results["grad_weight"][3].any()
    with torch.no_grad():
        layer.weight.zero_()
    results = run(layer, x, torch.zeros_like(grad))
    assert not results["grad_input"].any()
    assert not results["grad_weight"].any()


# --- Shapes, strides, dtypes -----------------------------------------------------------------------------------------


def memory_order(t):
    """Strides of the axes that have more than one index: the others do not matter."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@pytest.mark.parametrize("w_last", [False, True], ids=["", "weight channels last"])
@pytest.mark.parametrize("x_last", [False, True], ids=["", "input channels last"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_shapes_and_strides_are_those_of_the_float_layer(name, x_last, w_last):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    if x_last:
        x = x.to(memory_format=last)
    if w_last and "1x1" not in name:  # the memory format of a 1x1 weight is anyone's guess
        layer = layer.to(memory_format=last)
    expected = layer(x)
    convert(layer)
    y = layer(x)
    assert y.shape == expected.shape
    assert memory_order(y) == memory_order(expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_an_unbatched_input_is_a_batch_of_one(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape[1:])
    expected = layer(x)
    convert(layer)
    y = layer(x)
    assert y.shape == expected.shape
    assert memory_order(y) == memory_order(expected)
    assert torch.equal(y, layer(x[None])[0])


def test_an_unbatched_channels_last_input_gives_the_strides_of_torch():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(8, 9, 4).permute(2, 0, 1)
    expected = layer(x)
    convert(layer)
    assert layer(x).stride() == expected.stride()


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_can_be_viewed(name):
    layer, _, x, _ = twins(name)
    assert layer(x).view(len(x), -1).shape[0] == len(x)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(dtype, name):
    layer, twin, x, grad = twins(name)
    layer = layer.to(dtype)
    results = run(layer, x.to(dtype), grad.to(dtype))
    assert {r.dtype for r in results.values()} == {dtype}
    assert layer.bias.grad.dtype == dtype
    truth = run(twin, x.double(), grad.double())
    for result, floor in zip(RESULTS, SQNR_FLOOR_DB[name], strict=True):
        assert sqnr_db(truth[result], results[result]) > floor - 1.0, result  # rounding to 8 bits of mantissa adds some


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_each_gradient_has_the_dtype_of_its_tensor(name):
    layer, _, x, grad = twins(name)
    results = run(layer, x.bfloat16(), grad.bfloat16())
    assert [results[r].dtype for r in RESULTS] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_dtype_of_the_output_alone(dtype, name):
    layer, _, x, _ = twins(name)
    x.requires_grad_()
    plain = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    # The contraction itself is untouched: one rounding of the same float32 result.
    assert torch.equal(y, plain.to(dtype))
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_other_dtypes_are_refused_by_name(name, dtype):
    layer, _, x, _ = twins(name)
    with pytest.raises(TypeError, match=f"layer '': input dtype: {dtype} is not one of torch.float32"):
        layer(x.to(dtype))


def test_wrong_shapes_are_refused_by_name():
    layer, _, x, _ = twins("conv2d")
    for wrong in (x[:, :-1], x[0, 0], x[None], x[..., :0, :0][:, :-1]):
        with pytest.raises(ValueError, match="layer '': input shape: "):
            layer(wrong)
    with pytest.raises(
        ValueError, match=r"layer '': input shape: \(128, 63\) has 63 channels where the layer takes 64"
    ):
        twins("linear")[0](torch.randn(128, 63))
    small = nn.Conv2d(2, 2, 5)
    convert(small)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        small(torch.randn(1, 2, 4, 8))


@pytest.mark.parametrize("shape", [(0, 16, 12, 12), (0, 16, 3, 3)])
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(shape):
    layer, twin, _, _ = twins("conv2d")
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == twin(x.detach().double()).shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 1, stride=2, padding=1), (2, 3, 1, 1)),
        (nn.Conv1d(2, 2, 2, stride=6, padding=3, dilation=6), (1, 2, 1)),
        (nn.Conv1d(2, 3, 1, stride=5), (2, 2, 9)),
        (nn.Conv2d(2, 3, 1, padding=3), (2, 2, 3, 4)),
        (nn.Conv2d(4, 4, 2, stride=3, groups=2), (2, 4, 7, 5)),
    ],
    ids=["no tap meets the input", "no dilated tap meets it", "most inputs meet none", "mostly padding", "gaps"],
)
def test_gradients_of_inputs_that_few_taps_reach(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    grad = torch.randn(layer(x).shape)
    truth = run(layer, x, grad)
    convert(layer)
    results = run(layer, x, grad)
    for result in RESULTS:
        limit = 0.03 * truth[result].abs().max().item()
        torch.testing.assert_close(results[result], truth[result], atol=limit, rtol=0)
    assert torch.equal(results["grad_input"] == 0, truth["grad_input"] == 0)


# --- What is kept and what is computed -------------------------------------------------------------------------------


def saved_for_backward(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return saved


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_only_planes_and_scales_are_saved_for_backward(name):
    layer, _, x, _ = twins(name)
    saved = saved_for_backward(layer, x.requires_grad_())
    planes = [t for t in saved if t.dtype == torch.int8]
    scales = [t for t in saved if t.dtype == torch.float32]
    assert len(planes) == len(scales) == 2, [(t.dtype, tuple(t.shape)) for t in saved]
    assert all(t.dtype == torch.int64 and t.numel() < 100 for t in saved if not any(t is s for s in planes + scales))
    padded = x
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    assert sorted(t.nbytes for t in planes) == sorted([padded.numel(), layer.weight.numel()])
    assert sum(t.numel() for t in scales) <= 1 + layer.weight.shape[1]


def kept_by_graph(node):
    """Storages of the float tensors that torch's own operations below ``node`` keep for backward: bytes of each."""
    seen, todo, kept = set(), [node], {}
    while todo:
        node = todo.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for t in saved:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return kept.values()


@pytest.mark.parametrize("name", ["conv2d reflect", "conv2d replicate", "conv2d circular", "conv2d same even"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_keeps_no_float_copy_of_its_input(name):
    layer, _, x, _ = twins(name)
    assert sum(kept_by_graph(layer(x.requires_grad_()).grad_fn)) <= 2 * x.element_size()
    assert sum(kept_by_graph(nn.Conv2d(16, 4, 3)(x).grad_fn)) >= x.nbytes


@pytest.mark.parametrize("bits", [16, 24])
def test_wide_operands_save_one_byte_per_plane_and_element(bits):
    layer, _, x, _ = twins("linear", recipe_of(bits))
    saved = saved_for_backward(layer, x.requires_grad_())
    int8 = sum(t.nbytes for t in saved if t.dtype == torch.int8)
    assert int8 == bits // 8 * (x.numel() + layer.weight.numel())
    assert sum(t.numel() for t in saved if t.dtype != torch.int8) <= bits // 8 * (1 + layer.weight.shape[1])


def test_nothing_is_saved_without_grad():
    layer, _, x, _ = twins("conv2d")
    with torch.no_grad():
        assert saved_for_backward(layer, x) == []


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d groups"])
@pytest.mark.parametrize(("x_grad", "w_grad"), [(True, True), (True, False), (False, True), (False, False)])
def test_contractions_that_autograd_does_not_need_are_not_executed(x_grad, w_grad, name):
    layer, twin, x, grad = twins(name)
    layer.weight.requires_grad_(w_grad)
    x.requires_grad_(x_grad)
    truth = run(twin, x.double(), grad.double())
    saved = saved_for_backward(layer, x)
    assert sum(t.dtype == torch.int8 for t in saved) == x_grad + w_grad
    layer(x).backward(grad)
    assert gemm_counts(layer)[""] == {"output": 2, "grad_input": int(x_grad), "grad_weight": int(w_grad)}
    assert (x.grad is not None, layer.weight.grad is not None) == (x_grad, w_grad)
    assert sqnr_db(twin.bias.grad, layer.bias.grad) > 120
    for result, gradient in (("grad_input", x.grad), ("grad_weight", layer.weight.grad)):
        assert gradient is None or sqnr_db(truth[result], gradient) > SQNR_FLOOR_DB[name][RESULTS.index(result)]


def test_backward_twice_gives_equal_gradients():
    layer, _, x, grad = twins("conv2d")
    x.requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y, [x, layer.weight], grad, retain_graph=True)
    second = torch.autograd.grad(y, [x, layer.weight], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused_with_the_layer_and_the_way_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    convert(model)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"layer '0': second derivatives .* skip=\('0',\)"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


# --- Activation checkpointing ----------------------------------------------------------------------------------------


def ema_weights():
    weight = OperandSpec(range=ranges.make("ema_absmax", every=1))
    return Recipe(name="ema", output=ContractionSpec(rhs=weight), grad_input=ContractionSpec(rhs=weight))


def stochastic_everywhere():
    spec = ContractionSpec(lhs=OperandSpec(rounding="stochastic"), rhs=OperandSpec(rounding="stochastic"))
    return Recipe(name="noisy", output=spec, grad_input=spec, grad_weight=spec)


def train(recipe, wrap, steps=5):
    """Gradients of a few steps of a layer, called through ``wrap``."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    convert(layer, recipe=recipe)
    optimizer, gradients = torch.optim.SGD(layer.parameters(), 0.1), []
    for _ in range(steps):
        x = torch.randn(16, 8, requires_grad=True)
        optimizer.zero_grad()
        wrap(layer, x).square().sum().backward()
        gradients += [x.grad.clone(), layer.weight.grad.clone()]
        optimizer.step()
    return gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["default", stochastic_everywhere(), ema_weights()], ids=["default", "noisy", "ema"])
def test_recomputation_repeats_the_draw_and_the_range(recipe, use_reentrant):
    plain = train(recipe, lambda layer, x: layer(x))
    again = train(recipe, lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def twice(layer, x):
    """A shared layer, each call in a checkpointed segment of its own."""
    return checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)


def test_recomputation_of_a_shared_layer_finds_the_range_of_all_its_calls():
    """In a step that measures, a later call may widen the range that the first one used: equal up to quantization."""
    plain = train("default", lambda layer, x: layer(layer(x)), steps=2)
    for a, b in zip(plain, train("default", twice, steps=2), strict=True):
        assert (a - b).norm() < 0.03 * a.norm()


@pytest.mark.xfail(reason="each recomputation repeats the layer's last draw, whichever call it recomputes")
def test_recomputation_of_a_shared_layer_repeats_each_draw():
    recipe = stochastic_everywhere()
    plain = train(recipe, lambda layer, x: layer(layer(x)))
    assert all(torch.equal(a, b) for a, b in zip(plain, train(recipe, twice), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_steps_draw_fresh_noise(use_reentrant):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(32, 64)
    convert(layer)
    gradients = []
    for _ in range(3):
        layer.zero_grad()
        checkpoint(layer, x.clone().requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])
