"""``layers="auto"``: what is timed, what follows from the times, and that a decision is made once.

Where a decision matters, times are given (``set_times``): what is tested then is all that surrounds the clock.
"""

import copy
import json
import time

import pytest
import torch
from conftest import Digits, network, same, snapshot
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import (
    ContractionSpec,
    Int8Precision,
    OperandSpec,
    Recipe,
    comparison,
    convert,
    fabric,
    gemm_counts,
    recipes,
)
from lightning_int8.backends.base import Backend
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.layer_call import LayerCall
from lightning_int8.layer_times import MARGIN, LayerTimes
from lightning_int8.optim import FixedPointSGD
from lightning_int8.policies import BitWidthRule
from lightning_int8.ranges import absmax
from lightning_int8.report import current
from lightning_int8.rewrite import conversion_of, layer_states

STEPS = 3


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path):
    """Nothing is remembered from test to test."""
    monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(tmp_path / "layers.json"))


@pytest.fixture
def set_times(monkeypatch):
    """Give each comparison its times (INT8, float), in the order of the model; a list of those made comes back."""

    def set_to(*seconds):
        made, remaining = [], list(seconds)

        def shortest(int8, float_, device):
            made.append((int8, float_))
            return remaining.pop(0) if len(remaining) > 1 else remaining[0]

        monkeypatch.setattr(comparison, "shortest", shortest)
        return made

    return set_to


@pytest.fixture
def nothing_is_timed(monkeypatch):
    monkeypatch.setattr(comparison, "shortest", None)


WINS, LOSES = (1.0, 2.0), (2.1, 1.6)


