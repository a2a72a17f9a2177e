"""One operand: keys that advance where the tensor is, and ranges of weights that are decided without the host."""

import pytest
import torch
from machines import Machine

from lightning_int8 import backends, ranges
from lightning_int8.clock import Clock
from lightning_int8.magnitudes import STATISTICS
from lightning_int8.operand import Operand
from lightning_int8.spec import OperandSpec


def operand(tensor="w", **rule):
    spec = OperandSpec(range=ranges.make(**{"name": "absmax", "every": 1} | rule))
    return Operand("output.rhs", tensor, spec, None, 1, Clock(refresh=100), seed=5)


def quantize(made, x, update=True):
    """The scale of one call."""
    key = made.draw(update, x.device)
    backend = backends.load("onednn")
    return backend.quantize(x, *made.request(x, key, backend, update, STATISTICS)).planes[0].scale


# --- the key -------------------------------------------------------------------------------------------------------


def test_a_fresh_draw_advances_the_key_in_place():
    made = operand()
    address = made.key.data_ptr()
    drawn = [made.draw(fresh, torch.device("cpu")) for fresh in (True, True, False)]
    assert [k.tolist() for k in drawn] == [[5, 0, 1], [5, 0, 2], [5, 0, 2]]
    assert made.key.data_ptr() == address
    made.load_state_dict(made.state_dict() | {"key": torch.tensor([8, 9, 10])})
    assert made.key.tolist() == [8, 0, 10]  # the rank is this process's own
    assert made.key.data_ptr() == address


def test_the_key_follows_the_tensor_even_where_validation_comes_first():
    made, device = operand(), torch.device("meta")  # stands for a GPU
    with torch.inference_mode():
        assert made.draw(False, device).device == device
    assert made.draw(True, device).device == device
    assert made.key.device == device


# --- ranges of weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"name": "absmax"}, {"name": "ema_absmax", "decay": 0.5}])
def test_ranges_of_weights_are_decided_without_the_host(rule):
    made, machine = operand(**rule), Machine(None)
    quantize(made, torch.full((4,), 8.0))
    made._clock.steps = 1
    with machine.no_waits():
        measured = made._current_clip_value(torch.full((4,), 4.0), backends.load("reference"), True, STATISTICS)
    assert measured == {"absmax": 4.0, "ema_absmax": 6.0}[rule["name"]]


@pytest.mark.parametrize(("rule", "bad"), [("ema_absmax", float("nan")), ("ema_absmax", float("inf")), ("absmax", 0.0)])
def test_a_bad_range_of_a_weight_shows_and_is_forgotten(rule, bad):
    made, good, steps = operand(name=rule), torch.full((4,), 8.0), iter(range(9))

    def step(x):
        made._clock.steps = next(steps)
        return quantize(made, x)

    first = step(good)
    shown = step(good * bad)
    assert shown.isfinite() == (bad == 0.0)
    assert shown != first
    assert made.clip_value == 8.0
    assert step(good) == pytest.approx(float(first))


def test_micro_batches_of_a_step_average_with_what_was_before_it():
    made = operand(name="ema_absmax", decay=0.5)
    quantize(made, torch.full((4,), 8.0))
    made._clock.steps = 1
    for _ in range(3):
        quantize(made, torch.full((4,), 4.0))
    assert made.clip_value == 6.0


def test_a_first_range_that_is_bad_is_not_remembered():
    made = operand()
    quantize(made, torch.full((4,), torch.nan))
    assert made.clip_value is None
