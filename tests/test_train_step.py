"""The benchmark of whole training steps: what it checks, times apart, and attributes; no figure of it is asserted."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_int8 import comparison
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.backends.onednn import OneDNN
from lightning_int8.rewrite import conversion_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--model", "small/resnet8", "--size", "12", "--batch-size", "2", "--threads", "1", "--rounds", "2"]
INT8 = ["int8 default", "int8 unified", "int8 default unfused", "int8 default auto", "int8 default bfloat16"]

pytestmark = pytest.mark.filterwarnings("ignore:layers='auto'")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Import a file of ``benchmarks``; what it times is not remembered."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(tmp_path / "layers.json"))
    return importlib.import_module


@pytest.fixture
def training(script):
    """A prepared training of a small network, by the name of its column."""
    columns = script("step_columns")

    def make(name, size=12, samples=2):
        (column,) = (c for c in columns.all_columns(["default"], False) if c.name == name)
        return columns.Training(column, columns.network("small/resnet8"), columns.batch_of(size, samples), 100)

    return make


def test_two_steps_of_each_column(script, tmp_path, capsys):
    output, torchao = tmp_path / "step.json", "torchao int8"
    words = ["--recipes", "default", "unified", "--no-memory", "--output", str(output)]
    assert script("train_step").main([*TINY, *words]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    columns = ["float32", "bfloat16", "int8 default", "int8 unified"]
    columns += [f"int8 default {how}" for how in ("bfloat16", "unfused", "auto")]
    assert [c for c in run["milliseconds"] if c != torchao] == columns
    for column in columns:
        times = run["milliseconds"][column]
        assert times["steps"] == 2
        assert all(0 < times[clock]["minimum"] <= times[clock]["median"] for clock in ("process", "wall"))
    assert {c: t["steps"] for c, t in run["milliseconds_refreshing"].items()} == dict.fromkeys(INT8, 3)  # 1, 2 and 4
    for column in INT8:
        parts = run["milliseconds_by_operation"][column]
        assert min(parts["contractions"], parts["quantize"]) > 0 or run["float_layers"][column]
        assert parts["norm and activation"] > 0
    assert set(run["float_layers"]["int8 unified"]) == {"stem.0", "head"}
    assert run["float_layers"]["int8 default"] == {}
    assert (torchao in run["milliseconds"]) != (torchao in run["without"])
    assert output.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    printed = capsys.readouterr().out
    assert all(column in printed for column in columns)
    if torchao in run["without"]:
        assert f"without {torchao}: No module named" in printed


@pytest.mark.skipif(not OneDNN.fuses, reason="expressions need numba")
def test_passes_that_quantize_are_checked_and_timed(script, tmp_path, monkeypatch):
    quantization, threads = script("quantization"), torch.get_num_threads()
    words = ["--batch-size", "2", "--size", "5", "--rounds", "1", "--output", str(tmp_path / "step.json")]
    try:
        assert quantization.main(words) == 0
        milliseconds = json.loads((tmp_path / "step.json").read_text())["summary"]
        assert len(milliseconds) >= 8
        assert all(value >= 0 for value in milliseconds.values())
        right = OneDNN.quantize
        monkeypatch.setattr(
            OneDNN, "quantize", lambda self, *arguments: right(self, *arguments[:-1], torch.zeros(3).long())
        )
        with pytest.raises(RuntimeError, match="not those of the definition"):
            quantization.main(words)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", ["counts", "loss"])
def test_a_wrong_step_is_not_timed(wrong, script, tmp_path, monkeypatch):
    train_step = script("train_step")
    if wrong == "counts":
        monkeypatch.setattr(train_step, "gemm_counts", lambda model: {})
    else:
        monkeypatch.setattr(train_step, "LOSS_LIMIT", 0.0)
    output = tmp_path / "step.json"
    words = ["--columns", "float32", "int8 default", "--no-memory", "--output", str(output)]
    assert train_step.main([*TINY, *words]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert list(run["milliseconds"]) == ["float32"]
    reason = {"counts": "no layer was converted: it is", "loss": "the first loss is"}[wrong]
    assert reason in run["without"]["int8 default"]
    assert "not timed" in run["without"]["int8 default"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "int4"], "columns: int4: not among float32"),
        (["--model", "resnet9000"], "model: 'resnet9000': neither torchvision nor timm"),
        (["--model", "small/resnet18"], "model: 'small/resnet18': neither"),
        (["--recipes", "nonsense"], "recipe: 'nonsense' is not one of"),
    ],
)
def test_an_error_of_the_user_is_one_line(words, message, script, tmp_path, capsys):
    assert script("train_step").main([*TINY, "--no-memory", "--output", str(tmp_path / "a.json"), *words]) == 2
    assert message in capsys.readouterr().err


def test_medians_minima_ratios_and_shares(script):
    train_step = script("train_step")
    steps = {"float32": [(0.3, 0.4), (0.1, 0.2), (0.2, 0.5)], "int8 default": [(0.05, 0.1), (0.1, 0.1), (0.1, 0.4)]}
    run = {"model": "m", "size": 8, "batch_size": 2, "threads": 2, "refresh": 100}
    run["milliseconds"] = {name: train_step.entry_of(times) for name, times in steps.items()}
    run["milliseconds_refreshing"] = {"int8 default": train_step.entry_of([(0.2, 0.2)])}
    peak, smaller = {"ordinary_step": 300.0, "lasting": 100.0}, {"ordinary_step": 100.0, "lasting": 100.0}
    run["memory_mib"] = {"float32": peak, "int8 default": smaller, "torchao int8": {"without": "a reason"}}
    summary = train_step.summarise([run])["m, 8 x 8, batch 2, 2 threads"]
    assert run["milliseconds"]["float32"]["process"] == {"median": 200.0, "minimum": 100.0}
    assert summary["ratios"]["float32 / int8 default"] == {
        "process median": 2.0,
        "process minimum": 2.0,
        "wall median": 4.0,
        "wall minimum": 2.0,
    }
    assert summary["refreshing"] == {"int8 default": 0.01}  # twice the time, in one of 100 steps
    assert summary["memory"] == {"float32": 1.0, "int8 default": 0.5}


def test_columns_take_their_steps_in_turn(script):
    """And a round that refreshes is told from one that does not."""
    train_step, order = script("train_step"), []

    class Fake:
        def __init__(self, name):
            self.name, self.steps = name, 1

        @property
        def refreshes(self):
            return self.steps in (1, 2, 4)

        def step(self):
            order.append(self.name)
            self.steps += 1

    ordinary, refreshing = train_step.timed({name: Fake(name) for name in "abc"}, 2)
    assert "".join(order) == "abcbcacababc" + "bca"
    assert {len(times) for times in ordinary.values()} == {2}
    assert {len(times) for times in refreshing.values()} == {3}


def test_the_same_step_in_every_column(training):
    losses = {name: float(training(name, samples=16).step()) for name in ("float32", "bfloat16", *INT8[2:])}
    assert max(losses.values()) - min(losses.values()) < 0.05 * losses["float32"]
    assert len(set(losses.values())) >= 3, "precisions differ"
    settings = {name: conversion_of(training(name).model).settings for name in INT8 if name != "int8 unified"}
    assert {name for name, chosen in settings.items() if not chosen.fuse} == {"int8 default unfused"}
    assert {name for name, chosen in settings.items() if chosen.layers == "auto"} == {"int8 default auto"}


def burning(function, seconds):
    """A function that computes for nothing first."""

    def burn(*args, **kwargs):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return function(*args, **kwargs)

    return burn


@pytest.mark.parametrize(
    ("owner", "name", "category", "calls"),
    [
        (OneDNN, "quantize", "quantize", 10 + 1 + 10),  # x and g of ten layers; w of the first
        (OneDNN, "quantize_both", "quantize", 9),  # w of those that are asked for both gradients
        (OneDNN, "_contract", "contractions", 29),
        (nn.functional, "cross_entropy", "rest", 1),
    ],
)
def test_time_goes_to_whoever_takes_it(owner, name, category, calls, script, training, monkeypatch):
    breakdown, one = script("step_breakdown").breakdown, training("int8 default")
    before = breakdown(one, 2)
    burnt = 0.2 if calls == 1 else 0.02
    monkeypatch.setattr(owner, name, burning(getattr(owner, name), burnt))
    after = breakdown(one, 2)
    grown = {part: after[part] - before[part] for part in after}
    milliseconds = 1e3 * burnt * calls
    assert grown.pop("total") > 0.8 * milliseconds
    assert grown.pop(category) > 0.8 * milliseconds
    assert max(grown.values()) < 0.3 * milliseconds
    total = after.pop("total")
    assert sum(after.values()) == pytest.approx(total, rel=0.2)  # medians do not add up exactly


def test_operators_of_torch_are_told_apart(script):
    category_of = script("step_breakdown").category_of
    assert category_of("native_batch_norm_backward") == category_of("threshold_backward") == "norm and activation"
    assert category_of("convolution_backward") == category_of("addmm") == "float contractions"
    assert category_of("_fused_sgd_") == "optimizer"
    assert category_of("cat") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_a_peak_is_that_of_the_step_alone(script):
    peak = script("step_memory")._peak

    def step():
        torch.ones(mebibytes, 2**18).sum()

    for mebibytes in (200, 100, 150):
        assert mebibytes - 2 < peak(SimpleNamespace(forget_gradients=lambda: None, step=step)) < mebibytes + 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_peak_memory_grows_with_what_is_kept(script, monkeypatch):
    """In the process of its own that the benchmark starts."""
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    memory, peaks = script("step_memory"), {}
    for samples in (4, 64):
        words = [*TINY, "--size", "32", "--batch-size", str(samples), "--memory-of", "float32"]
        peaks[samples] = memory.in_its_own_process(str(BENCHMARKS / "train_step.py"), words)
    # ResNet-8 keeps at least six tensors of 16 channels per image, and two or more for each in half the size.
    least = 6 * 16 * 32 * 32 * 4 * 60 / 2**20
    assert peaks[64]["ordinary_step"] - peaks[4]["ordinary_step"] > least
    columns = script("step_columns")
    parameters = sum(p.numel() for p in columns.network("small/resnet8").parameters())
    assert peaks[4]["lasting"] == pytest.approx(2 * 4 * parameters / 2**20, rel=0.05)  # and batch norms' statistics
    with pytest.raises(RuntimeError, match=r"peak memory: .*No such file"):
        memory.in_its_own_process(str(BENCHMARKS / "none.py"), [])


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("resnet18", "torchvision"),
        ("inception_v3", "torchvision"),
        ("convnext_atto", "timm"),
        ("timm/resnet18", "timm"),
    ],
)
def test_networks_of_other_packages(name, library, script):
    pytest.importorskip(library)
    model = script("step_columns").network(name)
    assert type(model).__module__.split(".")[0] == library
    assert model.training
    assert any(
        isinstance(m, nn.Conv2d) and m.weight.is_contiguous(memory_format=torch.channels_last) for m in model.modules()
    )
    logits = model(script("step_columns").batch_of(96, 2)[0])
    assert logits.shape == (2, 1000)
