"""FixedPointSGD against a NumPy twin of WAGEUBN's update; grids, resume, groups, and what is refused."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from conftest import same
from test_grids import numpy_cq, numpy_q
from torch import nn

from lightning_int8.optim import FixedPointSGD, quantized_lr


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def train(model, optimizer, steps, first=0):
    """A few steps on batches of their own number."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 7, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def one(value, grad):
    """A parameter with a gradient."""
    p = nn.Parameter(torch.as_tensor(value))
    p.grad = torch.as_tensor(grad)
    return p


def on_grid(x, bits):
    scaled = x.double() * 2 ** (bits - 1)
    return torch.equal(scaled, scaled.round())


class Twin:
    """Sections 4a and 4c, in float32 as the optimizer; every product but that of the weight decay is exact."""

    def __init__(self, weights, momentum, weight_decay, dr, seed):
        self.weights = weights
        self.acc = [np.zeros_like(w) for w in weights]
        self.momentum, self.weight_decay, self.dr, self.seed = momentum, weight_decay, dr, seed

    def step(self, grads, lr, step):
        lr_q = np.float32(min(numpy_q(lr, 10), 1 - 2.0**-9))
        for i, grad in enumerate(grads):
            if grad.ndim >= 2:
                g = numpy_cq(grad + np.float32(self.weight_decay) * self.weights[i], self.dr, 15, self.key(i, step))
            else:
                g = numpy_q(grad, 15)
            self.acc[i] = numpy_q(np.float32(self.momentum) * self.acc[i] + g.astype(np.float32), 13)
            self.weights[i] = numpy_q(self.weights[i] - lr_q * self.acc[i], 24)

    def key(self, index, step):
        return torch.tensor([self.seed, index, step])


@pytest.mark.parametrize(("momentum", "weight_decay", "dr"), [(0.25, 0.0, 128), (0.75, 1e-2, 32), (0.0, 0.5, 2)])
def test_the_update_is_the_papers(momentum, weight_decay, dr):
    rng = np.random.default_rng(1)
    shapes = ((4, 6), (6,), (3, 2, 3, 3), ())
    start = [np.asarray(rng.standard_normal(s) * 0.3, dtype=np.float32) for s in shapes]
    parameters = [nn.Parameter(torch.tensor(w)) for w in start]
    optimizer = FixedPointSGD(parameters, 0.05, momentum=momentum, weight_decay=weight_decay, significance=dr, seed=11)
    twin = Twin(start, momentum, weight_decay, dr, seed=11)
    for step, lr in enumerate((0.05, 0.05, 0.006, 0.9999, 0.0015)):
        optimizer.param_groups[0]["lr"] = lr
        grads = [np.asarray(rng.standard_normal(s) * 10.0**-step, dtype=np.float32) for s in shapes]
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
        twin.step(grads, lr, step)
        for p, w, acc in zip(parameters, twin.weights, twin.acc, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), w)
            np.testing.assert_array_equal(optimizer.state[p]["momentum_buffer"].numpy(), acc)


def test_rates_of_the_authors_script():
    rates = [quantized_lr(0.05 * factor, 10) * 512 for factor in (1, 0.12, 0.06, 0.03, 0.03)]
    assert rates == [26, 3, 2, 1, 1]
    assert quantized_lr(7.0, 10) == 511 / 512


def test_weights_and_momentum_lie_on_their_grids():
    model = network()
    optimizer = FixedPointSGD(model.parameters(), 0.05, momentum=0.75, weight_decay=1e-4)
    train(model, optimizer, 3)
    for p in model.parameters():
        assert on_grid(p, 24)
        assert on_grid(optimizer.state[p]["momentum_buffer"], 13)
        assert set(optimizer.state[p]) == {"momentum_buffer", "step"}
    assert not on_grid(optimizer.state[model[0].weight]["momentum_buffer"], 8)


def test_other_widths_give_other_grids():
    model = network()
    optimizer = FixedPointSGD(model.parameters(), 0.25, gradient_bits=10, accumulator_bits=9, lr_bits=4, update_bits=12)
    train(model, optimizer, 2)
    assert all(on_grid(p, 12) and on_grid(optimizer.state[p]["momentum_buffer"], 9) for p in model.parameters())


def test_it_learns():
    model = network()
    optimizer = FixedPointSGD(model.parameters(), 0.5)
    first = train(model, optimizer, 1)
    for _ in range(60):
        last = train(model, optimizer, 1)
    assert last < 0.5 * first


