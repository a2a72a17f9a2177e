"""The Fabric twin of the plugin: conversion in `setup`, and the state that Fabric leaves to its user."""

import importlib.util

import pytest
import torch
from conftest import BATCH, network, read_digits, same, snapshot
from lightning.fabric import Fabric
from torch import nn

from lightning_int8 import Int8Precision as TrainerInt8Precision
from lightning_int8 import gemm_counts, restore
from lightning_int8.fabric import Int8Precision
from lightning_int8.layers import Int8Conv2d, Int8Linear
from lightning_int8.rewrite import conversion_of

STEPS = 5


def set_up(precision, seed=0, fabric_class=Fabric):
    fabric = fabric_class(accelerator="cpu", plugins=[precision])
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return fabric, *fabric.setup(model, optimizer)


def train(fabric, model, optimizer, steps, clip=None):
    images, labels = read_digits()
    for step in steps:
        rows = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()


def test_setup_converts_in_place_and_training_runs_int8():
    precision = Int8Precision(skip="5")
    fabric, model, optimizer = set_up(precision)
    assert type(model.module[0]) is Int8Conv2d
    assert [r.converted for r in precision.reports] == [["0", "4"]]
    before = snapshot(model.module)
    train(fabric, model, optimizer, range(STEPS))
    assert gemm_counts(model.module)["4"] == {"output": STEPS, "grad_input": STEPS, "grad_weight": STEPS}
    assert conversion_of(model.module).clock.steps == STEPS
    weights = {name: p for name, p in model.module.named_parameters() if "weight" in name}
    assert all(w.isfinite().all() and not torch.equal(w, before[name]) for name, w in weights.items())
    restore(model)
    assert type(model.module[0]) is nn.Conv2d


@pytest.mark.parametrize("high_precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_high_precision(high_precision):
    fabric, model, optimizer = set_up(Int8Precision(high_precision=high_precision))
    inside = []
    model.module[5].register_forward_hook(lambda *a: inside.append(a[2].dtype))
    train(fabric, model, optimizer, range(STEPS))
    expected = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[high_precision]
    assert set(inside) == {expected}
    assert model(torch.zeros(1, 1, 8, 8)).dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradient_clipping():
    fabric, model, optimizer = set_up(Int8Precision())
    train(fabric, model, optimizer, range(STEPS), clip=1e-3)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() <= 1.001e-3


def test_fabric_and_the_plain_function_train_alike():
    from lightning_int8 import convert

    fabric, model, optimizer = set_up(Int8Precision(seed=4))
    train(fabric, model, optimizer, range(STEPS))
    plain, (images, labels) = network(), read_digits()
    convert(plain, seed=4)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images[rows]), labels[rows]).backward()
        optimizer.step()
    assert same(snapshot(plain), snapshot(model.module))


@pytest.mark.parametrize("high_precision", ["32-true", "16-mixed"])
def test_a_resumed_run_goes_on_bit_for_bit(high_precision, tmp_path):
    def new(seed=0):
        precision = Int8Precision(high_precision=high_precision, refresh=3)
        return precision, *set_up(precision, seed)

    precision, fabric, model, optimizer = new()
    train(fabric, model, optimizer, range(STEPS))
    state = {"model": model, "optimizer": optimizer, "precision": precision.state_dict()}
    fabric.save(tmp_path / "a.ckpt", state)
    train(fabric, model, optimizer, range(STEPS, 2 * STEPS))
    uninterrupted = [snapshot(model), precision.state_dict()]

    precision, fabric, model, optimizer = new(seed=9)
    state = {"model": model, "optimizer": optimizer, "precision": None}
    fabric.load(tmp_path / "a.ckpt", state)
    precision.load_state_dict(state["precision"])
    train(fabric, model, optimizer, range(STEPS, 2 * STEPS))
    assert same([snapshot(model), precision.state_dict()], uninterrupted)


def test_a_fabric_checkpoint_loads_into_the_float_model(tmp_path):
    fabric, model, optimizer = set_up(Int8Precision())
    train(fabric, model, optimizer, range(1))
    fabric.save(tmp_path / "a.ckpt", {"model": model})
    twin = network(seed=9)
    twin.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["model"], strict=True)
    assert same(snapshot(twin), snapshot(model.module))


def test_two_models_of_one_fabric_each_have_their_state():
    precision = Int8Precision()
    fabric = Fabric(accelerator="cpu", plugins=[precision])
    first, second = fabric.setup(network()), fabric.setup(nn.Sequential(nn.Linear(10, 2)))
    assert [r.converted for r in precision.reports] == [["0", "4", "5"], ["0"]]
    fabric.backward(second(first(torch.randn(4, 1, 8, 8))).sum())
    assert type(second.module[0]) is Int8Linear
    state = precision.state_dict()
    assert [list(s["layers"]) for s in state["int8"]] == [["0", "4", "5"], ["0"]]

    other = Int8Precision()
    Fabric(accelerator="cpu", plugins=[other]).setup(network())
    before = other.state_dict()
    with pytest.raises(ValueError, match="2 models saved, 1 set up"):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)


def test_a_state_that_fits_one_model_of_two_changes_neither():
    def two(heads):
        precision = Int8Precision()
        fabric = Fabric(accelerator="cpu", plugins=[precision])
        first = fabric.setup(network())
        fabric.setup(nn.Sequential(*(nn.Linear(10, 2) for _ in range(heads))))
        fabric.backward(first(torch.randn(4, 1, 8, 8)).sum())
        return precision

    state, other = two(heads=1).state_dict(), two(heads=2)
    before = other.state_dict()
    with pytest.raises(ValueError, match="layer '1'"):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)


def test_setting_up_the_same_model_twice_is_once():
    precision, model = Int8Precision(), network()
    fabric = Fabric(accelerator="cpu", plugins=[precision])
    fabric.setup_module(model)
    state = model[0].int8_state
    Fabric(accelerator="cpu", plugins=[precision]).setup_module(model)
    assert model[0].int8_state is state
    assert len(precision.reports) == 1


def test_gradient_accumulation_with_no_backward_sync():
    fabric, model, optimizer = set_up(Int8Precision())
    images, labels = read_digits()
    for first in (0, BATCH):
        with fabric.no_backward_sync(model, enabled=first == 0):
            rows = slice(first, first + BATCH)
            fabric.backward(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
    optimizer.step()
    assert conversion_of(model.module).clock.steps == 1
    assert gemm_counts(model.module)["5"]["grad_weight"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_converted_and_trains_as_the_eager_one():
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        fabric = Fabric(accelerator="cpu", plugins=[Int8Precision()])
        net = network()
        model = torch.compile(net, backend="eager") if compiled else net
        model, optimizer = fabric.setup(model, torch.optim.SGD(net.parameters(), 0.05))
        train(fabric, model, optimizer, range(2))
        runs.append(snapshot(net))
        assert gemm_counts(net)["5"]["grad_weight"] == 2
    assert same(*runs)


def test_the_trainers_plugin_in_fabric_says_which_one_to_use():
    fabric, model, optimizer = set_up(TrainerInt8Precision())
    with pytest.raises(TypeError, match=r"lightning_int8\.fabric\.Int8Precision"):
        train(fabric, model, optimizer, range(1))


@pytest.mark.skipif(importlib.util.find_spec("lightning_fabric") is None, reason="lightning_fabric is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lightning_fabric():
    import lightning_fabric

    fabric, model, optimizer = set_up(Int8Precision(), fabric_class=lightning_fabric.Fabric)
    train(fabric, model, optimizer, range(2), clip=1.0)
    assert gemm_counts(model.module)["5"]["grad_weight"] == 2
