"""The kernels as operators of torch: seen by name, traced by shape, and no host in between."""

import contextlib

import pytest
import torch
from kernel_cases import needs_compiler, random_plane
from machines import emulated
from test_gpu import INTERVAL, network
from test_mechanism import calls_of_step, check_products
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import convert
from lightning_int8.geometry import ConvGeometry
from lightning_int8.kernels import operators
from lightning_int8.rewrite import layer_states
from lightning_int8.spec import OperandSpec

pytestmark = needs_compiler

GEOMETRY = ConvGeometry(
    input_size=(5, 6), kernel_size=(3, 2), stride=(2, 1), padding=((1, 0), (0, 1)), dilation=(1, 2), groups=1
)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def planes(*shapes, affine=False):
    made = [random_plane(shape, affine=affine) for shape in shapes]
    fields = zip(*((p.data, p.scale, p.zero_point) for p in made), strict=True)
    (a, b), scales, zeros = fields
    return a, b, *scales, *zeros


def cases():
    """Arguments of each operator, the number of the machine aside."""
    x, key = torch.randn(2, 5, 6, 7), torch.tensor([1, 2, 3])
    one, channels = torch.tensor(2.0), torch.rand(7) + 1.0
    x_shape, w_shape, g_shape = (2, 5, 6, 7), (9, 3, 2, 7), (2, *GEOMETRY.output_size, 9)
    window = operators.packed(GEOMETRY)
    yield "quantize nearest", operators.cupy_quantize, (x, one, None, 8, False, None)
    yield "quantize channels", operators.cupy_quantize, (x.half(), torch.stack((channels, channels)), key, 24, True, -1)
    for affine in (False, True):
        for contraction, shapes in {
            "output": ((6, 20), (9, 20)),
            "grad_input": ((6, 9), (9, 20)),
            "grad_weight": ((6, 9), (6, 20)),
        }.items():
            scaled = not affine
            arguments = (contraction, *planes(*shapes, affine=affine), None, scaled)
            yield f"gemm {contraction} {affine}", operators.cupy_gemm, arguments
        for contraction, shapes in {
            "output": (x_shape, w_shape),
            "grad_input": (g_shape, w_shape),
            "grad_weight": (g_shape, x_shape),
        }.items():
            arguments = (contraction, *planes(*shapes, affine=affine), *window, None, not affine)
            yield f"convolution {contraction} {affine}", operators.cupy_convolution, arguments
    first = operators.cupy_gemm(*(("output", *planes((6, 20), (9, 20)), None, True, machine_number())))
    yield "gemm of a second plane", operators.cupy_gemm, ("output", *planes((6, 20), (9, 20)), first, True)
    for axis in (None, 0, -1):
        yield f"absmax {axis}", operators.cupy_absmax, (x, axis)
        clip_value = x.abs().amax([d for d in range(4) if axis is None or d != axis % 4])
        clips = torch.stack((clip_value, clip_value))
        yield f"error sums {axis}", operators.cupy_error_sums, (x, clips, [8, 16], False, axis)
    yield "histogram", operators.cupy_histogram, (x, x.abs().max())


def machine_number():
    return emulated("imma").backend._machine


@pytest.mark.parametrize(("operator", "arguments"), [pytest.param(o, a, id=name) for name, o, a in cases()])
def test_shapes_dtypes_and_schemas_are_as_declared(operator, arguments):
    torch.library.opcheck(operator, (*arguments, machine_number()), test_utils=CHECKS)


@pytest.mark.parametrize("fake", [True, False])
def test_a_wrong_declaration_would_be_seen(fake, monkeypatch):
    arguments = ("output", *planes((6, 20), (9, 20)), None, True, machine_number())
    if fake:
        monkeypatch.setattr(operators, "product_shape", lambda contraction, a, b: (b.shape[0], a.shape[0], 0))
    else:
        monkeypatch.setattr(operators, "gemm", lambda device, contraction, a, b, result: a.data)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(operators.cupy_gemm, arguments, test_utils=("test_schema", "test_faketensor"))


