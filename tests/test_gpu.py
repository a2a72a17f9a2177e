"""What the CuPy backend must do on a GPU beyond single contractions; the same tests run on the emulated machine."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import Digits, read_digits
from hypothesis import given, settings
from kernel_cases import random_plane
from test_checkpoint import Resumable
from test_kernels_quantize import cases as quantize_cases
from test_kernels_quantize import equal_planes

from lightning_int8 import Int8Precision, Recipe, backends, convert, gemm_counts, numerics
from lightning_int8.kernels.cuda_device import cuda_device
from lightning_int8.rewrite import layer_states
from lightning_int8.spec import ContractionSpec, OperandSpec
from lightning_int8.vision.required import contractions_of_a_run, contractions_of_one_step, mismatches

STEPS = 2
WEIGHT_DRIFT = 0.05
"""Largest change of a weight, relative to the largest of its tensor, when some of its steps ran on a GPU: batch norm
sums in another order there, which moves single roundings."""

_GRADIENT = OperandSpec(rounding="stochastic")
_CHANNELS = OperandSpec(per="channel")
INTERVAL = Recipe(
    name="interval",
    output=ContractionSpec(lhs=OperandSpec(), rhs=_CHANNELS),
    grad_input=ContractionSpec(lhs=_GRADIENT, rhs=_CHANNELS),
    grad_weight=ContractionSpec(lhs=_GRADIENT, rhs=OperandSpec()),
)
"""`default` with all ranges refreshed at the interval, those of the weights too."""


@settings(deadline=None, max_examples=40)
@given(quantize_cases())
def test_planes_are_those_of_the_definition(machine, case):
    x, clip_value, spec, axis, key, _ = case
    expected = numerics.quantize(
        x,
        clip_value,
        bits=spec.bits,
        affine=spec.affine,
        axis=axis,
        stochastic=spec.rounding == "stochastic",
        key=key,
    )
    equal_planes(machine.backend.quantize(x.to(machine.place), clip_value.to(machine.place), spec, axis, key), expected)


def test_work_on_two_streams_does_not_mix(machine):
    operands = [(random_plane((70, 200)), random_plane((50, 200))) for _ in range(2)]
    truth = backends.load("reference")
    made, streams = [], []
    for a, b in operands:
        on_device = [type(p)(p.data.to(machine.place), p.scale.to(machine.place)) for p in (a, b)]
        with machine.stream() as stream:
            made += [machine.backend.accumulate("output", *on_device, None) for _ in range(3)]
        streams.append(stream)
    machine.join(streams)
    for i, (a, b) in enumerate(operands):
        for sums in made[3 * i : 3 * i + 3]:
            assert torch.equal(sums.cpu(), truth.accumulate("output", a, b, None))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_the_second_device_computes_while_the_first_is_current():
    second, (a, b) = torch.device("cuda", 1), (random_plane((70, 200)), random_plane((50, 200)))
    on_device = [type(p)(p.data.to(second), p.scale.to(second)) for p in (a, b)]
    sums = backends.load("cupy").accumulate("output", *on_device, None)
    assert sums.device == second
    assert torch.equal(sums.cpu(), backends.load("reference").accumulate("output", a, b, None))
    assert cuda_device(1) is not cuda_device(0)


# --- steps ---------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    )


def steady(machine, recipe):
    """A step of a converted network whose ranges are measured and whose kernels are compiled."""
    model = network().to(machine.place)
    convert(model, recipe=recipe, backend="cupy")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(4, 3, 6, 6).to(machine.place)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(5):  # ranges are measured at steps 0, 1, 2, 4 and next at 8
        step()
    return step


def test_the_host_does_not_wait_in_a_step_between_refreshes(machine):
    with machine.chosen():
        step = steady(machine, INTERVAL)
        with machine.no_waits():
            step()
            step()


def test_the_host_does_not_wait_in_a_step_of_the_default_recipe(machine):
    with machine.chosen():
        step = steady(machine, "default")
        with machine.no_waits():
            step()
            step()


@pytest.mark.parametrize("wait", [lambda x: float(x[0]), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0]])
def test_a_wait_would_be_seen(machine, wait):
    x = torch.ones(3).to(machine.place)
    with machine.no_waits(), pytest.raises(RuntimeError):
        wait(x)


def test_a_captured_step_draws_fresh_noise(machine):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24)).to(machine.place)
    x = torch.randn(30, 40).to(machine.place).requires_grad_()
    gradient = torch.randn(30, 24).to(machine.place)
    with machine.chosen():
        convert(model, recipe=INTERVAL, backend="cupy")

        def step():
            return torch.autograd.grad(model(x), [x, model[0].weight], gradient)

        step()
        replay = machine.capture(step)
        first, second = ([t.cpu() for t in replay()] for _ in range(2))
    exact = (gradient @ model[0].weight).cpu().detach(), (gradient.t() @ x).cpu().detach()
    for a, b, truth in zip(first, second, exact, strict=True):
        assert not torch.equal(a, b)
        for made in (a, b):
            assert (made - truth).norm() / truth.norm() < 0.05


# --- whole runs ----------------------------------------------------------------------------------------------------


def fit(machine, make_trainer, steps, **arguments):
    """Train on the machine, or by oneDNN where ``machine`` is None; returns the model and its trainer."""
    # Fused passes of the CPU add in another order than torch's batch norm, which the machine uses.
    model, plugin = Resumable(), Int8Precision(backend="onednn" if machine is None else "cupy", fuse=False)
    trainer = make_trainer(
        plugin,
        accelerator="cpu" if machine is None else machine.accelerator,
        devices=1,
        max_epochs=9,
        max_steps=steps,
        limit_val_batches=0,
    )
    with contextlib.nullcontext() if machine is None else machine.chosen():
        trainer.fit(model, **arguments)
    return model, trainer


def test_a_run_makes_exactly_the_contractions_that_autograd_asks_for(machine, make_trainer):
    model, trainer = fit(machine, make_trainer, STEPS)
    one = contractions_of_one_step(Digits().net, read_digits()[0][:2])
    required = contractions_of_a_run({f"net.{name}": count for name, count in one.items()}, STEPS, 0)
    assert mismatches(gemm_counts(model), required, trainer.precision_plugin.recipe) == []
    assert {backend for state in layer_states(model) for backend, _ in state.counts} == {"cupy"}


def itinerary(machine, make_trainer, folder):
    """Train on the machine, on the CPU and on the machine again, from checkpoint to checkpoint."""
    there, here = folder / "there.ckpt", folder / "here.ckpt"
    fit(machine, make_trainer, STEPS)[1].save_checkpoint(there)
    fit(None, make_trainer, 2 * STEPS, ckpt_path=there)[1].save_checkpoint(here)
    return fit(machine, make_trainer, 3 * STEPS, ckpt_path=here)[0]


def test_a_checkpoint_goes_from_the_gpu_to_the_cpu_and_back(machine, make_trainer, tmp_path):
    travelled, stayed = itinerary(machine, make_trainer, tmp_path), itinerary(None, make_trainer, tmp_path)
    for a, b in zip(layer_states(travelled), layer_states(stayed), strict=True):
        for slot, operand in a.operands.items():
            assert torch.equal(operand.key.cpu(), b.operands[slot].key)
            assert operand.key[2] == 3 * STEPS
    for a, b in zip(travelled.parameters(), stayed.parameters(), strict=True):
        if machine.on_gpu:
            assert (a.cpu() - b).abs().max() <= WEIGHT_DRIFT * b.abs().max()
        else:
            assert torch.equal(a, b)


# --- the sanitizers of a GPU ---------------------------------------------------------------------------------------

SCRIPT = Path(__file__).with_name("gpu_sanitizer.sh")


def test_the_sanitizer_script_says_what_it_needs(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(["bash", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "compute-sanitizer is missing" in done.stderr


def test_the_sanitizer_script_runs_both_tools_and_passes_failures_on(tmp_path):
    log, fake = tmp_path / "log", tmp_path / "compute-sanitizer"
    fake.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {log}\ncase "$*" in *racecheck*) exit 9;; esac\n'
    )
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = log.read_text().splitlines()
    assert [line.split("--tool ")[1].split()[0] for line in lines] == ["memcheck", "racecheck"]
    assert all(line.startswith("1 ") and "-m gpu" in line for line in lines)