@pytest.mark.parametrize("lr", [1e-4, 0.0, 2.0**-10])
def test_a_rate_that_rounds_to_zero_is_refused(lr):
    model = network()
    with pytest.raises(ValueError, match=f"lr: {lr!r} rounds to no learning rate"):
        FixedPointSGD(model.parameters(), lr)
    optimizer = FixedPointSGD(model.parameters(), 0.05)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=f"lr: {lr!r} rounds to no learning rate"):
        optimizer.step()
    assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("momentum", 0.9, "momentum: 0.9 is not a multiple of 0.25"),
        ("momentum", 1.0, "momentum: 1.0 is not a multiple of 0.25 below 1"),
        ("momentum", -0.25, "momentum: -0.25"),
        ("weight_decay", -1.0, "weight_decay: -1.0"),
        ("weight_decay", math.nan, "weight_decay: nan"),
        ("lr", -0.1, "lr: -0.1"),
        ("lr", math.inf, "lr: inf"),
        ("significance", 1, "significance: 1"),
        ("significance", 64.0, "significance: 64.0"),
        ("gradient_bits", 40, "gradient_bits: bits: 40"),
        ("momentum_bits", 1, "momentum_bits: bits: 1"),
        ("accumulator_bits", 0, "accumulator_bits: bits: 0"),
        ("lr_bits", "10", "lr_bits: bits: '10'"),
        ("update_bits", 25, "update_bits: bits: 25"),
        ("quantized", 1, "quantized: 1"),
        ("seed", 1.5, "seed: 1.5"),
        ("seed", 2**63, "seed: 9223372036854775808"),
    ],
)
def test_values_out_of_their_range_are_named(field, value, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        FixedPointSGD(model.parameters(), **{"lr": 0.05} | {field: value})
    optimizer = FixedPointSGD(model.parameters(), 0.05)
    optimizer.param_groups[0][field] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_float_group_is_plain_sgd():
    ours, theirs = network(), network()
    arguments = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01}
    train(ours, FixedPointSGD(ours.parameters(), **arguments, quantized=False), 5)
    train(theirs, torch.optim.SGD(theirs.parameters(), **arguments), 5)
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_groups_have_their_own_values():
    model = network()
    last = {"params": model[3].parameters(), "quantized": False, "momentum": 0.9, "lr": 1e-5}
    body = [p for m in model[:3] for p in m.parameters()]
    optimizer = FixedPointSGD([{"params": body}, last], 0.05, weight_decay=0.25)
    start = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert on_grid(model[0].weight, 24)
    assert not on_grid(model[3].weight, 24)
    # CQ ignores the size of the gradient: the largest element moves by about lr·significance / 2^14, whose top value,
    # 127 steps, the accumulator rounds to 128.
    moved = (model[0].weight - start[0].weight).abs().max().item()
    assert 0.6 * 128 / 2**14 * 26 / 512 < moved <= 128 / 2**14 * 26 / 512 + 2**-23


def test_significance_sets_the_size_of_the_update():
    for significance, moved in ((128, 128), (32, 32), (8, 8), (4, 4), (2, 0)):
        p = one(torch.zeros(2, 2), torch.eye(2))
        optimizer = FixedPointSGD([p], 0.5)
        optimizer.param_groups[0]["significance"] = significance
        optimizer.step()
        # The accumulator rounds to 4 / 2^14: 127, 31, 7 and 3 steps go up, and 1 is lost.
        assert torch.equal(p, -0.5 * moved / 2**14 * torch.eye(2))


def test_vectors_have_no_weight_decay_and_no_randomness():
    p = one([1.0, -1.0], [0.0, 0.0])
    FixedPointSGD([p], 0.05, weight_decay=0.5).step()
    assert p.tolist() == [1.0, -1.0]
    matrix = one([[1.0, -1.0]], [[0.0, 0.0]])
    FixedPointSGD([matrix], 0.05, weight_decay=0.5).step()
    assert matrix[0, 0] < 1