def test_geometries_survive_packing():
    for geometry in (
        GEOMETRY,
        ConvGeometry(
            input_size=(4, 5, 6),
            kernel_size=(1, 2, 3),
            stride=(1, 2, 3),
            padding=((0, 1), (2, 3), (4, 5)),
            dilation=(3, 2, 1),
            groups=2,
        ),
        ConvGeometry(input_size=(9,), kernel_size=(3,), stride=(2,), padding=((1, 1),), dilation=(1,), groups=4),
    ):
        assert operators.unpacked(*operators.packed(geometry)) == geometry


# --- whole steps ---------------------------------------------------------------------------------------------------


def converted(recipe, steps=5):
    """A converted network after ``steps`` steps (ranges are measured at steps 0, 1, 2, 4 and 8), and its step."""
    model = network()
    convert(model, recipe=recipe, backend="cupy")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(steps):
        step(torch.randn(4, 3, 6, 6))
    return model, step


@pytest.mark.parametrize("recipe", ["default", "fixed_point", "scalable", "wageubn"])
def test_the_products_of_a_step_are_int8_and_counted(recipe):
    model = network()
    convert(model, recipe=recipe, backend="cupy")
    with emulated("imma").chosen():
        calls = calls_of_step(model, torch.randn(4, 3, 6, 6))
    check_products(model, calls)
    assert {call.name for call in calls} == {"lightning_int8::cupy_convolution", "lightning_int8::cupy_gemm"}
    assert {backend for state in layer_states(model) for backend, _ in state.counts} == {"cupy"}


class OneDevice(TorchDispatchMode):
    """Fails where an operation has tensors of two devices, or moves one; a scalar on the CPU is a number."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, made))
        devices = {t.device.type for t in leaves if isinstance(t, torch.Tensor)}
        own = function.namespace == "lightning_int8"
        assert devices <= {"meta"} or not own, f"{function} has tensors on {devices}"
        assert len(devices) <= 1, f"{function} has tensors on {devices}"
        self.names.add(str(function))
        return made


@pytest.fixture
def no_autocast(monkeypatch):
    """torch has no autocast for its device without memory."""
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("recipe", ["default", INTERVAL], ids=lambda r: getattr(r, "name", r))
def test_a_step_between_refreshes_needs_nothing_of_the_host(recipe):
    """On torch's device without memory: there, whatever reads a value raises, `.item()`, `.cpu()` and `bool` alike."""
    with emulated("imma").chosen():
        model, step = converted(recipe)
        model.to("meta")
        x = torch.empty(4, 3, 6, 6, device="meta")
        step(x)  # keys and ranges follow the tensors
        with OneDevice() as mode:
            step(x)
    assert {f"lightning_int8.cupy_{n}.default" for n in ("quantize", "gemm", "convolution")} <= mode.names


def test_a_key_elsewhere_is_brought_to_the_tensor(monkeypatch):
    keys, quantize = [], operators.cupy_quantize
    monkeypatch.setattr(operators, "cupy_quantize", lambda *a: (keys.append(a[2]), quantize(*a))[1])
    x, clip_value = (torch.empty(size, device="meta") for size in ((4, 20), ()))
    spec = OperandSpec(rounding="stochastic")
    emulated("imma").backend.quantize(x, clip_value, spec, None, torch.tensor([1, 2, 3]))
    assert [key.device.type for key in keys] == ["meta"]


@pytest.mark.usefixtures("no_autocast")
def test_that_device_would_raise():
    with emulated("imma").chosen():
        model, step = converted("default")
        model.to("meta")
        for state in layer_states(model):
            for operand in state.distinct_operands():
                operand.clip_value = None
        with pytest.raises(RuntimeError, match="meta"):
            step(torch.empty(4, 3, 6, 6, device="meta"))


def test_a_forward_pass_can_be_traced_with_fake_tensors():
    with emulated("imma").chosen():
        model, _ = converted("default")
        model.eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            assert model(torch.empty(4, 3, 6, 6)).shape == (4, 5)
