"""The choice between exact routes: it is timed, checked, remembered, and never shows in a result."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import pytest
import torch

from lightning_int8.backends import im2col, int_matmul, onednn
from lightning_int8.backends.cpu import choice, choice_file, columns, depthwise_route, direct_route, gemm
from lightning_int8.backends.cpu.choice import Choice
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.backends.cpu.gemm import Gemm
from lightning_int8.backends.cpu.im2col_route import Im2col
from lightning_int8.backends.cpu.route import Scales
from lightning_int8.backends.form import Form
from lightning_int8.geometry import ConvGeometry
from lightning_int8.numerics import Plane


def geometry_of(size, kernel=3, stride=1, groups=1):
    return ConvGeometry(
        input_size=(size, size),
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=((kernel // 2, kernel // 2),) * 2,
        dilation=(1, 1),
        groups=groups,
    )


def problem(size=20, batch=2, stride=1):
    """An output of 16 channels, large enough to be timed."""
    x = torch.randint(-127, 128, (batch, size, size, 16), dtype=torch.int8)
    w = torch.randint(-127, 128, (16, 3, 3, 16), dtype=torch.int8)
    scales = Scales(torch.tensor(0.3), torch.rand(16))
    return "output", Plane(x, scales.left), Plane(w, scales.right), geometry_of(size, stride=stride), scales


class Slow(Im2col):
    """Right, and slow."""

    name = "slow"
    calls = 0

    def correlate(self, *args):
        type(self).calls += 1
        time.sleep(0.02)
        return super().correlate(*args)


class Wrong(Im2col):
    """Fast, but for one element of one unit in the last place."""

    name = "wrong"

    def correlate(self, *args):
        y = super().correlate(*args)
        y[-1, -1, -1, -1] = torch.nextafter(y[-1, -1, -1, -1], torch.tensor(torch.inf))
        return y


class Exchanged(Im2col):
    """Fast, but for the order in which it applies two scales."""

    name = "exchanged"

    def correlate(self, data, weight, correlation, scales):
        return super().correlate(data, weight, correlation, Scales(scales.right, scales.left))


class Biasless(Im2col):
    """Fast, and says that it finishes, but forgets the bias."""

    name = "biasless"
    finishes = True


@pytest.fixture
def trusted():
    return Im2col(Gemm(int_matmul.exact_matmul()))


@pytest.fixture
def file(tmp_path):
    return ChoiceFile(tmp_path / "folder" / "routes.json")


def slow():
    Slow.calls = 0
    return Slow(Gemm(int_matmul.exact_matmul()))


# --- Timing ----------------------------------------------------------------------------------------------------------


def test_the_fastest_route_is_taken_whatever_the_order(trusted, file):
    for routes in ([slow(), trusted], [trusted, slow()]):
        assert Choice(routes, trusted, ChoiceFile(file.path.with_name(routes[0].name))).pick(*problem()) is trusted


def test_a_problem_is_timed_once(trusted, file):
    chosen = Choice([slow(), trusted], trusted, file)
    case = problem()
    first = chosen.run(*case)
    timed = Slow.calls
    assert timed == 1 + choice.REPEATS  # one to check it, the rest to time it
    assert torch.equal(chosen.run(*case), first)
    assert Slow.calls == timed


def test_a_small_problem_is_not_timed(trusted, file):
    contraction, x, w, _, scales = problem()
    small = Plane(x.data[:1, :3, :3].contiguous(), x.scale)
    assert Choice([trusted, slow()], trusted, file).pick(contraction, small, w, geometry_of(3), scales) is trusted
    assert Slow.calls == 0
    assert not file.path.exists()


def test_inputs_of_ever_new_sizes_are_not_timed_for_ever(trusted, file):
    chosen = Choice([slow(), trusted], trusted, file)
    for size in range(20, 20 + choice.SHAPES_TIMED):
        chosen.pick(*problem(size))
    timed = Slow.calls
    assert chosen.pick(*problem(60)) is trusted
    assert Slow.calls == timed == choice.SHAPES_TIMED * (1 + choice.REPEATS)


def test_a_route_that_exchanges_two_equal_scales_is_found_out(trusted, file):
    contraction, x, w, geometry, _ = problem()
    same = Scales(torch.tensor(0.5), torch.tensor(0.5))
    chosen = Choice([Exchanged(Gemm(int_matmul.exact_matmul())), trusted], trusted, file)
    with pytest.warns(UserWarning, match="route 'exchanged' is not exact for output of"):
        assert chosen.pick(contraction, x, w, geometry, same) is trusted


def test_an_inexact_route_is_found_out_and_not_used(trusted, file):
    chosen = Choice([Wrong(Gemm(int_matmul.exact_matmul())), trusted], trusted, file)
    with pytest.warns(UserWarning, match="route 'wrong' is not exact for output of"):
        assert chosen.pick(*problem()) is trusted


def test_the_backend_takes_the_direct_convolution_only_where_it_is_exact():
    routes = onednn.OneDNN(int_matmul.exact_matmul())._choice
    case = problem()
    route = next(r for r in routes.routes if r.name == "direct")
    assert route.supports(*case[:4], True) == direct_route.is_exact()
    assert routes.pick(*case).name in ("im2col", "direct", "implicit")
    wide = replace(case[3], dilation=(2, 2))
    assert not route.supports(*case[:3], wide, True)


def test_a_route_that_forgets_the_bias_is_found_out(trusted, file):
    *case, scales = problem()
    biasless = Biasless(Gemm(int_matmul.exact_matmul()))
    chosen = Choice([biasless, trusted], trusted, file)
    chosen.pick(*case, scales)  # without a bias it is right, and that must not vouch for it
    with pytest.warns(UserWarning, match="'biasless' is not exact"):
        assert chosen.pick(*case, scales._replace(form=Form(bias=torch.rand(16)))) is trusted


# --- The file --------------------------------------------------------------------------------------------------------


def test_a_choice_is_remembered_by_the_next_process(trusted, file, monkeypatch):
    case = problem()
    Choice([slow(), trusted], trusted, file).pick(*case)
    monkeypatch.setattr(choice, "fastest", None)  # timing would now fail
    assert Choice([slow(), trusted], trusted, ChoiceFile(file.path)).pick(*case) is trusted
    with pytest.raises(TypeError):
        Choice([slow(), trusted], trusted, ChoiceFile(file.path)).pick(*problem(size=25))


@pytest.mark.parametrize("other", ["machine", "threads"])
def test_a_choice_holds_for_its_machine_and_its_threads(other, trusted, file, monkeypatch):
    case = problem()
    Choice([slow(), trusted], trusted, file).pick(*case)
    if other == "machine":
        monkeypatch.setattr(choice_file, "machine", lambda: "another CPU")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(choice, "fastest", None)
    with pytest.raises(TypeError):
        Choice([slow(), trusted], trusted, ChoiceFile(file.path)).pick(*case)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 0, "machines": {}}',
        '{"format": 1}',
        '{"format": 1, "machines": {"MACHINE": 3}}',
    ],
)
def test_a_corrupt_file_is_read_as_empty_and_replaced(content, file):
    file.path.parent.mkdir(parents=True)
    file.path.write_text(content.replace("MACHINE", choice_file.machine()))
    assert file.get("a") is None
    file.put("a", "im2col")
    assert ChoiceFile(file.path).get("a") == "im2col"


def test_an_unknown_route_in_the_file_is_timed_anew(trusted, file):
    case = problem()
    Choice([slow(), trusted], trusted, file).pick(*case)
    file.path.write_text(file.path.read_text().replace('"im2col"', '"of a later version"'))
    assert Choice([slow(), trusted], trusted, ChoiceFile(file.path)).pick(*case) is trusted


def test_where_nothing_can_be_written_nothing_is_remembered(trusted, tmp_path):
    (tmp_path / "a file").write_text("")
    file = ChoiceFile(tmp_path / "a file" / "routes.json")
    assert Choice([slow(), trusted], trusted, file).pick(*problem()) is trusted
    assert ChoiceFile(file.path).get("a") is None


def test_entries_of_other_processes_and_machines_are_kept(file, monkeypatch):
    first, second = ChoiceFile(file.path), ChoiceFile(file.path)
    assert first.get("a") is second.get("a") is None
    first.put("a", "im2col")
    with monkeypatch.context() as patch:
        patch.setattr(choice_file, "machine", lambda: "another CPU")
        ChoiceFile(file.path).put("a", "direct")
    second.put("b", "direct")
    found = ChoiceFile(file.path)
    assert (found.get("a"), found.get("b")) == ("im2col", "direct")
    assert list(file.path.parent.iterdir()) == [file.path]  # no unfinished file is left


def test_the_file_does_not_grow_without_end(file, monkeypatch):
    monkeypatch.setattr(choice_file, "_MOST_ENTRIES", 3)
    for k in range(10):
        file.put(str(k), "im2col")
    entries = json.loads(file.path.read_text())["machines"][choice_file.machine()]
    assert "9" in entries
    assert len(entries) <= 3


def test_the_file_lies_in_the_cache_directory_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ChoiceFile().path == tmp_path / "lightning_int8" / "routes.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ChoiceFile().path == tmp_path / ".cache" / "lightning_int8" / "routes.json"


@pytest.mark.slow
def test_processes_that_write_at_once_leave_a_whole_file(file):
    code = """