def optimizer_of(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


def train(model, steps=STEPS, optimizer=None, samples=8):
    optimizer = optimizer or optimizer_of(model)
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()


def rows(model):
    return {row.name: row for row in current(conversion_of(model).report, model).rows}


def kept_float(model):
    return [s.name for s in layer_states(model) if s.kept_float]


# --- What follows from the times -------------------------------------------------------------------------------------


def test_a_layer_that_float_computes_faster_is_float_from_the_second_step_on(set_times):
    model = network()
    set_times((0.001, 0.0026), (0.0021, 0.0016), (0.00104, 0.001))
    convert(model, layers="auto")
    assert conversion_of(model).report.converted == ["0", "4", "5"]
    train(model)
    assert {name: count["output"] for name, count in gemm_counts(model).items()} == {"0": STEPS, "4": 1, "5": STEPS}
    row = rows(model)["4"]
    assert (row.decision, row.route, row.gain) == ("float", "", "")
    assert row.reason == "INT8 would take 1.31 times as long (2.1 against 1.6 ms)"
    assert rows(model)["0"].gain == "2.60 times as fast as float (1.0 against 2.6 ms)"
    assert rows(model)["5"].gain == "0.96 times as fast as float (1.0 against 1.0 ms)"
    x = torch.randn(2, 512)
    assert torch.equal(model[4](x), nn.functional.linear(x, model[4].weight, model[4].bias))


seconds = st.floats(1e-6, 10)


@given(seconds, seconds)
def test_a_tie_stays_int8_and_a_reason_has_both_times(int8, float_):
    times = LayerTimes(int8_seconds=int8, float_seconds=float_, backend="onednn", integer=True)
    assert times.float_wins == bool(times.reason) == (int8 / float_ > MARGIN or int8 > MARGIN * float_)
    assert not LayerTimes(int8_seconds=MARGIN, float_seconds=1.0, backend="onednn", integer=True).float_wins
    if times.float_wins:
        ratio, both = times.reason.removeprefix("INT8 would take ").split(" times as long ")
        assert float(ratio) == pytest.approx(int8 / float_, abs=0.006)
        assert [float(t) for t in both[1:-4].split(" against ")] == pytest.approx([1e3 * int8, 1e3 * float_], rel=0.06)


def test_what_is_no_int8_is_not_called_so():
    slow = LayerTimes(int8_seconds=2.0, float_seconds=1.0, backend="reference", integer=False)
    assert slow.reason.startswith("backend 'reference' would take 2.00 times")


def test_a_layer_kept_float_takes_whole_steps(set_times):
    recipe, made = recipes.get("unified"), set_times(LOSES)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    convert(model, recipe, layers="auto")
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
    middle = layer_states(model)[1]
    assert middle.operands["grad_weight.lhs"].distance is not None
    assert middle.factor == 1.0
    assert [rows(model)[n].reason.split(":")[0] for n in "02"] == ["keep_float", "keep_float"]
    assert [s.times is None for s in layer_states(model)] == [True, False, True]
    assert len(made) == 1
    assert kept_float(model) == ["0", "1", "2"]


def test_that_nothing_is_left_to_int8_is_said(set_times):
    set_times(LOSES)
    model = network()
    convert(model, layers="auto")
    with pytest.warns(UserWarning, match="every layer is faster in float on this machine; nothing runs INT8"):
        train(model)


def test_choosing_int8_changes_nothing(set_times):
    """Neither weights nor gradients, ranges, counts or anybody's random numbers."""
    made = set_times(WINS)
    ends = []
    for layers in ("int8", "auto"):
        model = network()
        convert(model, layers=layers, refresh=2)
        torch.manual_seed(1)
        train(model)
        operands = [o.state_dict() for s in layer_states(model) for o in s.distinct_operands()]
        grads = [p.grad for p in model.parameters()]
        ends.append([snapshot(model), grads, operands, gemm_counts(model), torch.get_rng_state()])
    assert len(made) == 3
    assert same(*ends)


def test_without_auto_nothing_is_timed_and_routes_are_shown(nothing_is_timed):
    model = network()
    report = convert(model)
    assert "fastest of" in report.rows[0].route
    train(model, samples=64)
    row = rows(model)["0"]
    assert row.gain == ""
    routes = dict(part.split(" by ") for part in row.route.removeprefix("onednn: ").split(", "))
    assert list(routes) == ["output", "grad_weight"]  # the first layer's input needs no gradient
    assert set(routes.values()) <= {"im2col", "direct", "depthwise", "subpixel", "implicit"}


def test_the_report_shows_the_routes_of_training():
    """Not those of an evaluation before it; a depthwise convolution has a route of its own."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 2))
    convert(model)
    with torch.no_grad():
        model.eval()(torch.randn(2, 1, 8, 8))
    layer_states(model)[1].counts.routes["output"] = "another"  # as may be fastest for so few samples
    train(model.train())
    assert rows(model)["1"].route == "onednn: output by depthwise, grad_input by depthwise, grad_weight by depthwise"
    assert rows(model)["3"].route == "onednn: output by im2col, grad_input by im2col, grad_weight by im2col"


# --- What is timed ---------------------------------------------------------------------------------------------------


def sleeping(function):
    """A function that takes 50 ms longer."""
    return lambda *arguments: time.sleep(0.05) or function(*arguments)


@pytest.mark.filterwarnings("ignore:layers='auto'")
@pytest.mark.parametrize("slow", ["int8", "float"])
def test_the_slower_way_is_found_by_the_clock(slow, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, layers="auto")
    owner, name = (Backend, "_contract") if slow == "int8" else (nn.functional, "linear")
    monkeypatch.setattr(owner, name, sleeping(getattr(owner, name)))
    train_linear(model, 1)
    (state,) = layer_states(model)
    assert bool(state.kept_float) == (slow == "int8")
    slept = {"int8": state.times.int8_seconds, "float": state.times.float_seconds}
    assert slept[slow] >= (0.1 if slow == "int8" else 0.05)  # output and grad_weight, or the forward pass
    assert min(slept.values()) < 0.05


class Operators(TorchDispatchMode):
    """Names and dtypes of the products that run inside."""

    NAMES = ("_int_mm", "qconv_prepack", "convolution", "convolution_backward", "mm", "addmm", "depthwise_conv")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in self.NAMES:
            self.seen.append((name, next(a.dtype for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **kwargs or {})


def products(run):
    with Operators() as operators:
        run()
    return operators.seen


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_one_way_multiplies_integers_and_the_other_floats(set_times, autocast):
    made = set_times(WINS)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 4)).to(memory_format=torch.channels_last)
    convert(model, layers="auto")
    optimizer = optimizer_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        y = model(torch.randn(8, 1, 8, 8))
    y.float().sum().backward()
    optimizer.step()
    floats = autocast or torch.float32
    (conv, conv_float), (linear, linear_float) = made
    assert products(conv) == [("_int_mm", torch.int8)] * 2
    assert products(conv_float) == [("convolution", floats), ("convolution_backward", floats)]
    assert products(linear) == [("_int_mm", torch.int8)] * 3
    assert {dtype for _, dtype in products(linear_float)} == {floats}
    assert len(products(linear_float)) == 3


def test_only_contractions_that_autograd_needs_are_timed(set_times):
    """The first layer has no grad_input, a frozen one no grad_weight."""
    made = set_times(WINS)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model[1].weight.requires_grad_(False)
    convert(model, layers="auto")
    model(torch.randn(4, 8)).sum().backward()
    optimizer_of(model).step()
    for (int8, float_), count in zip(made, (2, 2, 3), strict=True):
        assert len(products(int8)) == len(products(float_)) == count
    assert model[1].weight.grad is None


@pytest.mark.parametrize("every", [None, 1, 3])
def test_ranges_are_measured_in_the_timed_runs_as_often_as_the_layer_does(set_times, monkeypatch, every):
    made, operand = set_times(WINS), OperandSpec(range=absmax.Rule(every=every))
    output = ContractionSpec(lhs=operand, rhs=operand)
    recipe = Recipe(name="mine", output=output, grad_weight=ContractionSpec(rhs=operand))
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, recipe, layers="auto", refresh=5)
    train_linear(model, 1)
    measured = []
    clip_value = absmax.Rule.clip_value
    monkeypatch.setattr(absmax.Rule, "clip_value", lambda *a: measured.append(1) or clip_value(*a))
    for _ in range(4):
        made[0][0]()
    assert len(measured) == (4 * 2 if every == 1 else 0)  # x and w


def train_linear(model, steps, width=8):
    optimizer = optimizer_of(model, 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, width)).square().mean().backward()
        optimizer.step()


def test_the_widths_in_force_are_timed(set_times):
    made = set_times(WINS)
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, layers="auto")
    layer_states(model)[0].adapt_widths(BitWidthRule(threshold=0.0, max_bits=16))
    train_linear(model, 1)
    bits = [o.bits for o in layer_states(model)[0].distinct_operands()]
    planes = {8: 1, 16: 2}
    assert 16 in bits
    by_slot = layer_states(model)[0].operands
    expected = sum(
        planes[by_slot[f"{c}.lhs"].bits] * planes[by_slot[f"{c}.rhs"].bits] for c in ("output", "grad_weight")
    )
    assert len(products(made[0][0])) == expected > 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(4, 6, (2, 3), padding="same", groups=2),
        nn.Conv2d(3, 4, 4, padding="same", dilation=2, bias=False),
        nn.Conv1d(3, 4, 4, padding="same"),
        nn.Conv3d(3, 4, (2, 3, 4), padding="same"),
        nn.Conv3d(3, 4, 3, (1, 2, 1), (0, 1, 2)),
    ],
)
def test_the_float_convolution_is_the_layers_own(layer, monkeypatch):
    x = torch.randn(2, layer.in_channels, *(7, 9, 8)[: len(layer.kernel_size)])
    expected, found = layer(x), []
    of = LayerCall.of
    monkeypatch.setattr(LayerCall, "of", lambda x, geometry, *rest: found.append(geometry) or of(x, geometry, *rest))
    convert(layer)
    layer(x)
    y = comparison._convolution(x, layer.weight, layer.bias, found[0])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_call_is_noted_as_it_was(channels_last, fuse):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 2, 8, 8)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    convert(model, fuse=fuse)
    model(x[:1])
    model(x).sum().backward()
    model(x[:1])
    first, second = (s.call for s in layer_states(model))
    assert (first.shape, second.shape) == ((2, 2, 8, 8), (2, 4, 6, 6))
    for call in (first, second):
        assert call.channels_last == call.output_channels_last == channels_last
        assert call.needs_weight
    assert (first.needs_input, second.needs_input) == (False, True)
    assert (first.deferred, second.deferred) == (False, fuse)


# --- Once ------------------------------------------------------------------------------------------------------------


def test_equal_layers_are_timed_once(set_times):
    made = set_times(LOSES)
    model = nn.Sequential(nn.Linear(64, 8), *(nn.Linear(8, 8) for _ in range(4)))
    convert(model, layers="auto")
    with pytest.warns(UserWarning, match="nothing runs INT8"):
        train_linear(model, STEPS, 64)
    assert len(made) == 2
    assert kept_float(model) == list("01234")


def test_the_next_process_remembers(set_times, monkeypatch):
    set_times(WINS, LOSES, WINS)
    decided = []
    for _ in range(2):
        model = network()
        convert(model, layers="auto")
        train(model)
        decided.append([s.times for s in layer_states(model)])
        monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(comparison.REMEMBERED.path))
        monkeypatch.setattr(comparison, "shortest", None)  # timing would now fail
    assert decided[0] == decided[1]
    assert [t.float_wins for t in decided[0]] == [False, True, False]


@pytest.mark.parametrize("other", ["threads", "batch", "recipe", "frozen", "autocast", "torn", "negative"])
def test_times_hold_for_their_problem_alone(other, set_times, monkeypatch):
    made = set_times(WINS)
    for again in (False, True):
        model, recipe, samples = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "default", 16
        if again and other == "frozen":
            model.requires_grad_(False)[1].bias.requires_grad_(True)
            model[0].weight.requires_grad_(True)
        if again and other == "recipe":
            recipe = "scalable"
        if again and other == "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        if again and other == "batch":
            samples = 17
        if again and other in ("torn", "negative"):
            path = comparison.REMEMBERED.path
            record = json.loads(path.read_text())
            for entries in record["machines"].values():
                entries.update(dict.fromkeys(entries, "1.0" if other == "torn" else "-1.0 2.0"))
            path.write_text(json.dumps(record))
            monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(path))
        convert(model, recipe, layers="auto")
        with torch.autocast("cpu", torch.bfloat16, enabled=again and other == "autocast"):
            y = model(torch.randn(samples, 8))
        y.float().sum().backward()
        optimizer_of(model).step()
    assert len(made) == (3 if other == "frozen" else 4)  # there the first layer is as before


def test_a_layer_that_comes_later_is_decided_later(set_times):
    made = set_times(LOSES, WINS, WINS, LOSES)
    model = nn.Sequential(network(), nn.Linear(10, 10))
    model[1].forward = lambda x: x
    convert(model, layers="auto")
    train(model)
    assert (len(made), kept_float(model)) == (3, ["0.0"])
    model[1] = nn.Linear(10, 3)
    convert(model, layers="auto")
    assert kept_float(model) == ["0.0"], "what was decided stays so"
    train(model)
    assert (len(made), kept_float(model)) == (4, ["0.0", "1"])


def test_a_layer_that_rests_in_the_first_step_is_decided_after_its_own(set_times):
    made = set_times(LOSES)
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 9)])
    convert(model, layers="auto")
    optimizer = optimizer_of(model)
    for step in range(4):
        y = model[0](torch.randn(4, 8))
        (model[1](y) if step >= 2 else y).sum().backward()
        optimizer.step()
        assert len(made) == 1 + (step >= 2)
    assert [s.counts.of("output") for s in layer_states(model)] == [1, 1]


def test_nothing_is_compared_inside_a_backward_pass(set_times):
    """Where the optimizer steps as soon as a gradient is there."""
    made, model, x = set_times(LOSES), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    convert(model, layers="auto")
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.01)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.warns(UserWarning, match="compares nothing where the optimizer steps inside the backward pass"):
        model(x).sum().backward()
    model(x).sum().backward()
    assert made == []
    assert kept_float(model) == []


def test_ranks_that_nobody_brings_together_compare_nothing(monkeypatch, nothing_is_timed):
    monkeypatch.setattr("lightning_int8.steering.several_ranks", lambda: True)
    model = network()
    convert(model, layers="auto")
    with pytest.warns(UserWarning, match="layers='auto' compares nothing: several ranks must agree"):
        train(model)
    assert kept_float(model) == []


# --- With everything else --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:layers='auto'")
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_compared_by_the_clock(name):
    model = network()
    convert(model, name, layers="auto")
    optimizer = (FixedPointSGD if recipes.get(name).optimizer else torch.optim.SGD)(model.parameters(), 0.05)
    train(model, optimizer=optimizer)
    for state in layer_states(model):
        assert state.kept_by_recipe or state.times is not None
        assert state.counts.of("output") >= 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_is_compared(compiled, set_times):
    torch._dynamo.reset()
    set_times(LOSES, WINS, WINS)
    model = network()
    convert(model, layers="auto")
    train(torch.compile(model, backend="eager") if compiled else model, optimizer=optimizer_of(model))
    assert [s.counts.of("output") for s in layer_states(model)] == [1, STEPS, STEPS]
    torch._dynamo.reset()


def test_copies_carry_the_decision(set_times):
    set_times(LOSES, WINS, WINS)
    model = network()
    convert(model, layers="auto")
    train(model)
    assert kept_float(copy.deepcopy(model)) == ["0"]


def test_a_resumed_run_keeps_what_was_decided_and_times_nothing(set_times, monkeypatch, make_trainer, tmp_path):
    def plugin(layers="auto"):
        return Int8Precision(layers=layers, refresh=2)

    set_times(WINS, LOSES, WINS)
    whole = Digits()
    make_trainer(plugin(), max_epochs=2).fit(whole)
    comparison.REMEMBERED.path.unlink()
    monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(comparison.REMEMBERED.path))
    set_times(WINS, LOSES, WINS)
    trainer = make_trainer(plugin(), max_epochs=1)
    trainer.fit(Digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr("lightning_int8.steering.compare", None)
    resumed, precision = Digits(seed=9), plugin()
    make_trainer(precision, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert kept_float(resumed) == ["net.4"]
    assert {r.name: r.reason for r in precision.report.rows if r.decision == "float"} == {
        "net.4": "INT8 would take 1.31 times as long (2100.0 against 1600.0 ms)"
    }
    assert same(snapshot(resumed), snapshot(whole))
    with pytest.raises(ValueError, match="INT8 plugin state: choice: 'auto' was saved, 'int8' is in use"):
        make_trainer(plugin("int8"), max_epochs=2).fit(Digits(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "times", [{}, "2.1 1.6", {"int8_seconds": 0.0, "float_seconds": 1.0, "backend": "", "integer": True}]
)
def test_times_that_cannot_be_are_refused(times, set_times, make_trainer):
    set_times(WINS)
    plugin = Int8Precision(layers="auto")
    make_trainer(plugin, max_steps=1).fit(Digits())
    state = plugin.state_dict()
    state["int8"]["steering"]["net.0"]["times"] = times
    with pytest.raises(ValueError, match=r"INT8 plugin state: steering: layer 'net\.0'"):
        plugin.load_state_dict(state)


def test_what_stays_float_is_logged(set_times, make_trainer, monkeypatch):
    set_times(WINS, LOSES, WINS)
    lines = []
    monkeypatch.setattr("lightning_int8.engine.rank_zero_info", lines.append)
    make_trainer(Int8Precision(layers="auto")).fit(Digits())
    reason = "INT8 would take 1.31 times as long (2100.0 against 1600.0 ms)"
    assert lines == [f"layer 'net.4' stays in float from now on: {reason}"]


def test_fabric_compares_too(set_times):
    made = set_times(LOSES, WINS, WINS)
    precision = fabric.Int8Precision(layers="auto")
    host = Fabric(accelerator="cpu", plugins=[precision])
    net = network()
    model, optimizer = host.setup(net, optimizer_of(net))
    for _ in range(STEPS):
        optimizer.zero_grad()
        host.backward(model(torch.randn(4, 1, 8, 8)).square().mean())
        optimizer.step()
    assert len(made) == 3
    assert [r.name for r in precision.reports[0].rows if r.decision == "float"] == ["0"]
    other = fabric.Int8Precision(layers="auto")
    twin = network()
    Fabric(accelerator="cpu", plugins=[other]).setup(twin, optimizer_of(twin))
    other.load_state_dict(precision.state_dict())
    assert kept_float(twin) == ["0"]
