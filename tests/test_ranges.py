"""Every range rule of the folder, then each in particular, against plain twins."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_int8 import grids, numerics, ranges

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


WAITS = {"direction_sensitive_clip"}
"""Rules that say that the host waits for their search."""


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
            with nullcontext() if name in WAITS else NoHostWait():
                clip_value = rule.clip_value(x, axis, previous, 8)
            assert clip_value.dtype == torch.float32
            assert clip_value.shape == (() if axis is None else (x.shape[axis],))
            assert torch.isfinite(clip_value).all()
            assert (clip_value >= 0).all()
            assert torch.equal(rule.clip_value(x, axis, previous, 8), clip_value), "a rule must not remember"
            previous = clip_value
        assert torch.equal(x, untouched)
        q = numerics.quantize(x, clip_value, axis=axis)
        assert torch.isfinite(numerics.dequantize(q)).all()
        if (x == 0).all():
            assert not q.planes[0].data.any()


@pytest.mark.parametrize("name", RULES)
def test_a_channel_is_clipped_by_its_own_values(name):
    rule, x = ranges.make(name), torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    for axis in (-1,) if name == "sample_average" else (0, -1):  # there axis 0 are the samples
        alone = torch.stack([rule.clip_value(part, None, None, 8) for part in x.unbind(axis)])
        torch.testing.assert_close(rule.clip_value(x, axis, None, 8), alone, rtol=1e-5, atol=0)


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
    assert rule.clip_value(x, None, torch.tensor(100.0), 8) == 4.0
    assert rule.clip_value(x, 0, None, 8).tolist() == [4.0, 3.0]
    assert rule.clip_value(x, -1, None, 8).tolist() == [2.0, 4.0]


def test_ema_absmax_averages_over_refreshes():
    rule = ranges.make("ema_absmax", decay=0.75)
    first = rule.clip_value(torch.tensor([8.0]), None, None, 8)
    assert first == 8.0
    second = rule.clip_value(torch.tensor([-16.0]), None, first, 8)
    assert second == 0.75 * 8 + 0.25 * 16
    assert rule.clip_value(torch.tensor([0.0]), None, second, 8) == 0.75 * second


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_the_decay_of_ema_absmax_is_a_weight(decay):
    with pytest.raises(ValueError, match=r"^decay: .* is not in \[0, 1\)"):
        ranges.make("ema_absmax", decay=decay)


# --- The rules of the papers, against plain twins --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 24])
@given(magnitude=st.floats(2.0**-60, 2.0**60, width=32))
@settings(deadline=None, max_examples=60)
def test_power_of_two_up_is_the_smallest_resolution_that_holds_the_maximum(bits, magnitude):
    largest = numerics.largest_integer(bits)
    clip_value = ranges.make("power_of_two").clip_value(torch.tensor([magnitude, -magnitude / 3]), None, None, bits)
    scale = numerics.affine_map(clip_value, bits, affine=False).scale.item()
    assert math.log2(scale) == math.ceil(math.log2(magnitude / largest) - 1e-9)
    assert scale * largest >= magnitude * (1 - 1e-6)


@pytest.mark.parametrize("bits", [8, 9, 16, 24])
@given(magnitude=st.floats(2.0**-60, 2.0**60, width=32))
@settings(deadline=None, max_examples=60)
def test_power_of_two_nearest_is_shift_quantization(bits, magnitude):
    width = 8 if bits == 9 else bits
    clip_value = ranges.make("power_of_two", rounding="nearest").clip_value(torch.tensor(magnitude), None, None, bits)
    scale = numerics.affine_map(clip_value, bits, affine=False).scale.item()
    exponent = math.log2(scale) + width - 1  # of R
    assert exponent == int(exponent)
    assert abs(exponent - math.log2(magnitude)) <= 0.5 + 1e-6


@pytest.mark.parametrize("integer_bits", [-2, 0, 3])
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_fixed_grid_does_not_look_at_the_values(bits, integer_bits):
    rule = ranges.make("fixed_grid", integer_bits=integer_bits)
    for x in (torch.zeros(3, 4), torch.full((3, 4), 1e9)):
        clip_value = rule.clip_value(x, None, None, bits)
        scale = numerics.affine_map(clip_value, bits, affine=False).scale.item()
        assert scale == 2.0 ** (integer_bits - bits + 1)
        assert torch.equal(rule.clip_value(x, 0, None, bits), clip_value.expand(3))


def test_sample_average_is_the_mean_over_samples_of_their_own_extremes():
    x = torch.randn(5, 6, 7, 3, generator=torch.Generator().manual_seed(0))
    rule = ranges.make("sample_average", decay=0.1)
    current = np.abs(x.numpy()).max((1, 2, 3)).mean()
    assert rule.clip_value(x, None, None, 8).item() == pytest.approx(current, rel=1e-6)
    assert rule.clip_value(x, None, torch.tensor(9.0), 8).item() == pytest.approx(0.9 + 0.9 * current, rel=1e-6)
    by_channel = np.abs(x.numpy()).max((1, 2)).mean(0)
    np.testing.assert_allclose(rule.clip_value(x, -1, None, 8).numpy(), by_channel, rtol=1e-6)


def test_magnitude_aware_clip_averages_only_what_is_not_gaussian():
    rng = np.random.default_rng(0)
    channels = {"gaussian": rng.standard_normal(20_000), "laplace": rng.laplace(size=20_000), "dead": np.zeros(20_000)}
    x = torch.from_numpy(np.stack(list(channels.values()), axis=-1).astype(np.float32))
    rule, largest = ranges.make("magnitude_aware_clip"), np.abs(x.numpy()).max(0)
    assert rule.clip_value(x, -1, None, 8).tolist() == largest.tolist(), "the maximum at the first refresh"
    previous = torch.tensor([10.0, 10.0, 10.0])
    found = rule.clip_value(x, -1, previous, 8)
    # P(|g| > sigma): Gaussian 0.317 > 0.3, Laplace 0.243, and nothing lies beyond the sigma of a dead channel.
    expected = [largest[0], 0.2 * 10 + 0.8 * largest[1], 0.2 * 10]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    waking = rule.clip_value(x, -1, torch.tensor([10.0, 0.0, 10.0]), 8)
    assert waking[1] == largest[1], "nothing to average with"
    off = ranges.make("magnitude_aware_clip", threshold=0.1).clip_value(x, -1, previous, 8)
    assert off[1] == largest[1]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("power_of_two", {"rounding": "down"}, "rounding: 'down' is not one of up, nearest"),
        ("fixed_grid", {"integer_bits": 2.5}, "integer_bits: 2.5 is not an integer from -32 to 32"),
        ("magnitude_aware_clip", {"threshold": 1.0}, r"threshold: 1.0 is not in \[0, 1\)"),
        ("magnitude_aware_clip", {"slope": 0.0}, r"slope: 0.0 is not in \(0, 1\]"),
        ("magnitude_aware_clip", {"ratio": 2.0}, r"ratio: 2.0 times slope 0.8 is not in \[0, 1\]"),
        ("magnitude_aware_clip", {"slope": "x"}, "slope: 'x' is not a number"),
        ("sample_average", {"decay": 1.0}, r"decay: 1.0 is not in \[0, 1\)"),
    ],
)
def test_a_field_out_of_its_range_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        ranges.make(name, **fields)


def test_shift_quantization_agrees_with_the_grids_of_the_norms():
    for magnitude in (1.0, 1.41421354, 1.41421366, 0.70710677, 0.7071068, 3.0, 1e-20):
        x = torch.tensor([magnitude, -magnitude / 7, magnitude / 300])
        clip_value = ranges.make("power_of_two", rounding="nearest").clip_value(x, None, None, 8)
        quantized = numerics.dequantize(numerics.quantize(x, clip_value))
        assert torch.equal(quantized, grids.shift_quantize(x, 8)), magnitude