import sys
from pathlib import Path
from lightning_int8.backends.cpu.choice_file import ChoiceFile
for k in range(40):
    ChoiceFile(Path(sys.argv[1])).put(f"{sys.argv[2]} {k}", "im2col")
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, str(file.path), name]) for name in ("a", "b")]
    while any(run.poll() is None for run in runs):
        if file.path.exists():
            json.loads(file.path.read_text())
    assert [run.returncode for run in runs] == [0, 0]
    assert "im2col" in (file.get("a 39"), file.get("b 39"))


# --- Instruction sets, threads, no numba -----------------------------------------------------------------------------


@pytest.mark.slow
def test_without_vnni_the_direct_convolution_is_not_used():
    code = "from lightning_int8.backends.cpu import direct_route; print(direct_route.is_exact())"
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def results(route):
    """All that a route computes of some problems, pointwise and strided ones among them."""
    torch.manual_seed(0)
    backend = onednn.OneDNN(int_matmul.exact_matmul(), only=route)
    c, per_group, co = (40, 1, 40) if route == "depthwise" else (24, 24, 40)
    groups, found = c // per_group, []
    for size, *windows in ((33, 3, 1), (33, 1, 1), (33, 1, 2), (34, 3, 2)):
        geometry = geometry_of(size, *windows, groups)
        x = Plane(torch.randint(-127, 128, (5, *geometry.input_size, c), dtype=torch.int8), torch.tensor(0.3))
        w = Plane(torch.randint(-127, 128, (co, *geometry.kernel_size, per_group), dtype=torch.int8), torch.rand(co))
        g = Plane(torch.randint(-127, 128, (5, *geometry.output_size, co), dtype=torch.int8), torch.tensor(0.3))
        run = backend._choice.run
        found += [run("output", x, w, geometry, Scales(x.scale, w.scale)), run("output", x, w, geometry)]
        found += [run("grad_input", g, w, geometry, Scales(g.scale, x.scale)), run("grad_weight", g, x, geometry)]
    return found


