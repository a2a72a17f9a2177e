"""Adaptive bit-widths: worked values of the rule, the schedule against a step-by-step twin, widths in training."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BATCHES, Digits
from torch import nn

from lightning_int8 import ContractionSpec, Int8Precision, OperandSpec, Recipe, convert, gemm_counts, recipes
from lightning_int8.bit_width import AdaptiveWidth
from lightning_int8.policies import WIDTHS, BitWidthRule
from lightning_int8.precision import _epoch_steps
from lightning_int8.ranges.absmax import Rule as AbsMax
from lightning_int8.rewrite import conversion_of, layer_states

EPOCH = 313


@pytest.mark.parametrize(
    ("error", "drift", "interval"),
    [(0.03, 0.0, 1), (0.01, 0.0, 8), (0.005, 0.0, 38), (0.001, 0.0, EPOCH), (0.0, 0.0, EPOCH), (0.001, 0.04, 1)],
)
def test_intervals_worked_out_in_the_methods(error, drift, interval):
    assert BitWidthRule().interval(error, drift, step=100, epoch_steps=EPOCH) == interval


def test_the_cap_of_the_interval_is_the_epoch():
    assert BitWidthRule().interval(0.001, 0.0, step=100, epoch_steps=2000) == 998
    assert BitWidthRule().interval(0.03, 1.0, step=EPOCH, epoch_steps=EPOCH) == EPOCH, "later: once per epoch"
    assert BitWidthRule().interval(0.0, 0.0, step=3, epoch_steps=EPOCH) == 1, "start-up: every step"


@pytest.mark.parametrize(
    ("errors", "bits", "mode", "width"),
    [
        ((0.01, 0.0, 0.0), 8, 1, 8),
        ((0.03, 0.0, 0.0), 8, 1, 8),
        ((0.031, 0.0, 0.0), 8, 1, 16),
        ((0.5, 0.2, 0.0), 8, 1, 24),
        ((0.5, 0.2, 0.1), 8, 1, 24),
        ((0.0, 0.0, 0.0), 16, 1, 16),
        ((0.0, 0.0, 0.0), 16, 2, 8),
        ((0.5, 0.0, 0.0), 24, 2, 16),
        ((math.nan, math.nan, math.nan), 8, 1, 8),
    ],
)
def test_a_width_grows_while_the_error_is_above_the_threshold(errors, bits, mode, width):
    assert BitWidthRule(mode=mode).width(errors, bits, least=8) == width


def test_max_bits_is_a_limit():
    assert BitWidthRule(max_bits=16).width((0.5, 0.5, 0.5), 8, least=8) == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": 3},
        {"max_bits": 12},
        {"alpha": 1.5},
        {"threshold": -1.0},
        {"epoch_steps": 0},
        {"operands": ("y",)},
        {"operands": ()},
        {"beta": "0.1"},
    ],
)
def test_a_bad_field_is_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: "):
        BitWidthRule(**fields)


class Twin:
    """Quantization parameter adjustment as methods.md 5b prints it: the moving average moves at every step."""

    def __init__(self, mode):
        self.n, self.next, self.r, self.s, self.mode = 8, 0, 0.0, 0.0, mode

    def step(self, it, z, diffs, epoch):
        if it < self.next:
            self.r = 0.04 * self.s + 0.96 * self.r
            return
        n = 8 if self.mode == 2 else self.n
        while diffs[n] > 0.03 and n < 24:
            n += 8
        s = math.ceil(math.log2(z / {8: 127, 16: 32639, 24: 8355711}[n]))
        r = self.r - (n - self.n)
        if it < epoch / 100:
            self.next = it + 1
        elif it >= epoch:
            self.next = it + epoch
        else:
            change = max(100 * diffs[n] ** 2, abs(0.04 * (s - r)))
            wanted = 0.1 / change - 2 if change > 0 else math.inf
            self.next = it + max(1, min(epoch, round(min(wanted, epoch))))
        self.n, self.s, self.r = n, s, 0.04 * s + 0.96 * r


@pytest.mark.parametrize("mode", [1, 2])
def test_the_schedule_equals_the_algorithm_run_step_by_step(mode):
    rng = np.random.default_rng(mode)
    epoch = 60
    twin, width = Twin(mode), AdaptiveWidth(BitWidthRule(mode=mode), 8)
    adjusted = 0
    for it in range(150):
        z = float(2.0 ** (rng.normal() * 0.7 + it / 20))
        diffs = {8: float(rng.exponential(0.015)), 16: float(rng.exponential(0.006)), 24: float(rng.exponential(0.005))}
        if it >= width.next_step:
            adjusted += 1
            scales = [math.ceil(math.log2(z / largest)) for largest in (127, 32639, 8355711)]
            clips = [largest * 2.0**s for largest, s in zip((127, 32639, 8355711), scales, strict=True)]
            width.measured(torch.tensor(clips), torch.tensor([diffs[n] for n in WIDTHS], dtype=torch.float64))
            clip = width.settle(it, [float(s) for s in scales], epoch)
            assert clip == clips[WIDTHS.index(width.bits)]
        twin.step(it, z, diffs, epoch)
        assert (width.bits, width.next_step) == (twin.n, twin.next), it
        width = AdaptiveWidth.from_state_dict(width.state_dict(), 8)
    assert 5 < adjusted < 140
    assert twin.n > 8 or mode == 2


def test_several_measurements_of_a_step_count_by_the_largest():
    width = AdaptiveWidth(BitWidthRule(), 8)
    width.measured(torch.tensor([1.0, 4.0, 1.0]), torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    width.measured(torch.tensor([2.0, 3.0, 1.0]), torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64))
    assert width.settle(0, [0.0, 0.0, 0.0], EPOCH) == 4.0
    assert width.bits == 16


# --- In training -----------------------------------------------------------------------------------------------------


class HeavyTail(torch.autograd.Function):
    """Multiplies the gradient by Student-t noise; the forward is the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        noise = torch.distributions.StudentT(1.2).sample(g.shape)
        return noise * g.abs().mean()