@pytest.mark.parametrize("quantized", [True, False])
def test_resume_is_exact(quantized):
    whole, first = network(), network()
    arguments = {"lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3, "quantized": quantized}

    def make(model, **changed):
        optimizer = FixedPointSGD(model.parameters(), **arguments | changed)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)

    def run(model, optimizer, scheduler, steps, start=0):
        for step in range(start, start + steps):
            train(model, optimizer, 1, step)
            scheduler.step()

    run(whole, *make(whole, seed=3), 6)
    parts = make(first, seed=3)
    run(first, *parts, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "parts": [p.state_dict() for p in parts]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = network(seed=8)
    parts = make(second, seed=99)  # the seed of the checkpoint goes on
    second.load_state_dict(saved["model"])
    for part, state in zip(parts, saved["parts"], strict=True):
        part.load_state_dict(state)
    assert same(parts[0].state_dict(), saved["parts"][0])
    run(second, *parts, 3, start=3)
    assert same(dict(second.state_dict()), dict(whole.state_dict()))


def test_each_seed_parameter_and_step_draws_anew():
    rows = torch.linspace(-1, 1, 4096).reshape(64, 64)

    def updates(seed, steps=2):
        pair = [one(torch.zeros(64, 64), rows.clone()) for _ in range(2)]
        optimizer = FixedPointSGD(pair, 0.5, momentum=0.0, seed=seed)
        out = []
        for _ in range(steps):
            before = [p.detach().clone() for p in pair]
            optimizer.step()
            out += [p.detach() - b for p, b in zip(pair, before, strict=True)]
        return out

    draws = updates(0) + updates(1)
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert same(updates(1), draws[4:])


def test_the_draw_belongs_to_the_place_in_the_list_not_to_who_has_a_gradient():
    rows = torch.linspace(-1, 1, 64).reshape(8, 8)

    def second(first_has_gradient):
        pair = [one(torch.zeros(8, 8), rows.clone()) for _ in range(2)]
        if not first_has_gradient:
            pair[0].grad = None
        FixedPointSGD(pair, 0.5).step()
        return pair[1].detach()

    assert torch.equal(second(True), second(False))


def test_the_draw_does_not_depend_on_the_memory_format():
    grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    plain, last = one(torch.zeros(4, 3, 5, 5), grad), one(torch.zeros(4, 3, 5, 5), grad)
    last.data = last.data.to(memory_format=torch.channels_last)
    last.grad = grad.to(memory_format=torch.channels_last)
    for p in (plain, last):
        FixedPointSGD([p], 0.5).step()
    assert torch.equal(plain, last)


def test_a_closure_is_evaluated_with_gradients():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = FixedPointSGD([p], 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert (p < 1).all()


def refused():
    yield "sparse", one(torch.ones(3, 2), torch.ones(3, 2).to_sparse()), "parameter 1 of shape .*sparse_coo"
    yield "complex", one(torch.ones(2, 2) * 1j, torch.ones(2, 2) * 1j), "complex64 is not supported"
    yield "bfloat16", one(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16()), "bfloat16 does not hold"


@pytest.mark.parametrize(("parameter", "message"), [pytest.param(p, m, id=i) for i, p, m in refused()])
def test_what_cannot_be_applied_is_refused_before_anything_changes(parameter, message):
    good = one(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(TypeError, match=message):
        FixedPointSGD([good, parameter], 0.05).step()
    assert torch.equal(good, torch.ones(2, 2))


def test_a_named_parameter_is_called_by_its_name():
    parameter = one(torch.ones(3, 2), torch.ones(3, 2).to_sparse())
    with pytest.raises(TypeError, match=r"parameter embedding\.weight: gradient: torch.sparse_coo"):
        FixedPointSGD([("embedding.weight", parameter)], 0.05).step()


def test_a_float_group_may_be_narrow():
    p = one(torch.ones(2).bfloat16(), torch.ones(2).bfloat16())
    FixedPointSGD([p], 0.5, quantized=False).step()
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence_shows_in_the_weights(bad):
    matrix, vector = one(torch.ones(2, 2), torch.ones(2, 2)), one(torch.ones(2), torch.ones(2))
    matrix.grad[0, 0] = vector.grad[0] = bad
    FixedPointSGD([matrix, vector], 0.05).step()
    assert matrix.isnan().all()
    assert not vector[0].isfinite()


def test_parameters_without_elements_or_gradients_are_left_alone():
    empty, idle = one(torch.empty(0, 3), torch.empty(0, 3)), nn.Parameter(torch.full((2, 2), 1 / 3))
    FixedPointSGD([empty, idle], 0.05).step()
    assert torch.equal(idle, torch.full((2, 2), 1 / 3))