@pytest.mark.parametrize("route", ["im2col", "direct", "subpixel", "depthwise"])
def test_results_are_no_views(route):
    """A module that changes its input in place would be refused by autograd."""
    assert not any(r._is_view() for r in results(route) if r.dtype == torch.float32)


@pytest.mark.parametrize("route", ["im2col", "direct", "subpixel", "depthwise"])
def test_threads_share_the_work_and_change_nothing(route):
    expected = results(route)
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(route), expected, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("route", ["im2col", "direct", "subpixel", "depthwise"])
def test_without_numba_the_results_are_the_same(route, monkeypatch):
    expected = results(route)
    passes = [(columns, "GATHER"), (columns, "BORDER"), (gemm, "SCALE"), (direct_route, "BORDER")]
    passes.append((depthwise_route, "DEPTHWISE"))
    for module, name in passes:
        assert getattr(module, name) is not None
        monkeypatch.setattr(module, name, None)
    assert all(torch.equal(a, b) for a, b in zip(results(route), expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 6, 3), (2, 3, 4, 5, 2)])
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_compiled_padding_is_the_plain_one(shape, unsigned):
    data = torch.randint(-128, 128, shape, dtype=torch.int8)
    one_axis = [(0, 0), (1, 2), (-1, 0), (0, -2), (-1, 3), (2, -1), (-2, -1)]
    for padding, fill in product(product(one_axis, repeat=len(shape) - 2), (0, -7)):
        expected = im2col.pad(data, padding, torch.tensor(fill, dtype=torch.int32), slack=64)
        found = columns.BORDER.pad(data, padding, fill, unsigned, slack=64)
        assert torch.equal(found.int() - 128 * unsigned, expected.int())


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_a_depthwise_gradient_over_many_rows_does_not_overflow(rows):
    depthwise = depthwise_route.DEPTHWISE
    g = torch.full((rows, 8), -128, dtype=torch.int8)
    data, starts = torch.full((64,), -128, dtype=torch.int8), torch.zeros(rows, dtype=torch.int64)
    taps = torch.tensor([0, 1])
    sums = depthwise.grad_weight(data.numpy(), starts.numpy(), taps.numpy(), g.numpy(), 4, 4)
    assert (torch.from_numpy(sums) == 2 * rows * 128 * 128).all()
    many = 40_000  # times four blocks of a row: 160,000 products, beyond what int32 holds
    g, starts = torch.full((many, 16), -128, dtype=torch.int8), torch.zeros(many, dtype=torch.int64)
    sums = depthwise.grad_weight(data.numpy(), starts.numpy(), taps.numpy(), g.numpy(), 4, gemm.RAW_LIMIT)
    assert (torch.from_numpy(sums) == 4 * many * 128 * 128).all()