class HeavyTailed(nn.Module):
    def __init__(self):
        super().__init__()
        self.heavy, self.plain = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.plain(HeavyTail.apply(self.heavy(x)))


def train(model, steps, **arguments):
    torch.manual_seed(0)
    convert(model, "fixed_point", **arguments)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(256, 32)).square().mean().backward()
        optimizer.step()
    return {s.name: {slot: o.bits for slot, o in s.operands.items()} for s in layer_states(model)}


def test_widths_grow_where_gradients_have_heavy_tails_and_nowhere_else():
    model = HeavyTailed()
    bits = train(model, 3)
    assert bits["heavy"]["grad_weight.lhs"] == bits["heavy"]["grad_input.lhs"] in (16, 24)
    assert bits["plain"] == dict.fromkeys(bits["plain"], 8)
    assert bits["heavy"]["output.lhs"] == bits["heavy"]["output.rhs"] == 8
    counts = gemm_counts(model)
    planes = bits["heavy"]["grad_weight.lhs"] // 8
    assert counts["heavy"]["grad_weight"] == 1 + 2 * planes, "the new width counts from the second step on"
    assert counts["plain"] == {"output": 3, "grad_input": 3, "grad_weight": 3}


def test_scales_are_powers_of_two():
    model = HeavyTailed()
    train(model, 3)
    for state in layer_states(model):
        for operand in state.distinct_operands():
            scale = operand.clip_value / {8: 127, 16: 32639, 24: 8355711}[operand.bits]
            assert torch.frexp(scale).mantissa == 0.5


def test_a_new_width_takes_effect_at_the_next_step():
    model = HeavyTailed()
    torch.manual_seed(0)
    convert(model, "fixed_point")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    gradient = next(s for s in layer_states(model) if s.name == "heavy").operands["grad_weight.lhs"]
    model(torch.randn(256, 32)).square().mean().backward()
    assert gradient.bits == 8
    assert gradient.width.errors[0] > 0.03
    optimizer.step()
    assert gradient.bits > 8


