"""That the products really are INT8: every product that a training step executes is seen, and matches the counters."""

import re
from dataclasses import dataclass
from math import ceil, prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import ContractionSpec, OperandSpec, Recipe, convert, gemm_counts
from lightning_int8.backends import group_blocks, int_matmul, load, onednn
from lightning_int8.backends.base import Backend
from lightning_int8.backends.cpu import columns, direct_route, implicit_route, subpixel_route
from lightning_int8.geometry import ConvGeometry
from lightning_int8.layers import Int8Conv2d, Int8Linear
from lightning_int8.report import execution_table
from lightning_int8.rewrite import layer_states
from lightning_int8.spec import CONTRACTIONS

PRODUCT_WORDS = re.compile(r".*mm|.*matmul|.*gemm|.*mv|v?dot|.*conv\w*|.*linear|einsum|addr|attention|lstm|gru|rnn")
"""Words in the names of operations that multiply and sum: mm, addmm, baddbmm, convolution, qlinear, dot, ..."""

INT8_PRODUCTS = {
    "aten::_int_mm": (torch.int8, torch.int8),
    "onednn::qconv_pointwise": (torch.uint8, torch.int8),  # data, packed weight; behind them scales and offsets
    "lightning_int8::depthwise_conv": (torch.int8, torch.int8),
    "lightning_int8::depthwise_conv_grad_weight": (torch.int8, torch.int8),
    "lightning_int8::implicit_conv": (torch.int8, torch.int8),
    "lightning_int8::cupy_gemm": (torch.int8, torch.int8),
    "lightning_int8::cupy_convolution": (torch.int8, torch.int8),
}
"""The operations whose multiplications are of 8-bit integers, and the dtypes of what they multiply."""

PACKING = "onednn::qconv_prepack"
"""Reorders a weight for the convolution that follows; multiplies nothing."""


@dataclass(frozen=True)
class Call:
    """One operation, with the dtypes and shapes of its tensors, and the shape of its result.

    Of one that names it also the contraction, and of some the windows.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    result: tuple[int, ...]
    contraction: str = ""
    geometry: ConvGeometry | None = None

    @property
    def is_int8(self):
        return self.dtypes[:2] == INT8_PRODUCTS.get(self.name)

    @property
    def macs(self):
        """Multiply-accumulates that the contraction needs; a matrix product in halves (no VNNI) counts half."""
        if self.name == "aten::_int_mm":
            return prod(self.result) * self.shapes[0][1] / calls_per_count()
        if self.contraction == "grad_weight" or self.name.endswith("grad_weight"):
            return prod(self.shapes[0]) * prod(self.result[1:])
        if self.contraction == "grad_input" and self.geometry is not None:  # residue classes have their own taps each
            meetings = sum(prod(d.size * len(d.taps) for d in r.dims) for r in self.geometry.residues())
            return self.shapes[0][0] * meetings * prod(self.shapes[1]) // self.geometry.taps
        return prod(self.result) * prod(self.shapes[1][1:])


class Products(TorchDispatchMode):
    """Records every operation that multiplies and sums, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func._schema.name, func(*args, **(kwargs or {}))
        if name != PACKING and any(PRODUCT_WORDS.fullmatch(word) for word in name.partition("::")[2].split("_")):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            shape = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
            dtypes, shapes = zip(*((t.dtype, tuple(t.shape)) for t in tensors), strict=True) if tensors else ((), ())
            contraction = args[0] if args and isinstance(args[0], str) else ""
            geometry = ConvGeometry.of_integers(tuple(args[3])) if name.endswith("implicit_conv") else None
            self.calls.append(Call(name, dtypes, shapes, shape, contraction, geometry))
        return result


def calls_of_step(model, x):
    """The products of a whole training step: forward, loss, backward, optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Products() as products:
        y = model(x)
        F.cross_entropy(y.flatten(1), torch.zeros(len(y), dtype=torch.long)).backward()
        optimizer.step()
    return products.calls


def calls_per_count():
    """Products of the CPU that one counted contraction takes: two where only half the range is exact (no VNNI)."""
    return 2 if load("onednn")._gemm.matmul is int_matmul.halves else 1


def check_products(model, calls):
    """The checker: fails unless all products are INT8 and as many as the counters of ``model`` say."""
    for call in calls:
        assert call.name in INT8_PRODUCTS, f"not an INT8 product: {call}"
        assert call.is_int8, f"operands are not int8: {call}"
    counted = sum(sum(of.values()) for of in gemm_counts(model).values())
    expected = counted + (calls_per_count() - 1) * sum(c.name == "aten::_int_mm" for c in calls) / calls_per_count()
    assert len(calls) == expected, f"executed {len(calls)} products, counted {counted}"


def small_network():
    """Linear and stride-1 convolutions of one, two and three dimensions: one product for each contraction."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Flatten(3),
        nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect"),
        nn.GELU(),
        nn.Flatten(2),
        nn.Conv1d(6, 8, 5, padding="same"),
        nn.MaxPool1d(3),
        nn.Flatten(),
        nn.Linear(136, 10, bias=False),
        nn.LayerNorm(10),
        nn.Linear(10, 3),
    )


