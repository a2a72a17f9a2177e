"""Distances, errors and the statistics that range rules need, fused passes included, against float64 twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_int8 import magnitudes, measures, numerics, ranges
from lightning_int8.backends.cpu import measures as cpu_measures
from lightning_int8.magnitudes import BINS, MANTISSA_BITS, OCTAVES, STATISTICS, Statistics

COUNT = 200_000


def draw(name, count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: rng.standard_normal(count),
        "uniform": lambda: rng.uniform(-1, 1, count),
        "laplace": lambda: rng.laplace(size=count),
        "student-t(3)": lambda: rng.standard_t(3, count),
        "mixture": lambda: np.where(rng.random(count) < 0.99, 0.01, 1.0) * rng.standard_normal(count),
        "outlier": lambda: np.append(rng.standard_normal(count - 1), 1e4),
        "lognormal": lambda: np.exp(3 * rng.standard_normal(count)) * rng.choice([-1, 1], count),
        "sparse": lambda: rng.standard_normal(count) * (rng.random(count) < 0.05),
        "few": lambda: rng.standard_normal(50),
    }[name]()
    return torch.from_numpy(values.astype(np.float32))


DISTRIBUTIONS = ("gaussian", "uniform", "laplace", "student-t(3)", "mixture", "outlier", "lognormal", "sparse", "few")


def distance(x, quantized):
    """1 - cos in extended precision, where the plain formula is good enough."""
    a, b = x.numpy().astype(np.longdouble), quantized.astype(np.longdouble)
    return float(1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def nearest(x, clip, largest=127):
    step = np.float64(clip) / largest
    return np.clip(np.rint(np.clip(x.numpy().astype(np.float64), -clip, clip) / step), -largest, largest) * step


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [measures.quantization_error, cpu_measures.quantization_error])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_errors_equal_their_definitions(name, measure):
    x = draw(name, 20_000)
    clips = [numerics.absmax(x, None), 0.3 * numerics.absmax(x, None)]
    found = measure(x, clips, [8, 8], False, None)
    for i, clip in enumerate(map(float, clips)):
        q = nearest(x, clip)
        assert found.cosine_distance[i] == pytest.approx(distance(x, q), rel=1e-3, abs=1e-9)
        mean, mean_q = x.abs().double().mean(), np.abs(q).mean()
        assert found.magnitude_shift[i] == pytest.approx(math.log2(abs(mean - mean_q) / mean + 1), rel=1e-3, abs=1e-7)
        assert found.saturation[i] == pytest.approx(float((x.abs() > np.float32(clip)).double().mean()), abs=1e-12)


@st.composite
def measured(draw_):
    axis = draw_(st.sampled_from([None, 0, -1]))
    affine = draw_(st.booleans())
    shape = draw_(st.sampled_from([(7,), (5, 3), (2, 4, 3), (1, 1), (3, 2, 2, 8)]))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 1000)))
    x = torch.randn(shape, generator=generator)
    channels = () if axis is None else (shape[axis],)
    clips = [torch.rand((2, *channels) if affine else channels, generator=generator) + 0.1 for _ in range(3)]
    return x, clips, (8, 16, 24), affine, axis


@given(measured())
@settings(deadline=None, max_examples=60)
def test_the_fused_pass_measures_what_the_definition_measures(case):
    one, two = measures.quantization_error(*case), cpu_measures.quantization_error(*case)
    torch.testing.assert_close(two.cosine_distance, one.cosine_distance, rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(two.magnitude_shift, one.magnitude_shift, rtol=1e-4, atol=1e-7)
    assert torch.equal(two.saturation, one.saturation)


def test_a_tiny_distance_is_not_lost_to_cancellation():
    torch.manual_seed(0)
    g = torch.randn(10_000, dtype=torch.float64)
    across = torch.randn(10_000, dtype=torch.float64)
    across -= g * (across @ g) / (g @ g)
    for angle in (1e-7, 1e-5, 1e-3, 0.1, 1.0):
        e = math.tan(angle) * across * (g.norm() / across.norm())
        found = measures.cosine_distance_from_sums(g @ g, g @ e, e @ e)
        assert found == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-6)


def test_a_tensor_clipped_to_nothing_is_as_far_away_as_can_be():
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    assert measures.cosine_distance_from_sums(one, -one, one) == 1.0
    assert measures.cosine_distance_from_sums(zero, zero, zero) == 0.0


@pytest.mark.parametrize(
    ("name", "at_max", "best", "share"),
    [
        ("gaussian", 6.2e-5, 4.5e-5, 0.317),
        ("laplace", 3.2e-4, 1.6e-4, 0.243),
        ("student-t(3)", 8.5e-2, 2.5e-2, 0.173),
        ("mixture", 3.7e-3, 2.6e-3, 0.009),
    ],
)
def test_reference_values_of_the_methods(name, at_max, best, share):
    """methods.md 7; heavy tails depend on the drawn maximum, so their figures hold as orders of magnitude."""
    x = draw(name, 1_000_000)
    largest = numerics.absmax(x, None)
    chosen = ranges.make("direction_sensitive_clip").clip_value(x, None, None, 8)
    found = measures.quantization_error(x, [largest, chosen], [8, 8], False, None).cosine_distance
    slack = 6.0 if name == "student-t(3)" else 1.5
    assert at_max / slack < found[0] < at_max * slack
    assert best / slack < found[1] < best * slack
    assert STATISTICS.largest_and_share_beyond_sigma(x, None)[1] == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("name", "shift"), [("gaussian", 2.3e-4), ("laplace", 1.0e-3), ("student-t(3)", 0.53)])
def test_reference_shifts_of_the_mean_magnitude(name, shift):
    """methods.md 7: 8 bits are enough for Gaussian and Laplace, and not for Student-t, where 16 are."""
    x = draw(name, 1_000_000)
    rule = ranges.make("power_of_two")
    clips = [rule.clip_value(x, None, None, bits) for bits in (8, 16)]
    found = cpu_measures.quantization_error(x, clips, [8, 16], False, None).magnitude_shift
    assert (found[0] > 0.03) == (name == "student-t(3)")
    assert shift / 4 < found[0] < shift * 4
    assert found[1] < 1e-3


# --- The search of the clip value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_search_finds_a_distance_within_2_percent_of_the_best_of_1000_clips(name):
    x = draw(name)
    top = float(x.abs().max())
    chosen = float(ranges.make("direction_sensitive_clip").clip_value(x, None, None, 8))
    values = x[x != 0].double()
    gg = (values * values).sum()

    def exact(clip):
        e = ((values.clamp(-clip, clip) * (127 / clip)).round_() * (clip / 127)).sub_(values)
        return float(measures.cosine_distance_from_sums(gg, (e * values).sum(), (e * e).sum()))

    best = min(exact(k / 1000 * top) for k in range(1, 1001))
    assert exact(chosen) <= 1.02 * best
    assert 0 < chosen <= top


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_search_does_not_depend_on_the_magnitude(scale):
    rule, x = ranges.make("direction_sensitive_clip"), draw("laplace", 30_000)
    ratio = rule.clip_value(x * scale, None, None, 8) / rule.clip_value(x, None, None, 8)
    assert ratio == pytest.approx(scale, rel=5e-3)


class Counting(Statistics):
    def __init__(self):
        self.passes = []

    def absmax(self, x, axis):
        self.passes.append("absmax")
        return super().absmax(x, axis)

    def histogram(self, x, largest):
        self.passes.append("histogram")
        return super().histogram(x, largest)


def test_the_search_reads_the_tensor_twice():
    """Once for the maximum, once for the histogram; what follows works on bins."""
    statistics = Counting()
    ranges.make("direction_sensitive_clip").clip_value(draw("gaussian"), None, None, 8, statistics)
    assert statistics.passes == ["absmax", "histogram"]


# --- Statistics of magnitudes ----------------------------------------------------------------------------------------


def expected_histogram(x, largest):
    """By the definition: octave and position within it, of each finite magnitude."""
    values = x.float().abs().double().flatten()
    values = values[torch.isfinite(values)]
    bins_per_octave = 1 << MANTISSA_BITS
    bottom = 2.0 ** (torch.frexp(largest.double()).exponent.item() - 1 - (OCTAVES - 1))
    mantissa, exponent = torch.frexp(values / bottom)  # mantissa in [0.5, 1)
    bins = (exponent - 1) * bins_per_octave + ((2 * mantissa - 1) * bins_per_octave).floor()
    bins = torch.where(values < bottom, 0.0, bins).long().clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_histogram_holds_every_magnitude(name, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(magnitudes, "_fused", lambda device: None)
    x = draw(name)
    x[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    finite = x[x.isfinite()].double().abs()
    counts = STATISTICS.histogram(x, finite.max().float())
    assert counts.sum() == len(finite)
    unit = 2.0 ** (math.frexp(finite.max())[1] - 1)
    values = magnitudes.bin_magnitudes(x.device) * unit
    assert (values.diff() > 0).all()
    half_a_bin = 1.01 * 2.0 ** -(MANTISSA_BITS + 1)
    for moment in (1, 2):
        assert (counts * values**moment).sum() == pytest.approx(float((finite**moment).sum()), rel=half_a_bin * moment)
    assert torch.equal(counts, expected_histogram(x, finite.max()))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_share_beyond_sigma_against_numpy(axis, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(magnitudes, "_fused", lambda device: None)
    x = draw("laplace", 6 * 50 * 40).reshape(6, 50, 40) + 0.3
    others = {None: (0, 1, 2), 0: (1, 2), -1: (0, 1)}[axis]
    values = x.numpy().astype(np.float64)
    sigma = values.std(others, keepdims=True).astype(np.float32)
    largest, share = STATISTICS.largest_and_share_beyond_sigma(x, axis)
    assert torch.equal(largest, torch.tensor(np.abs(x.numpy()).max(others)))
    torch.testing.assert_close(share, torch.tensor((np.abs(x.numpy()) > sigma).mean(others), dtype=torch.float32))


def test_a_nan_shows_in_the_largest_magnitude():
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(magnitudes, "_fused", lambda device: None)
            for axis in (None, 0, -1):
                x = torch.ones(3, 4)
                x[1, 2] = torch.nan
                assert STATISTICS.largest_and_share_beyond_sigma(x, axis)[0].isnan().any()


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    axis=st.sampled_from([None, 0, -1]),
    special=st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf, -1e-42, -3e38]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_magnitude_takes_one_pass_and_is_the_same(shape, axis, special, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[seed % x.numel()] = special
    measured, expected = STATISTICS.absmax(x, axis), numerics.absmax(x, axis)
    assert measured.shape == expected.shape
    assert torch.equal(measured.nan_to_num(-1.0, -2.0), expected.nan_to_num(-1.0, -2.0))
