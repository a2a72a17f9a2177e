"""Per-layer learning-rate factors: applied update = factor x plain update, whatever optimizer and schedule."""

import copy
import dataclasses
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_int8 import Int8Precision, convert, recipes, restore
from lightning_int8.policies import DeviationFactor
from lightning_int8.rewrite import conversion_of, layer_states

FACTORS = {"a": 0.1, "b": 0.5, "c": 1.0}
STEPS = 8


def forced(factors=FACTORS):
    """``default`` with a rule for each layer that gives this factor at any distance above 0."""
    base = recipes.get("default")
    rules = {name: DeviationFactor(alpha=1e12 if f < 1 else 0.0, beta=f) for name, f in factors.items()}
    overrides = {name: dataclasses.replace(base, learning_rate=rule) for name, rule in rules.items()}
    return dataclasses.replace(base, overrides=overrides)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStep": lambda o: lr_scheduler.MultiStepLR(o, [2, 3]),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.05, 0.02], total_steps=20),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
}
OPTIMIZERS = {
    "SGD": lambda groups, **how: torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3, **how),
    "AdamW": lambda groups, **how: torch.optim.AdamW(groups, weight_decay=1e-2, **how),
}


class Model(LightningModule):
    """Three converted layers in two parameter groups; compares every update with the plain one."""

    def __init__(self, optimizer="SGD", scheduler=None, **how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.optimizer, self.scheduler, self.how = OPTIMIZERS[optimizer], scheduler, how
        self.rates, self.checked, self.pending = [], 0, None

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def groups(self, model):
        head = [model["c.weight"], model["c.bias"]]
        body = [p for name, p in model.items() if not name.startswith("c.")]
        return [{"params": body, "lr": 0.05}, {"params": head, "lr": 0.02}]

    def configure_optimizers(self):
        optimizer = self.optimizer(self.groups(dict(self.named_parameters())), **self.how)
        if self.scheduler is None:
            return optimizer
        interval = "epoch" if self.scheduler == "Plateau" else "step"
        config = {"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": interval, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(STEPS * 16, 6, generator=generator)
        return DataLoader(TensorDataset(images, torch.randint(0, 3, (len(images),), generator=generator)), 16)

    def on_before_optimizer_step(self, optimizer):
        inner = getattr(optimizer, "optimizer", optimizer)
        self.rates.append([g["lr"] for g in inner.param_groups])
        self.pending = self.plain_step(inner)

    def plain_step(self, optimizer):
        """What the optimizer itself would make of the parameters: old and new value and factor in force, by name."""
        twins = {name: nn.Parameter(p.detach().clone()) for name, p in self.named_parameters()}
        for name, p in self.named_parameters():
            twins[name].grad = None if p.grad is None else p.grad.clone()
        own = {p for g in optimizer.param_groups for p in g["params"]}
        theirs = [{"params": [twins[n] for n, p in self.named_parameters() if any(p is q for q in g["params"])],
                   **{k: v for k, v in g.items() if k != "params"}} for g in optimizer.param_groups]  # fmt: skip
        plain = type(optimizer)(theirs, lr=1.0)
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        old = {name: p.detach().clone() for name, p in self.named_parameters() if p in own}
        factors = {s.name: s.factor for s in layer_states(self)}
        type(plain).step.__wrapped__(plain)  # past the hooks: this is no step of the model
        return {name: (old[name], twins[name].detach(), factors[name.split(".")[0]]) for name in old}

    def on_train_batch_end(self, *_):
        if self.pending is not None:
            for name, (old, plain, factor) in self.pending.items():
                found = dict(self.named_parameters())[name].detach()
                expected = old.double() + factor * (plain.double() - old.double())
                size = torch.maximum(old.abs(), found.abs())  # one ulp of the parameter, before or after
                ulp = torch.nextafter(size, torch.tensor(math.inf)) - size
                assert ((found - expected).abs() <= ulp).all(), (name, factor)
                assert factor == 1 or torch.equal(old, plain) or not torch.equal(found, plain)
            self.checked, self.pending = self.checked + 1, None


def plain_rates(model, steps):
    """Learning rates that the user's schedule gives without any plugin."""
    optimizer = model.optimizer(model.groups(dict(model.named_parameters())))
    scheduler = SCHEDULERS[model.scheduler](optimizer)
    rates = []
    for _ in range(steps):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        if model.scheduler != "Plateau":
            scheduler.step()
    return rates


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_the_applied_update_is_the_factor_times_the_plain_one(scheduler, optimizer, how, accumulate, make_trainer):
    model = Model(optimizer, scheduler, **{how: True})
    trainer = make_trainer(
        Int8Precision(forced(), refresh=3), max_epochs=2, accumulate_grad_batches=accumulate, logger=False
    )
    trainer.fit(model)
    steps = 2 * STEPS // accumulate
    assert model.checked == steps
    assert {s.name: s.factor for s in layer_states(model)} == FACTORS
    if scheduler == "Plateau":
        # No loss is ten times better than the one before: reduced after the first epoch.
        expected = [(0.05, 0.02)] * (steps // 2) + [(0.005, 0.002)] * (steps // 2)
        assert [tuple(rates) for rates in model.rates] == [pytest.approx(rates) for rates in expected]
    else:
        assert model.rates == plain_rates(Model(optimizer, scheduler), steps)


def test_the_first_step_has_no_factor_yet(make_trainer):
    seen = []

    class Watching(Model):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            seen.append([s.factor for s in layer_states(self)])

    make_trainer(Int8Precision(forced()), max_epochs=1, max_steps=3, logger=False).fit(Watching())
    assert seen == [[1.0, 1.0, 1.0], [0.1, 0.5, 1.0], [0.1, 0.5, 1.0]]


class Clipped(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        inner = getattr(optimizer, "optimizer", optimizer)
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        assert norm <= 0.01 * (1 + 1e-3)
        self.pending = self.plain_step(inner)


def test_clipped_gradients_are_clipped_before_the_factor(make_trainer):
    model = Clipped()
    make_trainer(Int8Precision(forced()), max_epochs=1, gradient_clip_val=0.01, logger=False).fit(model)
    assert model.checked == STEPS


class Manual(Model):
    """Two optimizers that take turns, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.pending = self.plain_step(optimizer.optimizer)
            optimizer.step()
            self.on_train_batch_end()

    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(self.a.parameters(), 0.05, momentum=0.9), torch.optim.AdamW(self.b.parameters(), 0.01)]


def test_manual_optimization_with_two_optimizers(make_trainer):
    model = Manual()
    make_trainer(Int8Precision(forced()), max_epochs=1, logger=False).fit(model)
    assert model.checked == 2 * STEPS


def test_a_plain_loop_without_a_trainer():
    model = Model()
    convert(model, forced())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        model.pending = model.plain_step(optimizer)
        factors = [1.0] * 6 if step == 0 else [0.1] * 2 + [0.5] * 2 + [1.0] * 2
        assert [factor for _, _, factor in model.pending.values()] == factors
        optimizer.step()
        model.on_train_batch_end()
    assert model.checked == 4


def test_a_shared_parameter_takes_the_smallest_factor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    for factors, smallest in (({"a": 0.5, "b": 0.1}, 0.1), ({"a": 0.25, "b": 1.0}, 0.25)):
        model = Tied()
        convert(model, forced(factors))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().sum().backward()
            old, gradient = model.a.weight.detach().clone(), model.a.weight.grad.clone()
            optimizer.step()
        torch.testing.assert_close(model.a.weight.detach(), old - smallest * 0.1 * gradient)


def test_an_optimizer_that_calls_its_closure_twice_is_refused():
    model = nn.Sequential(nn.Linear(6, 3))
    convert(model, forced({"0": 0.5}))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x = torch.randn(8, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    torch.optim.SGD(model.parameters(), 0.0).step(closure)  # measures the distance
    with pytest.raises(TypeError, match="optimizer: LBFGS evaluates its closure more than once a step"):
        optimizer.step(closure)


def test_parameters_without_a_factor_are_not_copied():
    model = Model()
    convert(model, forced())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    steering = conversion_of(model).steering
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert steering.hold(optimizer) == []
    layer_states(model)[1].factor = 0.5
    assert [p is q for (p, _, _), q in zip(steering.hold(optimizer), model.b.parameters(), strict=True)] == [True, True]
    assert steering.hold(torch.optim.SGD(model.a.parameters(), 0.1)) == []


def test_ranks_that_nobody_brings_together_take_plain_steps(monkeypatch):
    """A factor of one rank alone would drive its weights away from the others'."""
    monkeypatch.setattr("lightning_int8.steering.several_ranks", lambda: True)
    model = Model()
    convert(model, forced())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    warned = []
    monkeypatch.setattr("lightning_int8.steering.warnings.warn", lambda message, **_: warned.append(message))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    assert len(warned) == 1
    assert warned[0].startswith("learning-rate factors are not applied: several ranks must agree")
    assert [s.factor for s in layer_states(model)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("again", [False, True], ids=["restored", "converted anew"])
def test_a_conversion_that_was_undone_scales_nothing_more(again):
    """Whoever holds it, as a plugin does after its fit."""
    layer = nn.Linear(6, 3, bias=False)
    model = nn.Sequential(layer)
    convert(model, forced({"0": 0.5}))
    held = conversion_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def update_over_plain_update():
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().sum().backward()
        old = layer.weight.detach().clone()
        optimizer.step()
        return (layer.weight.detach() - old).norm() / (0.1 * layer.weight.grad.norm())

    assert [float(update_over_plain_update()) for _ in range(2)] == pytest.approx([1.0, 0.5], rel=1e-3)
    restore(model)
    if again:
        convert(model, forced({"0": 0.5}))
    expected = [1.0, 0.5] if again else [1.0, 1.0]
    assert [float(update_over_plain_update()) for _ in range(2)] == pytest.approx(expected, rel=1e-3)
    assert held.steering.layers


@pytest.mark.parametrize(("distance", "factor"), [(0.0, 1.0), (0.01, 0.82), (0.05, 0.37), (0.115, 0.1), (2.0, 0.1)])
def test_factors_worked_out_in_the_methods(distance, factor):
    assert DeviationFactor().factor(distance) == pytest.approx(factor, abs=0.003)


@pytest.mark.parametrize("fields", [{"alpha": -1.0}, {"beta": 1.5}, {"beta": "x"}, {"alpha": True}])
def test_a_bad_field_is_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: "):
        DeviationFactor(**fields)