ROUTES = ("im2col", "direct", "subpixel", "depthwise", "implicit")


def take_route(name, monkeypatch):
    """Let convolutions take one route wherever it can, instead of the fastest."""
    if name in ("direct", "subpixel") and not direct_route.is_exact():
        pytest.skip("without VNNI the direct convolution is not exact, hence not used")
    if name == "implicit" and (implicit_route.MICROKERNEL is None or not implicit_route.MICROKERNEL.is_available()):
        pytest.skip("this CPU has no AVX512-VNNI, or numba is missing")
    if name == "implicit":
        assert implicit_route.is_exact()  # now, and not for the first time while products are recorded
    backend = load("onednn")
    monkeypatch.setattr(backend, "_choice", onednn.OneDNN(backend._gemm.matmul, only=name)._choice)


SMALL_INPUT = (3, 2, 4, 3, 4)


def recipe_of(left_bits, right_bits):
    spec = ContractionSpec(lhs=OperandSpec(bits=left_bits), rhs=OperandSpec(bits=right_bits))
    return Recipe(name="wide", output=spec, grad_input=spec, grad_weight=spec)


# --- The checker sees what it must see -------------------------------------------------------------------------------


def test_the_recorder_sees_every_kind_of_float_product():
    m, v = torch.randn(4, 4, requires_grad=True), torch.randn(4)
    image = torch.randn(1, 4, 6, 6, requires_grad=True)
    products = {
        "linear": lambda: F.linear(m, m, v),
        "matmul": lambda: m @ m,
        "addmm": lambda: torch.addmm(v, m, m),
        "bmm": lambda: torch.bmm(m[None], m[None]),
        "einsum": lambda: torch.einsum("ij,kj->ik", m, m),
        "mv": lambda: m @ v,
        "dot": lambda: v @ v,
        "addr": lambda: torch.addr(m, v, v),
        "bilinear": lambda: F.bilinear(m, m, m[None]),
        "conv1d": lambda: F.conv1d(image[:, :, 0], m[:, :, None]),
        "conv2d": lambda: F.conv2d(image, m[..., None, None], stride=2),
        "conv3d": lambda: F.conv3d(image[None], m.reshape(1, 1, 4, 2, 2)),
        "grouped": lambda: F.conv2d(image, m.reshape(4, 1, 2, 2), groups=4),
        "transposed": lambda: F.conv_transpose2d(image, m[..., None, None]),
        "attention": lambda: F.scaled_dot_product_attention(image, image, image),
        "lstm": lambda: nn.LSTM(4, 4)(m)[0],
        "bfloat16": lambda: m.bfloat16() @ m.bfloat16(),
        "int8 reference": lambda: (m * 9).to(torch.int8).int() @ m.int(),
    }
    for name, product in products.items():
        with Products() as recorder:
            y = product()
        assert recorder.calls, f"{name} was not seen"
        if y.requires_grad:
            with Products() as recorder:
                y.sum().backward()
            assert recorder.calls or name in ("addr", "mv"), f"the backward pass of {name} was not seen"


def test_the_recorder_leaves_other_operations_alone():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with Products() as recorder:
        y = F.batch_norm(F.interpolate(x, scale_factor=2, mode="bilinear"), None, None, training=True)
        y = F.gelu(F.layer_norm(F.max_pool2d(y, 2), (8, 8))).softmax(-1) * torch.lgamma(x.exp())
        y.mean().backward()
    assert recorder.calls == []


def test_a_float_model_fails_the_check():
    model = small_network()
    with pytest.raises(AssertionError, match="not an INT8 product"):
        check_products(model, calls_of_step(model, torch.randn(SMALL_INPUT)))


