"""The command ``train``: what it prints, writes and returns, and that its counts can be trusted."""

import functools
import itertools
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from torch import nn

from lightning_int8 import comparison, recipes
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.cli import main
from lightning_int8.cli.train import check_counts, summary
from lightning_int8.recipe_mapping import recipe_from_mapping
from lightning_int8.vision import experiment
from lightning_int8.vision.experiment import Result, Settings, StepClock, run, trainer_precision
from lightning_int8.vision.models import MODELS
from lightning_int8.vision.readers import ImageSet, read_mnist_5k
from lightning_int8.vision.required import contractions_of_a_run, contractions_of_one_step, mismatches

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ["--max-steps", "3", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def undo_what_a_program_sets():
    """Give later tests the environment and the loggers that they had."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def few_images(monkeypatch):
    """Make the command train and test on 256 and 100 of the digits."""
    images = read_mnist_5k()
    few = ImageSet(
        train_images=images.train_images[:256],
        train_labels=images.train_labels[:256],
        test_images=images.test_images[:100],
        test_labels=images.test_labels[:100],
    )
    monkeypatch.setitem(sys.modules["lightning_int8.cli.train"].READERS, "mnist-5k", lambda root: few)
    return few


def total(counts):
    return {c: sum(count[c] for count in counts.values()) for c in ("output", "grad_input", "grad_weight")}


# What the command does


def test_train_runs_int8_and_proves_it_by_counts(few_images, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert main(["train", *SHORT, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "counts equal to the contractions autograd required: yes" in printed
    assert "left in float" not in printed
    record = json.loads(output.read_text())
    result = record["results"]["int8"]
    # ResNet-8 has 10 layers; 3 training steps and 1 test step; the stem's input needs no gradient.
    assert total(result["counted"]) == {"output": 40, "grad_input": 27, "grad_weight": 30}
    assert result["counted"]["network.stem.0"] == {"output": 4, "grad_input": 0, "grad_weight": 3}
    assert result["steps"] == 3
    assert record["count_mismatches"] == []
    assert record["settings"]["max_steps"] == 3


def test_auto_says_which_layers_are_float_and_counts_them_so(few_images, tmp_path, capsys, monkeypatch):
    output = tmp_path / "result.json"
    monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(tmp_path / "layers.json"))
    slower_by_layer = itertools.cycle([(1.0, 2.0), (2.1, 1.6)])
    monkeypatch.setattr(comparison, "shortest", lambda *_: next(slower_by_layer))
    assert main(["train", *SHORT, "--layers", "auto", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "float after the first step: INT8 would take 1.31 times as long (2100.0 against 1600.0 ms)" in printed
    assert "counts equal to the contractions autograd required: yes" in printed
    record = json.loads(output.read_text())
    result = record["results"]["int8"]
    assert record["layers"] == "auto"
    assert 0 < len(result["kept_float"]) < len(result["counted"]) == 10
    assert {result["counted"][name]["output"] for name in result["kept_float"]} == {1}


def test_compare_trains_float_and_int8_and_gives_the_difference(few_images, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert main(["train", "--compare", *SHORT, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["float", "int8"]
    assert results["float"]["counted"] == {}
    points = results["int8"]["test_accuracy"] - results["float"]["test_accuracy"]
    assert f"int8 against float: {points:+.2f} points" in capsys.readouterr().out


def test_float_and_int8_of_one_seed_start_alike_and_see_the_same_batches(few_images, monkeypatch):
    seen = {}

    class Witness(StepClock):
        def on_train_start(self, trainer, module):
            super().on_train_start(trainer, module)
            self.batches = []
            seen[len(seen)] = (torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()]), self.batches)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            self.batches.append((batch[0].sum().item(), batch[1].tolist()))

    monkeypatch.setattr(experiment, "StepClock", Witness)
    settings = Settings(epochs=2, max_steps=6, seed=5, accelerator="cpu")
    for precision in ("float", "int8"):
        run(settings, few_images, trainer_precision(precision), progress=False)
    run(
        Settings(epochs=2, max_steps=6, seed=6, accelerator="cpu"),
        few_images,
        trainer_precision("float"),
        progress=False,
    )
    assert torch.equal(seen[0][0], seen[1][0])
    assert len(seen[0][1]) == 6
    assert seen[0][1] == seen[1][1]
    assert not torch.equal(seen[0][0], seen[2][0])
    assert seen[0][1] != seen[2][1]


def test_a_checkpoint_holds_the_trained_weights_under_their_float_names(few_images, tmp_path):
    path = tmp_path / "trained.ckpt"
    assert main(["train", *SHORT, "--checkpoint", str(path)]) == 0
    checkpoint = torch.load(path, weights_only=True)
    network = MODELS["resnet8"](1, 10)
    weights = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
    network.load_state_dict(weights)
    assert checkpoint["global_step"] == 3


def test_bf16_and_the_reference_backend_run(few_images, capsys):
    assert main(["train", *SHORT, "--precision", "bf16"]) == 0
    assert "autograd required" not in capsys.readouterr().out
    assert main(["train", *SHORT, "--backend", "reference", "--max-steps", "1"]) == 0
    assert "reference backend makes no INT8 contractions" in capsys.readouterr().out


def test_a_wrong_count_is_listed_and_fails(few_images, capsys, monkeypatch):
    counted = experiment.gemm_counts

    def one_less(module):
        counts = counted(module)
        counts["network.head"]["grad_weight"] -= 1
        return counts

    monkeypatch.setattr(experiment, "gemm_counts", one_less)
    assert main(["train", *SHORT]) == 1
    printed = capsys.readouterr().out
    assert "counts equal to the contractions autograd required: no" in printed
    assert "network.head grad_weight: 2 INT8 contractions, 3 required" in printed


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    output = tmp_path / "result.json"
    words = ["train", "--max-steps", "2", "--accelerator", "cpu", "--devices", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_int8.cli", *words, "--output", str(output)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("counts equal to the contractions autograd required: yes") == 1, "rank 0 alone reports"
    record = json.loads(output.read_text())
    # 1,000 test images on two ranks, 500 a batch: one step each.
    assert total(record["results"]["int8"]["counted"]) == {"output": 30, "grad_input": 18, "grad_weight": 20}
    assert record["threads"] == 1


# User's own module and data


def test_config_hands_over_to_lightningcli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = ["--config", str(EXAMPLES / "config.yaml"), "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
    assert main(["train", *config, "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert "class_path: mnist.DigitNet" in saved.read_text()
    assert "Int8Precision" in saved.read_text()
    capsys.readouterr()
    assert main(["train", "validate", *config]) == 0
    assert "val_accuracy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:layers='auto'")
def test_a_configuration_can_leave_the_choice_of_layers_to_timing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (EXAMPLES / "config.yaml").read_text().replace("recipe: default", "layers: auto")
    config = tmp_path / "auto.yaml"
    config.write_text(text)
    monkeypatch.setattr(comparison, "REMEMBERED", ChoiceFile(tmp_path / "layers.json"))
    monkeypatch.syspath_prepend(EXAMPLES)
    short = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    assert main(["train", "--config", str(config), *short, "--trainer.limit_val_batches=0"]) == 0
    entries = json.loads((tmp_path / "layers.json").read_text())["machines"]
    assert sum(map(len, entries.values())) >= 1  # something was timed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.plugins.init_args.recipe=nonsense"], "recipe: 'nonsense' is not one of"),
        (["--trainer.precision=16-mixed"], "Received both `precision=16-mixed` and `plugins="),
    ],
)
def test_a_configuration_that_cannot_be_built_is_an_error_of_the_user(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["train", "--config", str(EXAMPLES / "config.yaml"), "--trainer.accelerator=cpu", *words]) == 2
    error = capsys.readouterr().err
    assert "the configuration cannot be built" in error
    assert message in error


def test_the_example_runs_as_a_script(tmp_path, monkeypatch, capsys):
    short = functools.partial(lightning.pytorch.Trainer, limit_train_batches=2, limit_val_batches=1, accelerator="cpu")
    monkeypatch.setattr(lightning.pytorch, "Trainer", short)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "mnist.py"), run_name="__main__")
    # Four epochs of two steps, a validation step before them and one after each.
    assert "network.0    {'output': 13, 'grad_input': 0, 'grad_weight': 8}" in capsys.readouterr().out


# Errors of the user


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs: 0 must be at least 1"),
        (["--batch-size", "-3"], "batch_size: -3 must be at least 1"),
        (["--devices", "0"], "devices: 0 must be at least 1"),
        (["--max-steps", "0"], "max_steps: 0 must be at least 1"),
        (["--lr", "nan"], "lr: nan must be positive"),
        (["--lr", "inf"], "lr: inf must be positive and finite"),
        (["--seed", "-1"], "seed: -1 must not be negative"),
        (["--threads", "0"], "--threads: 0 must be at least 1"),
        (["--recipe", "nonsense"], "recipe: 'nonsense' is not one of"),
        (["--recipe", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
        (["--precision", "float", "--compare"], "it got --precision float"),
        (["--data", "cifar10"], "needs --root"),
        (["--data", "fashion-mnist", "--root", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere/x.ckpt"], "nowhere/x.ckpt cannot be written"),
        (["--output", "."], ". cannot be written"),
        (["--config", "nowhere.yaml"], "--config: nowhere.yaml does not exist"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lightning-int8 train: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that there is no GPU")
def test_a_missing_gpu_is_an_error_of_the_user(few_images, capsys):
    assert main(["train", "--accelerator", "gpu"]) == 2
    assert "No supported gpu backend found" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fly"], ["train", "--model", "resnet9"], ["train", "--precision", "int4"]])
def test_an_unknown_word_leaves_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_names_the_commands_and_options(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 0
    assert ("--compare" if "train" in words else "train") in capsys.readouterr().out


# The independent count


class Shared(nn.Module):
    """One layer used twice, one frozen, one whose result is not used, one that only evaluation calls."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(1, 1, 3, padding=1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.evaluated = nn.Linear(4, 4)

    def forward(self, x):
        x = self.twice(self.twice(x))
        self.unused(x)
        return self.frozen(x) if self.training else self.evaluated(x)


def test_autograd_is_asked_what_each_layer_needs():
    network = Shared().eval()
    counts = contractions_of_one_step(network, torch.randn(2, 1, 4, 4))
    assert counts == {
        "twice": {"output": 2, "grad_input": 1, "grad_weight": 2},
        "frozen": {"output": 1, "grad_input": 1, "grad_weight": 0},
        "unused": {"output": 1, "grad_input": 0, "grad_weight": 0},
        "evaluated": {"output": 0, "grad_input": 0, "grad_weight": 0},
    }
    assert not network.training
    assert all(p.grad is None for p in network.parameters())
    assert not network.twice._forward_hooks


def test_a_run_adds_forward_contractions_alone_for_evaluation():
    step = {"a": {"output": 2, "grad_input": 1, "grad_weight": 2}}
    assert contractions_of_a_run(step, 10, 3) == {"a": {"output": 26, "grad_input": 10, "grad_weight": 20}}


def wide_recipe():
    wide = {"lhs": {"bits": 16}}
    return recipes.get("default"), recipe_from_mapping({"name": "wide", "grad_weight": wide})


def test_a_two_plane_operand_doubles_what_is_required():
    required = {"a": {"output": 3, "grad_input": 2, "grad_weight": 2}}
    narrow, wide = wide_recipe()
    assert mismatches(required, required, narrow) == []
    assert mismatches(required, required, wide) == ["a grad_weight: 2 INT8 contractions, 4 required"]
    doubled = {"a": {"output": 3, "grad_input": 2, "grad_weight": 4}}
    assert mismatches(doubled, required, wide) == []


def test_no_converted_layer_at_all_is_a_mismatch():
    required = {"a": {"output": 3, "grad_input": 2, "grad_weight": 2}}
    assert mismatches({}, required, recipes.get("default")) == ["no layer was converted"]


def result(accuracy, step, counted=None, required=None):
    return Result(
        test_accuracy=accuracy,
        train_seconds=2.0,
        step_milliseconds=step,
        steps=4,
        counted=counted or {},
        required=required or {},
    )


def test_the_summary_gives_speed_and_points_against_float():
    count = {"a": {"output": 1500, "grad_input": 2, "grad_weight": 3}}
    text = summary({"float": result(97.5, 30.0), "int8": result(97.25, 20.0, count)})
    row = next(line for line in text.splitlines() if line.startswith("int8 "))
    assert row.split() == ["int8", "97.25", "%", "2.0", "s", "20.0", "ms", "1.50x", "1,500", "2", "3"]
    assert "int8 against float: -0.25 points" in text
    alone = summary({"int8": result(97.25, 20.0, count)})
    assert "points" not in alone


def test_layers_that_stayed_in_float_are_named(capsys):
    count = {"output": 1, "grad_input": 1, "grad_weight": 1}
    assert check_counts(result(1, 1, {"b": count}, {"a": count, "b": count}), recipes.get("default")) == []
    assert "layers left in float: a\n" in capsys.readouterr().out


# The accuracy benchmark


@pytest.fixture
def accuracy(monkeypatch):
    """Import ``benchmarks/accuracy.py``."""
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    import accuracy

    return accuracy


def test_the_benchmark_keeps_finished_runs_and_goes_on(accuracy, few_images, tmp_path, capsys, monkeypatch):
    path = tmp_path / "accuracy.json"
    words = ["--data", "mnist-5k", "--max-steps", "1", "--recipes", "float", "default", "--output", str(path)]
    assert accuracy.main([*words, "--seeds", "0"]) == 0
    first = json.loads(path.read_text())
    assert [(entry["seed"], entry["recipe"]) for entry in first["runs"]] == [(0, "float"), (0, "default")]
    assert first["runs"][1]["contractions"] == {"output": 20, "grad_input": 9, "grad_weight": 10}
    assert first["runs"][1]["count_mismatches"] == first["runs"][1]["left_in_float"] == []
    assert {"date", "commit", "command"} <= first["runs"][0].keys()
    assert {"device", "threads", "torch"} <= first["machine"].keys()

    measure, cut = accuracy.measure, []

    def cut_off(*arguments):
        if cut:
            raise KeyboardInterrupt
        cut.append(True)
        return measure(*arguments)

    monkeypatch.setattr(accuracy, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        accuracy.main([*words, "--seeds", "0", "1"])
    kept = json.loads(path.read_text())
    assert kept["runs"][:2] == first["runs"]
    assert [(entry["seed"], entry["recipe"]) for entry in kept["runs"][2:]] == [(1, "float")]

    monkeypatch.setattr(accuracy, "measure", measure)
    capsys.readouterr()
    assert accuracy.main([*words, "--seeds", "0", "1"]) == 0
    assert "against float" in capsys.readouterr().out
    whole = json.loads(path.read_text())
    assert whole["runs"][:3] == kept["runs"]
    assert len(whole["runs"]) == 4
    assert whole["summary"]["default"]["pairs"] == 2

    assert accuracy.main([*words, "--seeds", "2", "--lr", "0.5"]) == 2
    assert "give another --output" in capsys.readouterr().err
    assert json.loads(path.read_text()) == whole


def test_the_interval_is_students_t_of_the_paired_differences(accuracy):
    stats = pytest.importorskip("scipy.stats")
    float_, int8 = [91.9, 92.1, 91.7, 92.0, 91.8], [91.6, 92.2, 91.5, 91.9, 91.9]
    runs = [{"seed": seed, "recipe": "float", "test_accuracy": a} for seed, a in enumerate(float_)]
    runs += [{"seed": seed, "recipe": "default", "test_accuracy": a} for seed, a in enumerate(int8)]
    runs += [{"seed": 9, "recipe": "default", "test_accuracy": 10.0}]
    line = accuracy.summarise(runs)["default"]
    low, high = stats.ttest_rel(int8, float_).confidence_interval(0.95)
    assert line["pairs"] == 5
    assert line["difference"] == pytest.approx((low + high) / 2, abs=1e-3)
    assert line["half_width_95"] == pytest.approx((high - low) / 2, abs=1e-3)
    assert [round(stats.t.ppf(0.975, n), 3) for n in range(1, 31)] == accuracy.T_95
