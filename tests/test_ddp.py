"""Two processes on one machine. Run as a script, this file is the program that both of them execute."""

import copy
import dataclasses
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import Digits, TwoOptimizers, same
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_int8 import Int8Precision, backends, comparison, recipes, steering
from lightning_int8.backends.cpu.choice_file import ChoiceFile
from lightning_int8.fabric import Int8Precision as FabricInt8Precision
from lightning_int8.optim import FixedPointSGD
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.rewrite import conversion_of, layer_states

REFRESH = 2
STEPS_PER_EPOCH = 3


class Branching(Digits):
    """Has a layer that only one process calls."""

    caller = 0

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(10, 10)

    def forward(self, x):
        y = self.net(x)
        return y + self.extra(y) if self.global_rank == self.caller else y


class BranchingSecond(Branching):
    caller = 1


class Uneven(Digits):
    """In the first step, one process has no image to train on."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        count = 0 if batch_idx == 0 and self.global_rank == 1 else len(labels)
        return nn.functional.cross_entropy(self(images[:count]), labels[:count], reduction="sum")


class Dropping(Digits):
    """Has a layer that rests in most steps, on all ranks alike: its refreshes come when no layer is due."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(10, 10)

    def training_step(self, batch, batch_idx):
        y = self.net(batch[0])
        if self.global_step in (3, 5):
            y = y + self.extra(y)
        return nn.functional.cross_entropy(y, batch[1])


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead, SAM and the zero-redundancy optimizer are."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Wrapped(Digits):
    def configure_optimizers(self):
        return Wrapper(torch.optim.SGD(self.parameters(), 0.05))


def clip_values(model):
    return {
        f"{s.name} {o.slot}": None if o.clip_value is None else o.clip_value.clone()
        for s in layer_states(model)
        for o in s.distinct_operands()
        if o.tensor != "w"
    }


class FixedPoint(Digits):
    def configure_optimizers(self):
        return FixedPointSGD(self.parameters(), 0.1)


def by_recipe():
    """Recipes with something to decide between steps, and rules that make them decide."""
    wide = dataclasses.replace(recipes.get("fixed_point"), bit_width=BitWidthRule(threshold=1e-4))
    slow = dataclasses.replace(recipes.get("unified"), learning_rate=DeviationFactor(alpha=300.0))
    return {name: recipes.get(name) for name in recipes.names()} | {"fixed_point": wide, "unified": slow}


def fit(
    model, sync_clip="max", ckpt_path=None, save_to=None, unused=False, recipe="default", layers="int8", **arguments
):
    plugin = Int8Precision(recipe, layers=layers, refresh=REFRESH, sync_clip=sync_clip)
    strategy = DDPStrategy(timeout=timedelta(seconds=60), find_unused_parameters=unused)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, plugins=[plugin], **quiet, **arguments)
    trainer.fit(model, ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    keys = [o.key.clone() for s in layer_states(model) for o in s.distinct_operands()]
    return copy.deepcopy(
        {
            "weights": dict(model.state_dict()),
            "clip values": clip_values(model),
            "keys": keys,
            "optimizer": [o.state_dict() for o in trainer.optimizers],
            "plugin": plugin.state_dict(),
            "steps": conversion_of(model).clock.steps,
            "factors": {s.name: s.factor for s in layer_states(model)},
            "bits": {f"{s.name} {o.slot}": o.bits for s in layer_states(model) for o in s.distinct_operands()},
            "float layers": [s.name for s in layer_states(model) if s.kept_float],
            "times": {s.name: None if s.times is None else dataclasses.asdict(s.times) for s in layer_states(model)},
        }
    )


def planes_of_one_gradient(model):
    """What this process makes of a gradient that is the same in both."""
    operand = layer_states(model)[0].operands["grad_weight.lhs"]
    g = torch.linspace(-1, 1, 1000).reshape(10, 100)
    return backends.load("onednn").quantize(g, g.abs().max(), operand.spec, None, operand.key).planes[0].data


def fit_with_fabric():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[FabricInt8Precision(refresh=REFRESH)])
    fabric.launch()
    net = Digits().net
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.05))
    for images, labels in fabric.setup_dataloaders(Digits().train_dataloader()):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    keys = [o.key for s in layer_states(net) for o in s.distinct_operands()]
    return {"weights": dict(net.state_dict()), "clip values": clip_values(net), "keys": keys}