def test_a_float_fallback_in_a_layer_is_caught(monkeypatch):
    model = small_network()
    convert(model)

    def fallback(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    monkeypatch.setattr(Int8Conv2d, "forward", fallback)
    with pytest.raises(AssertionError, match=r"not an INT8 product.*convolution"):
        check_products(model, calls_of_step(model, torch.randn(SMALL_INPUT)))


def test_a_float_fallback_in_the_backward_pass_alone_is_caught(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 5))
    convert(model)

    def fallback(self, g, x, geometry, counts, dtype):
        counts[self.name, "grad_weight"] += 1
        return (g.planes[0].data.float().t() @ x.planes[0].data.float()) * g.planes[0].scale * x.planes[0].scale

    monkeypatch.setattr(Backend, "grad_weight", fallback)
    with pytest.raises(AssertionError, match=r"not an INT8 product.*aten::mm"):
        check_products(model, calls_of_step(model, torch.randn(4, 6)))


def test_a_product_counted_twice_is_caught(monkeypatch):
    model = small_network()
    convert(model)
    contract = Backend._contract

    def miscount(self, contraction, *arguments):
        counts = arguments[3]
        counts[self.name, contraction] += contraction == "grad_input"
        return contract(self, contraction, *arguments)

    monkeypatch.setattr(Backend, "_contract", miscount)
    with pytest.raises(AssertionError, match=f"executed {14 * calls_per_count()} products, counted 18"):
        check_products(model, calls_of_step(model, torch.randn(SMALL_INPUT)))


def test_a_product_not_counted_is_caught():
    model = small_network()
    convert(model)
    calls = calls_of_step(model, torch.randn(SMALL_INPUT))
    model[4].int8_state.counts.clear()
    with pytest.raises(AssertionError, match=f"executed {14 * calls_per_count()} products, counted 11"):
        check_products(model, calls)


# --- Converted models pass it ----------------------------------------------------------------------------------------


def test_a_training_step_multiplies_in_int8_alone_and_counts_every_product():
    model = small_network()
    convert(model)
    calls = calls_of_step(model, torch.randn(SMALL_INPUT))
    check_products(model, calls)
    once = {"output": 1, "grad_input": 1, "grad_weight": 1}
    counts = gemm_counts(model)
    assert counts.pop("0") == once | {"grad_input": 0}  # the images need no gradient
    assert counts == dict.fromkeys(["4", "7", "10", "12"], once)


def test_the_direct_convolution_is_an_int8_product_that_is_counted(monkeypatch):
    take_route("direct", monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    convert(model, recipe=recipe_of(16, 8))
    calls = calls_of_step(model, torch.randn(2, 3, 9, 9))
    check_products(model, calls)
    direct = [c for c in calls if c.name == "onednn::qconv_pointwise"]
    assert len(direct) == 6  # two outputs and one grad_input, of two plane pairs each


def test_a_strided_gradient_is_one_direct_convolution(monkeypatch):
    take_route("subpixel", monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Flatten())
    convert(model)
    calls = calls_of_step(model, torch.randn(2, 3, 9, 9))
    check_products(model, calls)
    assert [c.shapes[1] for c in calls if c.name == "onednn::qconv_pointwise"] == [(4 * 8, 8, 2, 2)]


def test_the_implicit_products_are_int8_and_counted(monkeypatch):
    take_route("implicit", monkeypatch)
    torch.manual_seed(0)
    strided = nn.Conv2d(8, 8, 3, stride=2, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), strided, nn.Flatten(), nn.Linear(128, 5))
    convert(model, recipe=recipe_of(16, 8))
    calls = calls_of_step(model, torch.randn(2, 3, 9, 9))
    check_products(model, calls)
    names = [c.contraction for c in calls]
    # Two plane pairs each; the images need no gradient.
    assert [names.count(c) for c in CONTRACTIONS] == [6, 4, 6]


def test_a_float_product_in_place_of_an_implicit_one_is_caught(monkeypatch):
    take_route("implicit", monkeypatch)

    def fallback(self, contraction, a, b, geometry, scales=None):
        return (a.data.float() @ b.data.float().t()) * scales.left * scales.right

    monkeypatch.setattr(implicit_route.Implicit, "run", fallback)
    model = nn.Sequential(nn.Linear(6, 4))
    convert(model)
    with torch.no_grad(), Products() as products:
        model(torch.randn(3, 6))
    with pytest.raises(AssertionError, match=r"not an INT8 product: .*aten::mm"):
        check_products(model, products.calls)