@pytest.mark.parametrize("run", [1, 2, 3, 5, 8, 9, 16, 31, 33, 64, 65, 130])
@pytest.mark.parametrize("runs", [1, 2])
def test_gathered_rows_are_whole_and_nothing_is_written_behind_them(run, runs):
    gather = columns.GATHER
    source = torch.randint(-127, 128, (4000 + gather.WIDEST_COPY,), dtype=torch.int8)
    origins, offsets = torch.tensor([0, 7, 300]), torch.tensor([5, 400][:runs])
    count = 2 * len(origins) * runs * run
    out = torch.full((count + gather.WIDEST_COPY,), 99, dtype=torch.int8)
    gather.gather_rows(source.numpy(), 2000, origins.numpy(), offsets.numpy(), run, slice(0, 2), out.numpy())
    starts = [n * 2000 + p + o for n in range(2) for p in origins.tolist() for o in offsets.tolist()]
    assert torch.equal(out[:count], torch.cat([source[s : s + run] for s in starts]))
    assert (out[count:] == 99).all()


def test_a_gradient_that_no_tap_reaches_is_zero_by_every_route():
    """A 1x1 window at stride 3 that begins in the padding never comes to an input of two rows."""
    geometry = ConvGeometry(
        input_size=(2, 2), kernel_size=(1, 1), stride=(3, 1), padding=((1, 1), (0, 0)), dilation=(1, 1), groups=1
    )
    g = Plane(torch.ones(1, *geometry.output_size, 1, dtype=torch.int8), torch.tensor(1.0))
    w = Plane(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.tensor(1.0))
    for route in ("im2col", "direct", "subpixel", "depthwise"):
        found = onednn.OneDNN(int_matmul.exact_matmul(), only=route).accumulate("grad_input", g, w, geometry)
        assert not found.any()
        assert found.shape == (1, 2, 2, 1)