def fit_adversaries_with_fabric():
    """A generator and a critic take turns: the generator has a gradient in every other step only."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[FabricInt8Precision(refresh=4)])
    fabric.launch()
    torch.manual_seed(0)
    nets = [nn.Linear(8, 64), nn.Linear(64, 1)]
    generator, optimizer_g = fabric.setup(nets[0], torch.optim.SGD(nets[0].parameters(), 0.01))
    critic, optimizer_c = fabric.setup(nets[1], torch.optim.SGD(nets[1].parameters(), 0.01))
    torch.manual_seed(1 + fabric.global_rank)
    for _ in range(10):
        with torch.no_grad():
            made = generator(torch.randn(16, 8))
        for optimizer, sign in ((optimizer_c, -1), (optimizer_g, 1)):
            made = made if optimizer is optimizer_c else generator(torch.randn(16, 8))
            optimizer_c.zero_grad()
            optimizer_g.zero_grad()
            fabric.backward(sign * critic(made).square().mean())
            optimizer.step()
    return {"weights": dict(nets[0].state_dict()), "clip values": clip_values(nets[0])}


def times_of_rank_0():
    """Two layers are slower in INT8; another rank that asks for the time fails."""
    assert torch.distributed.get_rank() == 0
    given = iter([(1.0, 2.0), (3.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
    return lambda *_: next(given)


def fit_with_layers_auto(folder):
    fit(Digits(), max_steps=1)  # starts the process group
    comparison.REMEMBERED = ChoiceFile(folder / "layers.json")
    results = {"auto, by the clock": fit(Digits(), layers="auto", max_epochs=2)}
    comparison.REMEMBERED = ChoiceFile(folder / "given.json")
    rank = torch.distributed.get_rank()
    with mock.patch.object(comparison, "shortest", times_of_rank_0() if rank == 0 else None):
        results["auto, long"] = fit(Digits(), layers="auto", max_epochs=3)
    for name, sync_clip, kind in (("auto, branching", "max", BranchingSecond), ("auto, local", "local", Branching)):
        comparison.REMEMBERED = ChoiceFile(folder / f"{name}.json")
        with mock.patch.object(comparison, "shortest", times_of_rank_0() if rank == 0 else None):
            results[name] = fit(kind(), sync_clip, layers="auto", max_epochs=1, unused=True)
    comparison.REMEMBERED = ChoiceFile(folder / "given.json")
    with mock.patch.object(comparison, "shortest", None):
        fit(Digits(), layers="auto", max_epochs=1, save_to=folder / "c.ckpt")
    with mock.patch.object(steering, "compare", None):
        results["auto, resumed"] = fit(Digits(seed=9), layers="auto", max_epochs=3, ckpt_path=folder / "c.ckpt")
    return results


def main(folder):
    torch.set_num_threads(1)
    results = {f"one step, {mode}": fit(Digits(), mode, max_steps=1) for mode in ("max", "mean", "local")}
    results |= {f"long, {mode}": fit(Digits(), mode, max_epochs=3) for mode in ("mean", "local")}

    model = Digits()
    results["long, max"] = fit(model, max_epochs=3)
    results["planes"] = planes_of_one_gradient(model)
    fit(Digits(), max_epochs=1, save_to=folder / "a.ckpt")
    results["resumed"] = fit(Digits(seed=9), max_epochs=3, ckpt_path=folder / "a.ckpt")

    results["accumulated"] = fit(Digits(), max_epochs=2, accumulate_grad_batches=3)
    results["branching"] = fit(Branching(), max_epochs=1, unused=True)
    results["two optimizers"] = fit(TwoOptimizers(), max_epochs=2)
    results["wrapped optimizer"] = fit(Wrapped(), max_epochs=2)
    for name, recipe in by_recipe().items():
        kind = FixedPoint if recipe.optimizer else Digits
        results[name] = fit(kind(), recipe=recipe, max_epochs=2, save_to=folder / "b.ckpt")
        fit(kind(), recipe=recipe, max_epochs=1, save_to=folder / "b.ckpt")
        results[f"{name}, resumed"] = fit(kind(seed=9), recipe=recipe, max_epochs=2, ckpt_path=folder / "b.ckpt")
    everywhere = dataclasses.replace(by_recipe()["unified"], keep_float=())
    results["factors, branching"] = fit(Branching(), recipe=by_recipe()["unified"], max_epochs=1, unused=True)
    results["factors, local"] = fit(Digits(), "local", recipe=everywhere, max_epochs=2)
    results["factors, late"] = fit(Dropping(), recipe=everywhere, max_epochs=3, unused=True)
    results |= fit_with_layers_auto(folder)
    results["fabric"] = fit_with_fabric()
    results["fabric, adversaries"] = fit_adversaries_with_fabric()
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    # Last, since ranks that do not agree when to talk would wait for each other.
    uneven = {name: fit(Uneven(), recipe=recipe, max_epochs=2) for name, recipe in by_recipe().items()}
    torch.save(uneven, folder / f"uneven {torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each of the two processes left what it ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with open(folder / "log", "w") as log:
        command = [sys.executable, __file__, str(folder)]
        subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=400, check=False)
    return folder


def load(folder, name):
    paths = [folder / f"{name}{rank}.pt" for rank in (0, 1)]
    assert all(path.exists() for path in paths), (folder / "log").read_text()[-5000:]
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.fixture(scope="module")
def ranks(folder):
    return load(folder, "")


ALL = ["one step, max", "one step, mean", "one step, local", "long, max", "long, mean", "long, local"]
ALL += ["factors, branching", "factors, local", "factors, late"]
ALL += ["auto, by the clock", "auto, long", "auto, branching", "auto, local", "auto, resumed"]
ALL += ["resumed", "accumulated", "branching", "two optimizers", "wrapped optimizer", "fabric", "fabric, adversaries"]


def batch_norm_aside(weights):
    """Running statistics are each process's own, with or without this package."""
    return {name: value for name, value in weights.items() if "running" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("run", ALL)
def test_weights_are_equal_on_all_ranks(ranks, run):
    first, second = (batch_norm_aside(r[run]["weights"]) for r in ranks)
    assert same(first, second)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["one step, max", "one step, mean", "long, max", "long, mean", "accumulated"])