def test_the_depthwise_passes_are_int8_products_that_are_counted():
    pytest.importorskip("numba")
    torch.manual_seed(0)
    depthwise = (nn.Conv2d(8, 8, 3, stride, 1, groups=8) for stride in (1, 2))
    model = nn.Sequential(nn.Conv1d(6, 6, 5, 2, groups=6), nn.Unflatten(1, (2, 3)), nn.Conv2d(2, 8, 1), *depthwise)
    model.append(nn.Flatten())
    convert(model)
    calls = calls_of_step(model, torch.randn(2, 6, 11))
    names = [c.name.partition("::")[2] for c in calls]
    # The output, and grad_input by each of the residues that the strides leave; the images of the first need none.
    assert names.count("depthwise_conv") == 3 + 1 + 4
    assert names.count("depthwise_conv_grad_weight") == 3
    assert all(c.is_int8 for c in calls)
    assert all(n == {"output": 1, "grad_input": 1, "grad_weight": 1} for n in list(gemm_counts(model).values())[1:])


def test_a_float_convolution_in_place_of_the_direct_one_is_caught(monkeypatch):
    take_route("direct", monkeypatch)

    def fallback(data, weight, correlation, scales):
        y = F.conv2d(data.data.movedim(-1, 1).float(), weight.data.movedim(-1, 1).float(), padding=1)
        return y.movedim(1, -1) * scales.left * scales.right

    monkeypatch.setattr(direct_route, "_convolution", fallback)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten())
    convert(model)
    with pytest.raises(AssertionError, match=r"not an INT8 product.*convolution"):
        check_products(model, calls_of_step(model, torch.randn(2, 3, 9, 9)))


def test_shapes_of_the_three_products_of_a_linear_layer():
    model = nn.Sequential(nn.Linear(6, 5))
    convert(model)
    calls = calls_of_step(model, torch.randn(2, 7, 6, requires_grad=True))
    check_products(model, calls)
    shapes = [((14, 6), (6, 5)), ((14, 5), (5, 6)), ((5, 14), (14, 6))]
    assert [c.shapes for c in calls] == [s for s in shapes for _ in range(calls_per_count())]


def test_shapes_of_the_three_products_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), padding=1))
    convert(model)
    calls = calls_of_step(model, torch.randn(2, 3, 5, 6, requires_grad=True))
    check_products(model, calls)
    rows_in, rows_out, taps = 2 * 5 * 6, 2 * 5 * 7, 6
    shapes = [((rows_out, 3 * taps), (3 * taps, 4)), ((rows_in, 4 * taps), (4 * taps, 3))]
    shapes += [((4, rows_out), (rows_out, 3 * taps))]
    assert [c.shapes for c in calls] == [s for s in shapes for _ in range(calls_per_count())]


