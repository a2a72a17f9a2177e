"""What a layer does from step to step: when it draws noise, when it measures ranges, what recomputation does."""

import copy

import pytest
import torch
from conftest import network, same, snapshot
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_int8 import ContractionSpec, OperandSpec, Recipe, convert
from lightning_int8.ranges.ema_absmax import Rule as EmaAbsMax
from lightning_int8.rewrite import conversion_of, layer_states


def mlp(width=8, depth=2):
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())))


def batch(seed, rows=16, width=8):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def train(model, seeds, call=None):
    """Gradients of the last of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in seeds:
        optimizer.zero_grad()
        x = batch(seed).requires_grad_()
        (model(x) if call is None else call(model, x)).square().mean().backward()
        optimizer.step()
    return gradients(model)


def operand_states(model):
    return [o.state_dict() for s in layer_states(model) for o in s.distinct_operands() if o.tensor != "w"]


# --- noise -----------------------------------------------------------------------------------------------------------


def test_a_step_taken_again_at_another_loss_scale_averages_with_the_range_at_that_scale():
    """As after an overflow under a gradient scaler: the same step, with gradients half as large."""
    clip_values = []
    for scales in ((4.0, 2.0), (2.0,)):
        layer, gradient = nn.Sequential(nn.Linear(4, 4)), OperandSpec(range=EmaAbsMax(every=1, decay=0.5))
        spec = ContractionSpec(lhs=gradient, rhs=OperandSpec())
        convert(layer, Recipe(name="mine", grad_input=spec, grad_weight=spec))
        operand = layer_states(layer)[0].operands["grad_weight.lhs"]
        optimizer = torch.optim.SGD(layer.parameters(), 0.0)
        layer(torch.ones(2, 4)).backward(scales[0] * 100 * torch.ones(2, 4))
        optimizer.step()
        for before, scale in zip((scales[0], *scales), scales, strict=False):
            operand.rescale(scale / before)
            layer(torch.ones(2, 4)).backward(scale * torch.ones(2, 4))
        clip_values.append(float(operand.clip_value))
    assert clip_values == [2.0 * 50.5, 2.0 * 50.5]


def test_every_micro_batch_draws_fresh_noise():
    model, x = mlp(), batch(1)
    convert(model)
    outputs, drawn = [], []
    for _ in range(3):
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        outputs.append(y.detach())
        drawn.append(model[0].weight.grad.clone())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_noise_averages_out_over_micro_batches():
    """An input of integers up to 127 is exact, so that all error comes from rounding the gradient."""
    layer, g = nn.Linear(8, 8, bias=False), batch(2)
    x = torch.randint(-127, 128, (16, 8)).float()
    x[0, 0] = 127
    convert(layer)
    errors = []
    for count in (1, 64):
        layer.zero_grad()
        for _ in range(count):
            (layer(x) * g).sum().backward()
        errors.append((layer.weight.grad / count - g.t() @ x).norm())
    assert 0 < errors[1] < errors[0] / 4


def test_a_layer_used_twice_draws_twice():
    layer = nn.Linear(8, 8)
    convert(layer)
    first, second = batch(1).requires_grad_(), batch(1).requires_grad_()
    g = batch(2)
    (layer(first) * g + layer(second) * g).sum().backward()
    assert not torch.equal(first.grad, second.grad)


def test_layers_and_seeds_draw_different_noise():
    x, g = batch(1), batch(2)

    def grad_of_x(model, index):
        leaf = x.clone().requires_grad_()
        (model[index](leaf) * g).sum().backward()
        return leaf.grad

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].load_state_dict(model[0].state_dict())
    other = copy.deepcopy(model)
    convert(model)
    convert(other, seed=1)
    first = grad_of_x(model, 0)
    assert not torch.equal(first, grad_of_x(model, 1))
    assert not torch.equal(first, grad_of_x(other, 0))


def test_two_backward_passes_over_one_graph_are_equal():
    model = network()
    convert(model)
    loss = model(torch.randn(4, 1, 8, 8)).square().mean()
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert same(gradients(model), first)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps_changes_nothing(context):
    model, twin = network(), network()
    for m, evaluates in ((model, True), (twin, False)):
        convert(m, refresh=2)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for seed in range(5):
            if evaluates:
                m.eval()
                with context():
                    m(1000 * torch.randn(8, 1, 8, 8))
                m.train()
            optimizer.zero_grad()
            m(batch(seed, 4, 64).reshape(4, 1, 8, 8)).square().mean().backward()
            optimizer.step()
    assert same(model.state_dict(), twin.state_dict())


def test_the_random_numbers_of_the_user_stay_the_users():
    """Dropout and shuffling draw what they draw in the float run."""
    model = mlp()
    convert(model)
    before = torch.get_rng_state()
    train(model, range(2))
    assert torch.equal(torch.get_rng_state(), before)


# --- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    plain = mlp()
    convert(plain, refresh=2)
    expected = train(plain, range(6))
    thrifty = mlp()
    convert(thrifty, refresh=2)
    found = train(thrifty, range(6), lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant))
    assert same(found, expected)
    assert same(operand_states(thrifty), operand_states(plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_segment_draws_fresh_noise_each_step(use_reentrant):
    model, x = mlp(), batch(1)
    convert(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant).square().mean().backward()
        found.append(gradients(model))
    assert not torch.equal(found[0][0], found[1][0])


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_the_eager_one_and_compiles_once(backend):
    eager = mlp(depth=10)
    convert(eager, refresh=2)
    expected = train(eager, range(6))
    model = mlp(depth=10)
    convert(model, refresh=2)
    compiled, graphs = torch.compile(model, backend=backend), []

    def call(_, x):
        y = compiled(x)
        graphs.append(counters["stats"]["unique_graphs"])
        return y

    assert same(train(model, range(6), call), expected)
    assert len(set(graphs)) == 1
    assert graphs[0] > 0


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_trains_as_the_eager_one():
    """Forward, backward and optimizer in one compiled function."""
    eager, model = mlp(), mlp()
    convert(eager)
    expected = train(eager, range(3))
    convert(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @torch.compile(backend="eager")
    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for seed in range(3):
        step(batch(seed))
    assert same(gradients(model), expected)


@pytest.mark.usefixtures("dynamo")
def test_a_model_compiled_before_conversion_is_converted():
    model = torch.compile(mlp(), backend="eager")
    assert convert(model).converted == ["_orig_mod.0", "_orig_mod.2"]
    model(batch(1)).sum().backward()
    assert all(s.counts.of("output") == 1 for s in layer_states(model))


# --- ranges ----------------------------------------------------------------------------------------------------------


def relative_error(layer, x):
    with torch.no_grad():
        exact = nn.functional.linear(x, layer.weight, layer.bias)
        return ((layer(x) - exact).norm() / exact.norm()).item()


def test_ranges_are_measured_at_steps_1_2_4_and_then_at_the_interval():
    model = mlp()
    convert(model, refresh=10)
    state, measured = layer_states(model)[0], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(25):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        measured += [step] * (state.operands["output.lhs"].state_dict()["refreshed"] == step)
    assert measured == [0, 1, 2, 4, 8, 10, 20]


def test_nothing_saturates_at_the_step_that_measures():
    """A layer used twice, or a second micro-batch, may bring the larger values."""
    layer = nn.Linear(8, 8)
    convert(layer)
    layer(batch(1)).sum().backward()
    layer(100 * batch(2)).sum().backward()
    layer(batch(3)).sum().backward()
    assert relative_error(layer.eval(), 100 * batch(2)) < 0.05


@pytest.mark.parametrize("zero_step", [0, 2])
def test_a_batch_of_zeros_leaves_no_range_behind(zero_step):
    """Steps 0, 1, 2 and 4 measure; what step 2 finds is in force in step 3."""
    layer = nn.Linear(8, 8)
    convert(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for step in range(zero_step + 2):
        optimizer.zero_grad()
        x = batch(step) * (step != zero_step)
        y = layer(x)
        (y * y.detach() * (step != zero_step)).sum().backward()
        optimizer.step()
    assert layer.weight.grad.any()
    assert relative_error(layer, batch(zero_step + 1)) < 0.05


@pytest.mark.parametrize("refresh", [10, 25])
def test_every_layer_is_refreshed_when_two_optimizers_take_turns(refresh):
    """With two optimizers a layer sees only every other step of the model."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    convert(model, refresh=refresh)
    optimizers = {name: torch.optim.SGD(net.parameters(), 1e-3) for name, net in model.items()}
    for seed in range(4 * refresh):
        for name, net in model.items():
            net(batch(seed)).sum().backward()
            optimizers[name].step()
    now = conversion_of(model).clock.steps
    for net in model.values():
        assert now - net.int8_state.operands["output.lhs"].state_dict()["refreshed"] <= refresh + 1


def test_a_layer_that_missed_its_refresh_catches_up():
    """Stochastic depth: the layer is left out exactly when the interval ends."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    convert(model, refresh=10)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(15):
        x = batch(step)
        (model[0](x) if step == 10 else model[1](model[0](x))).sum().backward()
        optimizer.step()
    assert [m.int8_state.operands["output.lhs"].state_dict()["refreshed"] for m in model] == [10, 11]


def test_another_model_training_in_between_changes_nothing():
    alone, model, other = mlp(), mlp(), mlp()
    convert(alone, refresh=3)
    train(alone, range(6))
    convert(model, refresh=3)
    for seed in range(6):
        train(model, [seed])
        train(other, [seed])
    assert same(snapshot(model), snapshot(alone))


def test_train_mode_in_inference_does_not_spoil_training():
    """Monte Carlo dropout predicts in train mode."""
    model = mlp()
    convert(model)
    with torch.inference_mode():
        model(batch(1))
    assert all(g.any() for g in train(model, range(3)))


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_conversion_under_a_context_manager_is_an_ordinary_one(context):
    model, twin = mlp(), mlp()
    convert(twin)
    expected = train(twin, range(3))
    with context():
        convert(model)
    assert same(train(model, range(3)), expected)