def test_clip_values_are_equal_on_all_ranks(ranks, run):
    first, second = (r[run]["clip values"] for r in ranks)
    assert same(first, second)
    assert all(value > 0 for value in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["branching", "two optimizers", "wrapped optimizer", "fabric", "fabric, adversaries"])
def test_clip_values_are_equal_however_the_optimizer_is_called(ranks, run):
    assert same(ranks[0][run]["clip values"], ranks[1][run]["clip values"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_decides_the_same_on_all_ranks(ranks, recipe):
    for field in ("clip values", "bits", "factors", "float layers"):
        assert same(*(r[recipe][field] for r in ranks)), field
    assert same(*(batch_norm_aside(r[recipe]["weights"]) for r in ranks))
    for rank in ranks:
        assert same(rank[f"{recipe}, resumed"]["plugin"], rank[recipe]["plugin"])
        resumed = rank[f"{recipe}, resumed"]["weights"]
        assert same(batch_norm_aside(resumed), batch_norm_aside(rank[recipe]["weights"]))
    result = ranks[0][recipe]
    assert (min(result["factors"].values()) < 1) == (recipe == "unified")
    assert (max(result["bits"].values()) > 8) == (recipe in ("fixed_point", "scalable", "wageubn"))
    assert result["float layers"] == (["net.0", "net.5"] if recipes.get(recipe).keep_float else [])


@pytest.mark.slow
def test_local_clip_values_stay_apart(ranks):
    first, second = (r["long, local"]["clip values"] for r in ranks)
    equal = [name for name in first if torch.equal(first[name], second[name])]
    assert equal == ["net.0 output.lhs"]  # the brightest pixel is 1.0 in every half of every batch


@pytest.mark.slow
def test_ranks_agree_on_the_maximum_or_the_mean_of_what_they_measured(ranks):
    """All three runs take the same first step, each rank with its own clip values."""
    for name in ranks[0]["one step, local"]["clip values"]:
        measured = torch.stack([r["one step, local"]["clip values"][name] for r in ranks])
        assert torch.equal(ranks[0]["one step, max"]["clip values"][name], measured.max())
        assert torch.equal(ranks[0]["one step, mean"]["clip values"][name], measured.mean())


@pytest.mark.slow
def test_a_layer_that_one_rank_never_called_takes_the_others_clip_value(ranks):
    assert ranks[1]["branching"]["clip values"]["extra output.lhs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.names())
def test_a_rank_without_data_in_one_step_keeps_in_step(folder, recipe):
    first, second = (rank[recipe] for rank in load(folder, "uneven "))
    for field in ("weights", "clip values", "factors", "float layers"):
        assert same(first[field], second[field]), field
    assert first["steps"] == second["steps"] == 2 * STEPS_PER_EPOCH


@pytest.mark.slow
@pytest.mark.parametrize("run", ["factors, branching", "factors, local", "factors, late"])
def test_learning_rate_factors_and_float_layers_are_the_same_on_all_ranks(ranks, run):
    """Whatever ranks see on their own: else their weights would drift apart."""
    first, second = (r[run] for r in ranks)
    assert first["factors"] == second["factors"]
    assert min(first["factors"].values()) < 1
    assert first["float layers"] == second["float layers"]


@pytest.mark.slow
def test_rank_0_decides_which_layers_are_float(ranks):
    for run in [name for name in ALL if name.startswith("auto")]:
        for field in ("times", "float layers", "clip values"):
            assert run == "auto, local" or same(*(r[run][field] for r in ranks)), (run, field)
        assert all(ranks[0][run]["times"].values())
    first = ranks[0]
    assert first["auto, long"]["float layers"] == ["net.4", "net.5"]
    for run in ("auto, branching", "auto, local"):  # a layer that only one rank calls is rank 0's to time, too
        assert first[run]["float layers"] == ["net.4", "net.5"]
        assert first[run]["times"]["extra"]["int8_seconds"] == 1.0
        assert ranks[1][run]["times"] == first[run]["times"]
    for rank in ranks:
        assert same(rank["auto, resumed"]["plugin"], rank["auto, long"]["plugin"])
        resumed = rank["auto, resumed"]["weights"]
        assert same(batch_norm_aside(resumed), batch_norm_aside(rank["auto, long"]["weights"]))


@pytest.mark.slow
def test_each_rank_draws_its_own_noise(ranks):
    for run in ("long, max", "resumed", "fabric"):
        for rank, result in enumerate(ranks):
            assert all(key[1] == rank for key in result[run]["keys"])
    first, second = (r["planes"].int() for r in ranks)
    assert (first - second).abs().max() == 1
    assert 0.1 < (first != second).float().mean() < 0.9


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(ranks):
    """From the checkpoint of the first process, after one epoch of three."""
    for result in ranks:
        assert same(batch_norm_aside(result["resumed"]["weights"]), batch_norm_aside(result["long, max"]["weights"]))
        assert same(result["resumed"]["optimizer"], result["long, max"]["optimizer"])
        assert same(result["resumed"]["plugin"], result["long, max"]["plugin"])


@pytest.mark.slow
def test_only_steps_of_the_optimizer_count(ranks):
    runs = ("long, max", "accumulated", "wrapped optimizer")
    assert {run: ranks[0][run]["steps"] for run in runs} == {
        "long, max": 3 * STEPS_PER_EPOCH,
        "accumulated": 2,
        "wrapped optimizer": 2 * STEPS_PER_EPOCH,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