@pytest.mark.parametrize(("left", "right"), [(16, 8), (8, 16), (16, 16), (24, 16)])
def test_wide_operands_take_one_product_for_each_pair_of_planes(left, right):
    model = small_network()
    convert(model, recipe=recipe_of(left, right))
    check_products(model, calls_of_step(model, torch.randn(SMALL_INPUT)))
    pairs = (left // 8) * (right // 8)
    counts = gemm_counts(model)
    assert counts.pop("0") == {"output": pairs, "grad_input": 0, "grad_weight": pairs}
    assert all(n == pairs for of in counts.values() for n in of.values())


@pytest.mark.parametrize("affine", [False, True])
def test_without_vnni_each_product_is_two_of_half_the_range(affine, monkeypatch):
    spec = ContractionSpec(lhs=OperandSpec(affine=affine), rhs=OperandSpec(affine=affine))
    model, other = small_network(), small_network()
    for m in (model, other):
        convert(m, recipe=Recipe(name="plain", output=spec, grad_input=spec, grad_weight=spec))
    x = torch.randn(SMALL_INPUT)
    calls_of_step(other, x)
    monkeypatch.setattr(load("onednn")._gemm, "matmul", int_matmul.halves)
    calls = calls_of_step(model, x)
    assert len(calls) == 28
    check_products(model, calls)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_counts_grow_by_the_step_and_evaluation_counts_its_output():
    model = small_network()
    convert(model)
    x = torch.randn(SMALL_INPUT)
    for _ in range(2):
        calls_of_step(model, x)
    model.eval()
    with torch.no_grad(), Products() as products:
        model(x)
    assert [c.is_int8 for c in products.calls] == [True] * 5 * calls_per_count()
    assert gemm_counts(model)["10"] == {"output": 3, "grad_input": 2, "grad_weight": 2}


def test_autocast_does_not_bring_a_float_product_in():
    model = small_network()
    convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        calls = calls_of_step(model, torch.randn(SMALL_INPUT))
    check_products(model, calls)


def test_the_reference_backend_is_never_counted_as_int8():
    model = small_network()
    convert(model, backend="reference", recipe=recipe_of(16, 8))
    calls = calls_of_step(model, torch.randn(SMALL_INPUT))
    assert not any(c.name in INT8_PRODUCTS for c in calls)
    assert all(n == 0 for of in gemm_counts(model).values() for n in of.values())
    states = layer_states(model)
    assert [s.counts.of("output", "reference") for s in states] == [2] * 5
    assert [s.counts.of("output", "onednn") for s in states] == [0] * 5
    table = execution_table(states)
    assert re.search(r"total INT8 +0 +0 +0", table)
    assert "reference" in table
    with pytest.raises(AssertionError, match="not an INT8 product"):
        check_products(model, calls)


# --- Strides, dilation, groups: the work is what the geometry requires -----------------------------------------------

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 6)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "1x1 strided": (lambda: nn.Conv2d(3, 4, 1, stride=2), (2, 3, 8, 7)),
    "stride beyond the kernel": (lambda: nn.Conv2d(3, 4, 2, stride=3), (2, 3, 8, 7)),
    "dilated": (lambda: nn.Conv2d(3, 4, (3, 2), padding=2, dilation=(2, 3)), (2, 3, 9, 7)),
    "strided and dilated": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), padding=2, dilation=(3, 2)), (2, 3, 11, 12)),
    "1d": (lambda: nn.Conv1d(5, 4, 4, stride=3, padding=2), (3, 5, 17)),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 2, 3, 5, 6)),
    "wide groups": (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=2), (2, 32, 6, 5)),
    "narrow groups": (lambda: nn.Conv2d(12, 24, 3, padding=1, groups=3), (2, 12, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(20, 20, 3, padding=1, groups=20), (2, 20, 6, 5)),
    "depthwise strided": (lambda: nn.Conv2d(20, 40, 3, stride=2, padding=1, groups=20), (2, 20, 6, 5)),
}