def test_a_wide_gradient_is_a_better_gradient():
    errors = {}
    for recipe in ("fixed_point", "default"):
        torch.manual_seed(1)
        layer = nn.Sequential(nn.Linear(32, 32))
        g = torch.distributions.StudentT(1.2).sample((256, 32))
        x = torch.randn(256, 32)
        truth = g.double().t() @ x.double()
        convert(layer, recipe)
        optimizer = torch.optim.SGD(layer.parameters(), 0.0)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).backward(g)
            optimizer.step()
        errors[recipe] = float((layer[0].weight.grad.double() - truth).norm() / truth.norm())
    assert errors["fixed_point"] < 0.3 * errors["default"]


@pytest.mark.parametrize(("every", "refreshes"), [(1, 1), (4, 4), (None, 30)])
def test_a_range_rule_keeps_its_own_interval_where_the_width_adapts(every, refreshes):
    """Without one of its own the range is measured at adjustments alone; weights adjust no more often than the rest."""
    operand = OperandSpec(range=AbsMax(every=every))
    both = ContractionSpec(lhs=operand, rhs=operand)
    rule = BitWidthRule(epoch_steps=30)
    layer = nn.Sequential(nn.Linear(8, 4))
    convert(layer, Recipe(name="mine", output=both, grad_input=both, grad_weight=both, bit_width=rule))
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    x, g = torch.rand(64, 8) + 0.5, torch.rand(64, 4) + 0.5
    operands = {o.tensor: o for o in layer_states(layer)[0].distinct_operands()}
    found = {tensor: [] for tensor in operands}
    for step in range(90):
        scheduled = {tensor: o.width.next_step for tensor, o in operands.items()}
        layer(x * (1 + step)).backward(g * (1 + step))
        optimizer.step()
        for tensor, o in operands.items():
            assert (o.width.next_step != scheduled[tensor]) == (step >= scheduled[tensor]), "adjusted when scheduled"
            if o.clip_value == (x.max() if tensor == "x" else g.max()) * (1 + step):
                found[tensor].append(step)
    for tensor in ("x", "g"):
        assert max(b - a for a, b in itertools.pairwise(found[tensor])) == refreshes, tensor


class ByHand(Digits):
    """Steps the optimizer behind the Trainer's back."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("kind", [Digits, ByHand])
def test_every_step_settles_during_a_fit_and_after_it(kind, make_trainer):
    model = kind()
    make_trainer(Int8Precision("fixed_point")).fit(model)
    widths = [o.width for s in layer_states(model) for o in s.distinct_operands() if o.clip_value is not None]
    assert all(width.candidates is None for width in widths)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(BATCHES, BATCHES + 2):
        scheduled = [width.next_step for width in widths]
        optimizer.zero_grad()
        model(torch.rand(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        assert [width.next_step > step for width in widths] == [True] * len(widths), scheduled


def test_the_rule_of_the_recipe_is_its_own():
    model = HeavyTailed()
    convert(model, recipes.get("fixed_point"))
    conversion = conversion_of(model)
    assert conversion.settings.recipe.bit_width == BitWidthRule()
    assert all(o.width is not None for s in layer_states(model) for o in s.distinct_operands())


@pytest.mark.parametrize(
    ("batches", "accumulate", "steps"), [(10, 1, 10), (10, 4, 3), (8, 4, 2), (math.inf, 1, None), (0, 1, None)]
)
def test_the_length_of_an_epoch_is_that_of_the_trainer(batches, accumulate, steps):
    trainer = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=accumulate)
    assert _epoch_steps(trainer) == steps


def test_the_plugin_tells_the_clock_how_long_an_epoch_is(make_trainer):
    plugin = Int8Precision("fixed_point")
    model = Digits()
    make_trainer(plugin, accumulate_grad_batches=4).fit(model)
    assert conversion_of(model).clock.epoch_steps == math.ceil(BATCHES / 4)
