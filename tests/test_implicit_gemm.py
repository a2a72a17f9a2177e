"""Our own INT8 product on the CPU: what it packs, what it sums, and the threads that it runs on."""

import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_int8.backends import int_matmul, onednn
from lightning_int8.backends.cpu import implicit_route, threads
from lightning_int8.backends.cpu.correlation import output_correlation
from lightning_int8.backends.cpu.gemm import Gemm
from lightning_int8.backends.cpu.im2col_route import Im2col
from lightning_int8.backends.cpu.passes import compiled_pass
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.form import FLOAT32, Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import LOWER_PLANE_MAX, Plane

panels, team = compiled_pass("panels"), compiled_pass("team")

# Not whether it is exact: where the instruction is, a kernel that is not must fail here and not be skipped.
RUNS = implicit_route.MICROKERNEL is not None and implicit_route.MICROKERNEL.is_available()

pytestmark = pytest.mark.skipif(not RUNS, reason="needs AVX512-VNNI and numba")

examples = settings(deadline=None, max_examples=60)


def bytes_of(shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


# --- What is packed --------------------------------------------------------------------------------------------------


@examples
@given(st.integers(1, 130), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.booleans())
def test_panels_hold_every_weight_where_the_product_reads_it(columns, rows, taps, channels, turned):
    weight = (
        bytes_of((channels, rows, taps, columns)).transpose(0, -1)
        if turned
        else bytes_of((columns, rows, taps, channels))
    )
    run = taps * channels
    packed = panels.of_weight(weight, rows, run)
    quads = -(-run // 4)
    by_column = (
        packed.view(np.int8).reshape(-1, rows, quads, 64, 4).transpose(0, 3, 1, 2, 4).reshape(-1, rows, quads * 4)
    )
    assert (by_column[:columns, :, :run] == weight.reshape(columns, rows, run).numpy()).all()
    assert not by_column[columns:].any()
    assert not by_column[:, :, run:].any()


@examples
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 7), st.integers(-1, 2), st.integers(-1, 2)), min_size=0, max_size=3),
    st.one_of(st.integers(1, 20), st.integers(60, 140)),
    st.integers(-127, 127),
    st.integers(1, 3),
)
def test_samples_are_padded_and_lie_four_by_four(samples, axes, channels, fill, stride):
    axes = [(n, lo, hi) for n, lo, hi in axes if n + lo + hi > 0 and n + min(lo, 0) + min(hi, 0) > 0]
    x, stride = bytes_of((samples, *(n for n, _, _ in axes), channels)), stride if axes else 1
    width = panels.slab_width(channels) if channels > 64 else channels
    packed = panels.of_samples(x, [(lo, hi) for _, lo, hi in axes], fill, width, stride)
    pads = [n for _, lo, hi in reversed(axes) for n in (lo, hi)]
    fours, slabs = -(-samples // 4), -(-channels // width)
    padded = torch.nn.functional.pad(x, (0, 0, *pads), value=fill)
    padded = torch.nn.functional.pad(padded, (0, 0) * (x.dim() - 1) + (0, -samples % 4))
    quads = packed.view(np.int8)[: -panels.LANES * 4]
    if axes:
        length = padded.shape[-2]
        places = -(-length // stride)
        got = quads.reshape(slabs, fours, -1, stride, places, width, 4).transpose(0, 1, 6, 2, 4, 3, 5)
        got = got.reshape(slabs, fours * 4, -1, places * stride, width)[:, :, :, :length]
    else:
        got = quads.reshape(slabs, fours, width, 4).transpose(0, 1, 3, 2)
        got = got.reshape(slabs, fours * 4, width)
    for slab in range(slabs):
        expected = padded[..., slab * width : (slab + 1) * width].numpy()
        own = got[slab, ..., : expected.shape[-1]]
        assert (own == expected.reshape(own.shape)).all()


# --- What is summed --------------------------------------------------------------------------------------------------


def test_it_is_exact_where_it_runs():
    assert implicit_route.is_exact()


LARGE = {
    "blocks of positions, a weight beyond the cache": ((3, 20, 20, 96), 384, 3, 1),
    "parts of channels, groups of panels": ((5, 9, 9, 130), 800, 3, 1),
    "positions of strided windows": ((4, 31, 30, 64), 65, 3, 2),
    "pieces of a product, the last one longer": ((1400, 96), 70, 1, 1),
    "pointwise": ((9, 17, 13, 68), 129, 1, 1),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_problems_are_exact(case):
    (batch, *size, channels), out_channels, taps, stride = LARGE[case]
    dims = len(size)
    geometry = ConvGeometry(
        input_size=tuple(size),
        kernel_size=(taps,) * dims,
        stride=(stride,) * dims,
        padding=((taps // 2, taps // 2),) * dims,
        dilation=(1,) * dims,
        groups=1,
    )
    one = torch.ones(())
    x = Plane(bytes_of((batch, *size, channels)), one, torch.tensor(-77, dtype=torch.int32))
    w = Plane(bytes_of((out_channels, *geometry.kernel_size, channels), 1), one)
    g = Plane(bytes_of((batch, *geometry.output_size, out_channels), 2), one)
    trusted, own = Im2col(Gemm(int_matmul.exact_matmul())), implicit_route.Implicit()
    left, right = torch.linspace(0.1, 0.9, out_channels), torch.tensor(0.37)
    biased = Form(torch.bfloat16, torch.linspace(-1e5, 1e5, out_channels))
    for contraction, a, b, scales in (
        ("output", x, w, Scales(right, left)),
        ("grad_input", g, w, Scales(right, right)),
        ("grad_weight", g, x, Scales(left, right)),
    ):
        for form in (None, FLOAT32, Form(torch.bfloat16), Form(torch.float16), biased):
            if form is biased and contraction != "output":
                continue
            own_scales = None if form is None else scales._replace(form=form)
            expected = trusted.run(contraction, a, b, geometry, own_scales)
            found = own.run(contraction, a, b, geometry, own_scales)
            assert torch.equal(found, expected if form is None else form.finish(expected)), (contraction, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (1, 1), (4, 3)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_moments_are_those_of_the_output(dtype, groups, kernel, pieces, monkeypatch):
    monkeypatch.setattr(threads, "ends", lambda count, _: [count * k // pieces for k in range(pieces + 1)])
    geometry = ConvGeometry(
        input_size=(9, 7),
        kernel_size=(kernel, kernel),
        stride=(1, 1),
        padding=((0, 1), (1, 1)),
        dilation=(1, 1),
        groups=groups,
    )
    one = torch.ones(())
    x, w = Plane(bytes_of((5, 9, 7, 16)), one), Plane(bytes_of((76, kernel, kernel, 16 // groups), 1), one)
    moments = torch.full((2, 76), torch.nan, dtype=torch.float64)
    form = Form(dtype, torch.linspace(-1e6, 1e6, 76), moments)
    scales = Scales(torch.tensor(0.37), torch.linspace(0.1, 0.9, 76), form)
    y = implicit_route.Implicit().run("output", x, w, geometry, scales)
    assert y.dtype == dtype
    values = y.flatten(0, -2).double()
    torch.testing.assert_close(moments[0], values.mean(0), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(moments[1], values.var(0, unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shapes", [((0, 64), (7, 64)), ((3, 0), (7, 0)), ((3, 4), (0, 4))])
def test_empty_products_are_left_to_another_route(shapes):
    x, w = (Plane(bytes_of(shape), torch.ones(())) for shape in shapes)
    assert not implicit_route.Implicit().supports("output", x, w, onednn._PRODUCT, False)
    sums = onednn.make().accumulate("output", x, w, None)
    assert torch.equal(sums.long(), x.data.long() @ w.data.long().t())


def test_expanded_weights_are_read_rightly():
    one = torch.ones(())
    x, w = bytes_of((5, 8)), bytes_of((8,), 1).expand(3, 8)
    sums = onednn.make().accumulate("output", Plane(x, one), Plane(w, one), None)
    assert torch.equal(sums.long(), x.long() @ w.long().t())


LONG = {
    "windows": ((11, 4, 5, 3), 5, (2, 2), 1, 1),
    "strided windows": ((6, 9, 11, 3), 7, (3, 3), 2, 1),
    "groups": ((5, 6, 6, 8), 6, (3, 3), 1, 2),
    "points": ((11, 4, 5, 3), 5, (1, 1), 1, 1),
    "products": ((137, 9), 5, (), 1, 1),
}


@pytest.mark.parametrize("zero", [None, -77])
@pytest.mark.parametrize("case", LONG)
def test_sums_beyond_int32_are_added_to_wider_ones(case, zero, monkeypatch):
    (batch, *size, channels), out_channels, kernel, stride, groups = LONG[case]
    geometry = ConvGeometry(
        input_size=tuple(size),
        kernel_size=kernel if size else (),
        stride=(stride,) * len(size),
        padding=((1, 0),) * len(size) if kernel == (3, 3) else ((0, 0),) * len(size),
        dilation=(1,) * len(size),
        groups=groups,
    )
    one = torch.ones(())
    g = Plane(bytes_of((batch, *geometry.output_size, out_channels)), one)
    x = Plane(bytes_of((batch, *size, channels), 1), one, None if zero is None else torch.tensor(zero).int())
    expected = Im2col(Gemm(int_matmul.exact_matmul())).run("grad_weight", g, x, geometry)
    for limit in (20, 49, 200):
        monkeypatch.setattr(implicit_route, "RAW_LIMIT", limit)
        monkeypatch.setattr(implicit_route, "CENTRED_LIMIT", limit)
        own = implicit_route.Implicit()
        assert own.supports("grad_weight", g, x, geometry, scaled=False) == (
            limit >= 4 * (1, *geometry.output_size)[-1]
        )
        if limit < 4 * (1, *geometry.output_size)[-1]:
            continue
        sums = own.run("grad_weight", g, x, geometry)
        is_long = batch * math.prod(geometry.output_size) > limit
        assert sums.dtype == (torch.int64 if is_long else torch.int32)
        assert torch.equal(sums.long(), expected.long())
        scales = Scales(torch.rand(out_channels), torch.tensor(0.3))
        scaled = own.run("grad_weight", g, x, geometry, scales)
        factors = scales.left.view(-1, *[1] * (expected.dim() - 1))
        assert torch.equal(scaled, expected.float() * factors * scales.right)


def test_sums_that_int32_does_not_hold_are_right():
    """All operands as large as can be, over more positions than int32 has room for."""
    geometry = ConvGeometry(
        input_size=(300, 450), kernel_size=(3, 3), stride=(1, 1), padding=((1, 1),) * 2, dilation=(1, 1), groups=1
    )
    one = torch.ones(())
    g, x = (Plane(torch.full((1, 300, 450, 3), -LOWER_PLANE_MAX, dtype=torch.int8), one) for _ in range(2))
    sums = implicit_route.Implicit().run("grad_weight", g, x, geometry)
    assert sums[0, 1, 1, 0] == 300 * 450 * LOWER_PLANE_MAX**2 > torch.iinfo(torch.int32).max
    assert sums[0, 0, 0, 0] == 299 * 449 * LOWER_PLANE_MAX**2


@examples
@given(
    st.integers(1, 9),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 9),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
)
def test_few_channels_share_panels(samples, kernel, channels, stride, padded):
    """Their windows are copied side by side where that fills panels better."""
    geometry = ConvGeometry(
        input_size=(9, 11),
        kernel_size=kernel,
        stride=stride,
        padding=((2, 1), (0, 2)) if padded else ((0, 0),) * 2,
        dilation=(1, 1),
        groups=1,
    )
    one = torch.ones(())
    g = Plane(bytes_of((samples, *geometry.output_size, 9)), one)
    x = Plane(bytes_of((samples, 9, 11, channels), 1), one, torch.tensor(-5, dtype=torch.int32))
    sums = implicit_route.Implicit().run("grad_weight", g, x, geometry)
    assert torch.equal(sums, Im2col(Gemm(int_matmul.exact_matmul())).run("grad_weight", g, x, geometry))


def test_windows_of_a_first_layer_fill_whole_panels():
    geometry = ConvGeometry(
        input_size=(20, 20), kernel_size=(7, 7), stride=(2, 2), padding=((3, 3),) * 2, dilation=(1, 1), groups=1
    )
    windows = implicit_route.GRADIENT._windows(output_correlation(geometry), (4, 20, 20, 3), 0, 3)
    assert len(windows.runs) == 7, "a run of 21 columns for each row of taps"
    assert windows.table[:, 1].tolist() == [64, 64, 147 - 2 * 64]


@pytest.mark.slow
def test_a_cpu_that_the_user_names_gets_no_instructions_of_this_one():
    code = "from lightning_int8.backends.cpu import implicit_route; print(implicit_route.is_exact())"
    env = os.environ | {"NUMBA_CPU_NAME": "haswell"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_operators_have_fakes():
    g, x, w = bytes_of((2, 3, 3, 6)), bytes_of((2, 3, 3, 5)), bytes_of((6, 3, 3, 5))
    numbers = [3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    scales = [torch.tensor(0.3), torch.tensor(0.2)]
    for contraction, a, b in (("output", x, w), ("grad_input", g, w), ("grad_weight", g, x)):
        for how in (([], torch.int32), (scales, torch.float32), (scales, torch.bfloat16)):
            bias = moments = None
            if contraction == "output" and how[0]:
                bias, moments = torch.ones(6), torch.full((2, 6), torch.nan, dtype=torch.float64)
            arguments = contraction, a, b, numbers, None, *how, bias, moments
            operator = torch.ops.lightning_int8.implicit_conv
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# --- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["of the runtime", "of our own"])
def kind_of_threads(request, four_threads, monkeypatch):
    if request.param == "of our own":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime here")
    return request.param


@pytest.fixture
def default_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin without
    yield
    signal.signal(signal.SIGINT, before)


def split_until_interrupted(delay):
    threading.Timer(delay, signal.raise_signal, (signal.SIGINT,)).start()
    while True:
        threads.split(lambda a, b: sum(range(100)), 4, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01])
def test_an_interrupt_is_an_interrupt(delay, four_threads, default_interrupts):
    """Wherever it strikes: in the work, or before the first line of a thread's own code."""
    if threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime here")
    with pytest.raises(KeyboardInterrupt):
        split_until_interrupted(delay)


def test_pieces_cover_the_range_once_and_in_order(kind_of_threads):
    for count in (1, 3, 4, 5, 1000):
        assert [n for piece in threads.split(lambda a, b: list(range(a, b)), count, 1) for n in piece] == list(
            range(count)
        )


def test_pieces_run_on_several_threads_at_once(kind_of_threads):
    together = threading.Barrier(4, timeout=30)
    seen = threads.split(lambda a, b: (together.wait(), threading.get_ident())[1], 4, 1)
    assert len(set(seen)) == 4


def test_an_error_in_a_piece_is_raised(kind_of_threads):
    def work(start, stop):
        if start > 0:
            raise ValueError(f"piece {start}")
        return start

    with pytest.raises(ValueError, match=r"piece [1-3]"):
        threads.split(work, 4, 1)
    assert threads.split(lambda a, b: b - a, 8, 1) == [2, 2, 2, 2]


def test_a_team_smaller_than_asked_for_does_all_the_work(four_threads):
    if threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime here")
    # Inside a parallel region a team is one thread.
    inner = threads.split(lambda a, b: threads.split(lambda c, d: list(range(c, d)), 8, 1), 4, 1)
    assert inner == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 4


def exit_code_of_child(passes):
    child = os.fork()
    if child == 0:
        os._exit(0 if passes() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_has_threads_too(four_threads):
    threads.split(lambda a, b: b - a, 8, 1)
    assert exit_code_of_child(lambda: threads.split(lambda a, b: b - a, 8, 1) == [2, 2, 2, 2]) == 0


# --- Compiled passes on threads --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def add_up():
    """A compiled pass that sums squares, ``(values, out)``; it returns how many, and fails at what is negative."""
    import numba

    @numba.njit(nogil=True, error_model="numpy")
    def kernel(values, out, first, last, piece):
        out[piece] = 0
        for k in range(first, last):
            if values[k] < 0:
                raise ValueError("negative")
            out[piece] += values[k] * values[k]
        return np.int32(last - first)

    in_team = team.in_team(kernel)

    @numba.njit(nogil=True)
    def entry(arguments, ends, results, runtime):
        in_team(arguments, ends, results, runtime)

    return entry


def sums_of_squares(entry, values):
    ends = threads.ends(len(values), 1)
    out = np.full(len(ends) - 1, np.nan)
    counts = team.run(entry, (values, out), ends)
    assert counts.tolist() == np.diff(ends).tolist()
    return out.tolist()


def test_compiled_pieces_cover_the_range_once_and_in_order(kind_of_threads, add_up):
    assert sums_of_squares(add_up, np.arange(1.0)) == [0]
    assert sums_of_squares(add_up, np.arange(3.0)) == [0, 1, 4]
    assert sums_of_squares(add_up, np.arange(8.0)) == [1, 13, 41, 85]


def test_a_failure_in_a_compiled_piece_is_raised(kind_of_threads, add_up):
    with pytest.raises(MemoryError, match="compiled pass"):
        sums_of_squares(add_up, np.array([0.0, 1.0, 2.0, -3.0]))
    assert sums_of_squares(add_up, np.arange(4.0)) == [0, 1, 4, 9]


def test_a_compiled_pass_inside_a_parallel_region_does_all_its_work(four_threads, add_up):
    if threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime here")
    inner = threads.split(lambda a, b: sums_of_squares(add_up, np.arange(8.0)), 4, 1)
    assert inner == [[1, 13, 41, 85]] * 4


def test_a_compiled_pass_runs_in_a_forked_process_too(four_threads, add_up):
    assert sums_of_squares(add_up, np.arange(8.0)) == [1, 13, 41, 85]
    assert exit_code_of_child(lambda: sums_of_squares(add_up, np.arange(8.0)) == [1, 13, 41, 85]) == 0


def test_compiled_pieces_run_on_several_threads_without_the_interpreter(four_threads):
    if threads._openmp() is None:
        pytest.skip("torch has no OpenMP runtime here")
    import numba

    number_of_thread = threads._openmp().omp_get_thread_num
    number_of_thread.argtypes = []

    @numba.njit
    def kernel(first, last, piece):
        return np.int32(number_of_thread())

    in_team = team.in_team(kernel)

    @numba.njit  # keeps the interpreter's lock: whoever asked for it would wait for ever
    def entry(arguments, ends, results, runtime):
        in_team(arguments, ends, results, runtime)

    assert team.run(entry, (), [0, 1, 2, 3, 4]).tolist() == [0, 1, 2, 3]


# --- Both ------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_threads(four_threads):
    backend = onednn.OneDNN(int_matmul.exact_matmul(), only="implicit")
    geometry = ConvGeometry(
        input_size=(40, 40), kernel_size=(3, 3), stride=(1, 1), padding=((1, 1),) * 2, dilation=(1, 1), groups=1
    )
    one = torch.ones(())
    x, w, g = (Plane(bytes_of(s, n), one) for n, s in enumerate([(5, 40, 40, 70), (66, 3, 3, 70), (5, 40, 40, 66)]))
    cases = [("output", x, w), ("grad_input", g, w), ("grad_weight", g, x)]
    parallel = [backend.accumulate(*case, geometry) for case in cases]
    torch.set_num_threads(1)
    assert all(torch.equal(y, backend.accumulate(*case, geometry)) for y, case in zip(parallel, cases, strict=True))