def required_macs(layer, x, contraction):
    """Products of one channel of a group with another: one for each output and tap, or input and tap that meet."""
    pairs = []
    output = layer(x).shape[2:]
    dims = zip(x.shape[2:], output, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    for n_in, n_out, taps, stride, padding, dilation in dims:
        meetings = [(h, k) for h in range(n_in) for k in range(taps) if (h + padding - k * dilation) % stride == 0]
        pairs.append(len(meetings) if contraction == "grad_input" else n_out * taps)
    return len(x) * layer.in_channels * layer.out_channels // layer.groups * prod(pairs)


def calls_by_contraction(layer, x, monkeypatch):
    """Products of one step of one layer, by the contraction that executes them."""
    calls = {c: [] for c in CONTRACTIONS}
    scaled = onednn.OneDNN.scaled

    def recorded(self, contraction, *args):
        with Products() as products:
            result = scaled(self, contraction, *args)
        calls[contraction] += products.calls
        return result

    monkeypatch.setattr(onednn.OneDNN, "scaled", recorded)
    layer(x.requires_grad_()).sum().backward()
    return calls


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_do_the_work_that_their_geometry_requires(name, route, monkeypatch):
    take_route(route, monkeypatch)
    make, shape = CONVOLUTIONS[name]
    source, x = make(), torch.randn(shape)
    layer = nn.Sequential(source)
    required = {c: required_macs(source, x, c) for c in CONTRACTIONS}
    convert(layer)
    calls = calls_by_contraction(layer, x, monkeypatch)
    # Neighbouring narrow groups share one product, whose entries between groups are wasted on purpose.
    width = max(source.in_channels, source.out_channels) // source.groups
    merged = dict.fromkeys(CONTRACTIONS, min(source.groups, ceil(group_blocks.BLOCK_CHANNELS / width)))
    if route == "subpixel":
        # The classes of a strided grad_input share one window and one size, some of it filled with zeros on purpose.
        filled = (ceil(n / s) * s / n for n, s in zip(shape[2:], source.stride, strict=True))
        merged["grad_input"] *= subpixel_route.MOST_WASTE * prod(filled)
    for contraction in CONTRACTIONS:
        assert all(c.is_int8 for c in calls[contraction])
        macs = sum(c.macs for c in calls[contraction])
        assert required[contraction] <= macs <= required[contraction] * merged[contraction], contraction
    assert gemm_counts(layer)["0"] == {"output": 1, "grad_input": 1, "grad_weight": 1}


@pytest.mark.parametrize("name", ["plain", "strided", "depthwise"])
def test_a_batch_in_chunks_does_the_same_work_to_the_bit(name, monkeypatch):
    take_route("im2col", monkeypatch)
    make, shape = CONVOLUTIONS[name]
    x, gradients, work = torch.randn(5, *shape[1:]), [], []
    for column_bytes in (columns.COLUMN_BYTES, 1):
        torch.manual_seed(0)
        layer = nn.Sequential(make())
        convert(layer)
        with monkeypatch.context() as patch:
            patch.setattr(columns, "COLUMN_BYTES", column_bytes)
            calls = calls_by_contraction(layer, x.clone(), patch)
        gradients.append(layer[0].weight.grad)
        work.append({c: sum(call.macs for call in calls[c]) for c in calls})
    assert torch.equal(*gradients)
    assert work[0] == work[1]
    assert all(len(calls[c]) >= len(x) for c in CONTRACTIONS)


# --- One bit ---------------------------------------------------------------------------------------------------------


def quantizer_that_flips(plane, index, bit, kept):
    """The CPU backend's quantizer, but for one bit of one plane of the first tensor that it quantizes."""
    quantize = onednn.OneDNN.quantize

    def flipping(self, *args):
        q = quantize(self, *args)
        if not kept:
            q.planes[plane].data[index] ^= torch.tensor(1 << bit if bit < 7 else -128, dtype=torch.int8)
        kept.append(q)
        return q

    return flipping


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("plane", [0, 1])
def test_one_flipped_bit_changes_one_row_by_what_it_weighs(plane, bit, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)
    convert(layer, recipe=recipe_of(16, 8))
    with torch.no_grad():
        before, kept = layer(x), []
        monkeypatch.setattr(onednn.OneDNN, "quantize", quantizer_that_flips(plane, (2, 3), bit, kept))
        after = layer(x)
    qx, qw = kept
    assert torch.equal(torch.stack([before[i] for i in (0, 1, 3)]), torch.stack([after[i] for i in (0, 1, 3)]))
    digit = qx.planes[plane].data[2, 3].item()
    change = 2**bit if (digit >> bit) & 1 else -(2**bit)  # the digit is that of the flipped plane
    if bit == 7:
        change = -change
    weight = qw.planes[0].data[:, 3].double() * qw.planes[0].scale.double()
    expected = change * qx.planes[plane].scale.double() * weight
    rounding = 2.0**-22 * before.abs().max().double()
    torch.testing.assert_close(after[2].double() - before[2].double(), expected, atol=rounding, rtol=0)
    assert expected.abs().max() > rounding


def test_one_flipped_bit_reaches_the_windows_that_cover_it_and_the_gradient_of_their_taps(monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 7, 7)
    convert(layer)
    results = []
    for flip in (False, True):
        layer.zero_grad()
        with monkeypatch.context() as patch:
            if flip:
                patch.setattr(onednn.OneDNN, "quantize", quantizer_that_flips(0, (1, 4, 2, 0), 6, []))
            y = layer(x)
            y.backward(torch.ones_like(y))
        results.append((y.detach(), layer.weight.grad))
    changed = (results[0][0] != results[1][0]).any(1)
    assert changed.nonzero().tolist() == [[1, r, c] for r in (3, 4, 5) for c in (1, 2, 3)]
    difference = results[1][1] - results[0][1]
    assert not difference[:, 1:].any()
    # A gradient of ones makes every tap feel the bit alike: 64 integer steps.
    step = x.abs().max() / 127
    torch.testing.assert_close(difference[:, 0].abs(), torch.full((4, 3, 3), 64 * step.item()), rtol=1e-3, atol=0)


def test_a_plane_of_zeros_instead_of_the_weight_leaves_only_the_bias(monkeypatch):
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    convert(layer)
    quantize = onednn.OneDNN.quantize

    def zeroed(self, t, *args):
        q = quantize(self, t, *args)
        if t.shape == layer.weight.shape:
            q.planes[0].data.zero_()
        return q

    monkeypatch.setattr(onednn.OneDNN, "quantize", zeroed)
    assert torch.equal(layer(x), layer.bias.expand(4, 5))
    assert isinstance(layer, Int8Linear)
