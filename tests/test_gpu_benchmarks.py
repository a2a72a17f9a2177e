"""The GPU benchmarks without a GPU: what they check, and the code that times with a clock in place of CUDA's events."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator.device import EmulatedDevice
from kernel_cases import needs_compiler

from lightning_int8.kernels import operators

pytestmark = needs_compiler
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Event:
    """CUDA's event on the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3


@pytest.fixture
def clocked(monkeypatch, script):
    """The timed benchmarks' own path, with the emulated machine as the GPU: the figures mean nothing."""
    timing = script("gpu_timing")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(timing, "PEAK_SIZE", 32)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 12)
    target = timing.Target(dry_run=False)
    target.place = torch.device("cpu")
    target._device = lambda family: EmulatedDevice(timing.FAMILIES[family or "imma"])
    return target


KINDS = {"gemm": 8, "convolution": 7, "quantize": 2}
"""Ways that each kind of work is done."""


def test_a_dry_run_checks_every_kernel_and_times_nothing(script, tmp_path, capsys):
    output = tmp_path / "kernels.json"
    assert script("gpu_kernels").main(["--dry-run", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["dry_run"] is True
    assert {run["kind"] for run in record["runs"]} == set(KINDS)
    for run in record["runs"]:
        assert len(run["milliseconds_quartiles"]) == KINDS[run["kind"]]
        assert set(run["milliseconds_quartiles"].values()) == {None}
        assert not run.get("tops")
        assert not run.get("gb_per_s")
        assert not run.get("without")
    assert "TOPS" not in capsys.readouterr().out


def test_a_dry_run_checks_training_steps(script, tmp_path):
    output = tmp_path / "step.json"
    assert script("gpu_train_step").main(["--dry-run", "--output", str(output)]) == 0
    runs = json.loads(output.read_text())["runs"]
    assert [run["network"] for run in runs] == ["resnet8", "mlp4096", "vit_l"]
    for run in runs:
        assert {"int8", "int8 dp4a, float32 around", "bfloat16", "float32"} <= set(run["milliseconds_quartiles"])
        assert set(run["milliseconds_quartiles"].values()) == {None}


@pytest.mark.models
@pytest.mark.parametrize("name", ["squeezenet1_1", "test_resnet.r160_in1k"])
def test_a_dry_run_of_any_model_of_torchvision_and_timm(script, tmp_path, name):
    library = pytest.importorskip("timm" if "." in name else "torchvision")
    output = tmp_path / "step.json"
    assert script("gpu_train_step").main(["--dry-run", "--model", name, "--output", str(output)]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert (run["network"], run["batch"]) == (name, 2)
    assert "int8" in run["milliseconds_quartiles"], library.__version__


def test_the_networks_have_the_sizes_that_they_are_named_for(script):
    networks = script("gpu_networks")
    with torch.device("meta"):
        works = {name: networks.workload(name, None, dry_run=False) for name in ("mlp4096", "vit_l")}
    sizes = {name: networks.parameters_in_millions(work.model) for name, work in works.items()}
    assert sizes["mlp4096"] == pytest.approx(6 * 4096**2 / 1e6, rel=0.05)
    assert sizes["vit_l"] == pytest.approx(304, rel=0.01)  # ViT-L/16 without its patch embedding
    assert works["vit_l"].shape == (64, 197, 1024)
    assert networks.workload("mlp4096", 7, dry_run=False).shape == (7, 4096)


def test_a_model_that_nobody_knows_is_named(script, capsys):
    with pytest.raises(SystemExit):
        script("gpu_train_step").main(["--dry-run", "--model", "resnet9000"])
    assert "'resnet9000' is not one of mlp4096, vit_l, " in capsys.readouterr().err


def test_a_dry_run_leaves_the_results_alone(script, tmp_path, monkeypatch, capsys):
    kernels = script("gpu_kernels")
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    assert kernels.main(["--dry-run", "--only", "quantize"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing written" in capsys.readouterr().out


@pytest.mark.parametrize("contraction", ["output", "grad_input", "grad_weight"])
def test_a_wrong_kernel_is_not_timed(script, tmp_path, monkeypatch, contraction):
    product = operators.gemm

    def wrong(device, which, a, b, result):
        made = product(device, which, a, b, result)
        made[-1, -1] += which == contraction
        return made

    monkeypatch.setattr(operators, "gemm", wrong)
    with pytest.raises(RuntimeError, match="cupy is wrong: it is not timed"):
        script("gpu_kernels").main(["--dry-run", "--only", "gemm", "--output", str(tmp_path / "wrong.json")])


def test_a_step_with_a_wrong_loss_or_count_is_not_timed(script, tmp_path, monkeypatch):
    step = script("gpu_train_step")
    arguments = ["--dry-run", "--output", str(tmp_path / "wrong.json")]
    monkeypatch.setattr(step, "gemm_counts", lambda model: {})
    with pytest.raises(RuntimeError, match="int8: no layer was converted: it is not timed"):
        step.main(arguments)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(step, "LOSS_LIMIT", 0.0)
    with pytest.raises(RuntimeError, match="int8: the first loss is"):
        step.main(arguments)


def test_nan_and_large_errors_do_not_pass(script):
    timing = script("gpu_timing")
    expected = torch.ones(3)
    timing.check_close("a", expected * 1.001, expected, 1e-2)
    for wrong in (expected * 1.1, expected * torch.nan):
        with pytest.raises(RuntimeError, match="a is wrong by"):
            timing.check_close("a", wrong, expected, 1e-2)


def test_the_timed_path_of_the_kernels(script, clocked):
    kernels = script("gpu_kernels")
    ceilings = clocked.ceilings(5)
    assert set(ceilings) == {"int8_tops", "bfloat16_tops", "copy_gb_per_s"}
    runs = []
    for kind in KINDS:
        for shape in kernels.SMALLEST[kind]:
            for entry in getattr(kernels, kind)(clocked, shape, 4):
                assert all(len(q) == 3 and 0 < q[0] <= q[1] <= q[2] for q in entry["milliseconds_quartiles"].values())
                # 1 TOPS is 1e12 operations a second: figures this small need ceilings of their own.
                ones = dict.fromkeys(ceilings, 1.0)
                runs.append(entry | {"kind": kind, "shape": list(shape), "ceilings": ones})
                assert any(unit in kernels.describe(runs[-1]) for unit in ("TOPS", "GB/s"))
    summary = kernels.summarise(runs)
    assert len(summary) == len(runs) == 8
    assert set(summary["quantize stochastic (40, 70)"]["share_of_measured_peak"]) == {"float32", "bfloat16"}


def test_rates_are_operations_over_the_median(script, clocked, monkeypatch):
    kernels = script("gpu_kernels")
    monkeypatch.setattr(type(clocked), "milliseconds", lambda self, calls, repeats: [0.001, 0.002, 0.003])
    (entry, *_) = kernels.gemm(clocked, (100, 100, 100), 1)
    assert entry["tops"]["torch._int_mm"] == 1.0  # 2e6 operations in 2 µs
    (entry, *_) = kernels.quantize(clocked, (100, 20), 1)
    assert entry["gb_per_s"] == {"float32": 5.0, "bfloat16": 3.0}  # 4 or 2 bytes read and 1 written


def test_the_timed_path_of_a_step(script, clocked):
    step = script("gpu_train_step")
    work = script("gpu_networks").workload("resnet8", None, dry_run=True)
    entry = step.measure(clocked, work, 3) | {"network": "resnet8"}
    assert "int8 " in step.describe(entry)
    ratios = step.summarise([entry])["resnet8"]
    medians = {name: q[1] for name, q in entry["milliseconds_quartiles"].items()}
    assert ratios["bfloat16 / int8"] == round(medians["bfloat16"] / medians["int8"], 3)


def test_operands_outgrow_the_cache(clocked):
    assert clocked.sets(bytes_of_one=500) == 7
    assert clocked.sets(bytes_of_one=10**9) == 1


# --- plots ---------------------------------------------------------------------------------------------------------


def test_plots_show_what_was_measured(script, tmp_path):
    pytest.importorskip("matplotlib")
    plots, kernels, step = (script(name) for name in ("gpu_plots", "gpu_kernels", "gpu_train_step"))
    ceilings = {"int8_tops": 100.0, "bfloat16_tops": 50.0, "copy_gb_per_s": 1000.0}
    common = {"ceilings": ceilings, "contraction": "output", "kind": "gemm"}
    runs = [common | {"shape": [n, n, n], "tops": {"cupy": 0.5 * n, "bfloat16": 0.25 * n}} for n in (64, 32, 64)]
    runs.append({"ceilings": ceilings, "contraction": "nearest", "kind": "quantize", "shape": [100, 10]})
    runs[-1]["gb_per_s"] = {"float32": 800.0}
    record = {"machine": {"device": "a GPU"}, "dry_run": False, "runs": runs, "summary": kernels.summarise(runs)}
    assert plots.shares(record) == {
        "gemm output": {
            "cupy": [(2 * 32**3, 0.16), (2 * 64**3, 0.32)],
            "bfloat16": [(2 * 32**3, 0.16), (2 * 64**3, 0.32)],
        },
        "quantize nearest": {"float32": [(5000, 0.8)]},
    }
    times = {"int8": [1.0, 2.0, 3.0], "bfloat16": [2.0, 3.0, 4.0], "torchao int8": None}
    steps = [{"network": "resnet50", "milliseconds_quartiles": times}]
    stepped = record | {"runs": steps, "summary": step.summarise(steps)}
    assert plots.ratios(stepped) == {"resnet50": {"int8": 1.0, "bfloat16": 1.5}}
    files = [tmp_path / "kernels.json", tmp_path / "steps.json"]
    for file, content in zip(files, (record, stepped), strict=True):
        file.write_text(json.dumps(content))
    assert plots.main([str(f) for f in files]) == 0
    assert all(f.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" for f in files)


def test_a_dry_run_is_not_drawn(script, tmp_path, capsys):
    plots, output = script("gpu_plots"), tmp_path / "dry.json"
    assert script("gpu_kernels").main(["--dry-run", "--only", "quantize", "--output", str(output)]) == 0
    with pytest.raises(SystemExit):
        plots.main([str(output)])
    assert "has no times" in capsys.readouterr().err
