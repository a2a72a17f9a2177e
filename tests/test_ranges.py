"""Every range rule of the folder, and the two there are so far in particular."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import numerics, ranges

RULES = ranges.names()
AXES = (None, 0, -1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1e-40


def outlier():
    x = torch.linspace(-1e-3, 1e-3, 5 * 4 * 6).reshape(5, 4, 6)
    x[2, 1, 3] = 6e4
    return x


TENSORS = {
    "zeros": torch.zeros(5, 4, 6),
    "positive constant": torch.full((5, 4, 6), 3.0),
    "negative constant": torch.full((5, 4, 6), -3.0),
    "denormals": torch.linspace(-TINY, TINY, 120).reshape(5, 4, 6),
    "one outlier": outlier(),
    "one channel of zeros": torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(6) > 0),
    "one element": torch.full((1, 1, 1), -2.0),
}


class NoHostWait(TorchDispatchMode):
    """Fails where a tensor's value is read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the rule waits for the host"
        return func(*args, **(kwargs or {}))


def test_the_folder_is_the_list():
    folder = Path(ranges.__file__).parent
    assert sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__") == RULES
    assert {"absmax", "ema_absmax"} <= set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_frozen_hashable_value_with_a_docstring(name):
    rule = ranges.make(name)
    assert rule == ranges.make(name)
    assert hash(rule) == hash(ranges.make(name))
    assert rule.every is None
    assert ranges.make(name, every=7).every == 7
    assert "every:" in type(rule).__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.every = 3


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("name", RULES)
def test_a_clip_value_is_finite_and_not_negative(name, case, axis):
    rule = ranges.make(name)
    for dtype in DTYPES:
        x = TENSORS[case].to(dtype)
        untouched, previous = x.clone(), None
        for _ in range(3):
            with NoHostWait():
                clip_value = rule.clip_value(x, axis, previous)
            assert clip_value.dtype == torch.float32
            assert clip_value.shape == (() if axis is None else (x.shape[axis],))
            assert torch.isfinite(clip_value).all()
            assert (clip_value >= 0).all()
            assert torch.equal(rule.clip_value(x, axis, previous), clip_value), "a rule must not remember"
            previous = clip_value
        assert torch.equal(x, untouched)
        q = numerics.quantize(x, clip_value, axis=axis)
        assert torch.isfinite(numerics.dequantize(q)).all()
        if (x == 0).all():
            assert not q.planes[0].data.any()


@pytest.mark.parametrize("name", RULES)
def test_a_channel_is_clipped_by_its_own_values(name):
    rule, x = ranges.make(name), torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    for axis in (0, -1):
        alone = torch.stack([rule.clip_value(part, None, None) for part in x.unbind(axis)])
        torch.testing.assert_close(rule.clip_value(x, axis, None), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True])
@pytest.mark.parametrize("name", RULES)
def test_the_interval_is_a_positive_number_of_steps_or_none(name, every):
    with pytest.raises(ValueError, match=r"^every: .* is not a positive number of optimizer steps, nor None"):
        ranges.make(name, every=every)


def test_an_unknown_rule_is_refused_with_the_list():
    with pytest.raises(ValueError, match="range: 'absmin' is not one of absmax, "):
        ranges.make("absmin")


@pytest.mark.parametrize("name", RULES)
def test_an_unknown_field_is_refused_with_the_fields_there_are(name):
    with pytest.raises(ValueError, match=f"range '{name}': field 'percent' is not one of every"):
        ranges.make(name, percent=99)


def test_absmax_takes_the_largest_magnitude_and_ignores_the_past():
    x = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    rule = ranges.make("absmax")
    assert rule.clip_value(x, None, torch.tensor(100.0)) == 4.0
    assert rule.clip_value(x, 0, None).tolist() == [4.0, 3.0]
    assert rule.clip_value(x, -1, None).tolist() == [2.0, 4.0]


def test_ema_absmax_averages_over_refreshes():
    rule = ranges.make("ema_absmax", decay=0.75)
    first = rule.clip_value(torch.tensor([8.0]), None, None)
    assert first == 8.0
    second = rule.clip_value(torch.tensor([-16.0]), None, first)
    assert second == 0.75 * 8 + 0.25 * 16
    assert rule.clip_value(torch.tensor([0.0]), None, second) == 0.75 * second


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_the_decay_of_ema_absmax_is_a_weight(decay):
    with pytest.raises(ValueError, match=r"^decay: .* is not in \[0, 1\)"):
        ranges.make("ema_absmax", decay=decay)
