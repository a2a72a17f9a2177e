"""What the package does with what it should not get: a clear error and nothing changed, or the defined result."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from conftest import Digits, network, same, snapshot
from torch import nn

from lightning_int8 import ContractionSpec, Int8Precision, OperandSpec, Recipe, convert, restore
from lightning_int8.engine import Engine
from lightning_int8.fabric import Int8Precision as FabricInt8Precision
from lightning_int8.rewrite import Settings, conversion_of, layer_states

NAN, INF = float("nan"), float("inf")


def is_float(model):
    return conversion_of(model) is None and not any(hasattr(m, "int8_state") for m in model.modules())


def images(seed=1, count=4):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- arguments -------------------------------------------------------------------------------------------------------


ARGUMENTS = [
    ({"recipe": "defualt"}, "recipe: 'defualt' is not one of default"),
    ({"recipe": "nowhere.yaml"}, "recipe: cannot read 'nowhere.yaml'"),
    ({"recipe": 8}, "recipe: 8 is not"),
    ({"recipe": None}, "recipe: None is not"),
    ({"backend": "cuda"}, "backend: 'cuda' is not one of"),
    ({"backend": None}, "backend: None is not one of"),
    ({"layers": "all"}, "layers: 'all' is not one of"),
    ({"layers": 8}, "layers: 8 is not one of"),
    ({"fuse": "yes"}, "fuse: 'yes' is not"),
    ({"seed": 0.5}, "seed: 0.5 is not"),
    ({"refresh": 0}, "refresh: 0 is not"),
    ({"refresh": True}, "refresh: True is not"),
    ({"refresh": 2.5}, "refresh: 2.5 is not"),
    ({"skip": ("",)}, "skip: "),
    ({"skip": [3]}, "skip: "),
    ({"skip": 3}, "skip: 3"),
    ({"skip": None}, "skip: None"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
@pytest.mark.parametrize("plugin", [Int8Precision, FabricInt8Precision])
def test_a_plugin_refuses_a_bad_argument_when_it_is_made(plugin, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin(**arguments)


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_convert_refuses_a_bad_argument_and_changes_nothing(arguments, message):
    model = network()
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model, **arguments)
    assert is_float(model)


@pytest.mark.parametrize("plugin", [Int8Precision, FabricInt8Precision])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_clip": "sum"}, "sync_clip: 'sum' is not one of max, mean, local"),
        ({"high_precision": "64-true"}, "high_precision: '64-true' is not one of 32-true, bf16-mixed, 16-mixed"),
    ],
)
def test_a_plugin_refuses_its_own_bad_arguments(plugin, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin(**arguments)


@pytest.mark.parametrize("pattern", ["heads", "6", "4.weight", "*conv*"])
def test_a_skip_pattern_that_matches_nothing_is_refused_with_the_layers_there_are(pattern):
    model = network()
    with pytest.raises(ValueError, match=re.escape(f"skip: {pattern!r} matches no layer; layers: 0, 4, 5")):
        convert(model, skip=("5", pattern))
    assert is_float(model)


def test_per_channel_scales_on_a_summed_axis_are_refused_by_name():
    per_channel = OperandSpec(per="channel")
    for contraction, side in (("output", "lhs"), ("grad_input", "lhs")):
        with pytest.raises(ValueError, match=f"recipe 'mine': {contraction}.{side}.per: 'channel'"):
            Recipe(name="mine", **{contraction: ContractionSpec(**{side: per_channel})})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outputs: {}", "recipe: field 'outputs' is not one of name, output, grad_input, grad_weight"),
        ("output: {left: {}}", "recipe.output: field 'left' is not one of lhs, rhs"),
        ("output: {lhs: {bits: 7}}", "recipe.output.lhs: bits: 7 is not one of 8, 9, 16, 24"),
        ("output: {lhs: {bits: '8'}}", "recipe.output.lhs: bits: '8' is not one of"),
        ("grad_input: {lhs: {rounding: up}}", "recipe.grad_input.lhs: rounding: 'up' is not one of"),
        ("output: {lhs: {affine: 1}}", "recipe.output.lhs: affine: 1 is not one of False, True"),
        ("output: {lhs: {range: minmax}}", "recipe.output.lhs.range: range: 'minmax' is not one of absmax"),
        ("output: {lhs: {range: {name: ema_absmax, decay: 2}}}", "recipe.output.lhs.range: decay: 2 is not in [0, 1)"),
        ("output: {lhs: {range: {name: absmax, evry: 2}}}", "range 'absmax': field 'evry' is not one of every"),
        ("output: {lhs: {range: {every: 2}}}", "neither the name of a range rule nor a mapping with 'name'"),
        ("output: {lhs: 8}", "recipe.output.lhs: 8 is not a mapping"),
        ("grad_input: {lhs: {per: channel}}", "grad_input.lhs.per: 'channel' is not possible"),
        ("- output", "is not a mapping"),
        ("", "is not a mapping"),
        ("output: [", "while parsing"),
    ],
)
def test_a_yaml_recipe_is_refused_with_file_field_and_value(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    model = network()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert(model, recipe=str(path))
    assert str(path) in str(error.value)
    assert is_float(model)


def test_a_yaml_recipe_that_is_right_is_used(tmp_path):
    path = tmp_path / "wide.yaml"
    path.write_text(
        "output: {lhs: {bits: 16, range: {name: ema_absmax, decay: 0.5}}}\ngrad_input: {rhs: {per: channel}}"
    )
    model = network()
    assert convert(model, recipe=path).recipe == "wide"
    model(images()).sum().backward()
    assert layer_states(model)[0].counts.of("output") == 2


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "BatchNorm2d, ReLU, Sequential"),
        (lambda: nn.Sequential(nn.LSTM(3, 3), nn.ConvTranspose1d(3, 3, 1)), "ConvTranspose1d, LSTM"),
    ],
)
def test_a_model_with_nothing_to_convert_is_refused_with_what_it_has(model, found):
    model = model()
    with pytest.raises(TypeError, match=f"nothing to convert: .* found: {found}$"):
        convert(model)
    assert is_float(model)


def test_skipping_everything_leaves_nothing_to_convert():
    model = network()
    with pytest.raises(TypeError, match=r"nothing to convert: .* found: Conv2d, Linear$"):
        convert(model, skip="*")
    assert is_float(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_weight_of_another_dtype_is_refused_and_no_layer_is_converted(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(dtype))
    with pytest.raises(TypeError, match=f"layer '1': weight dtype: {dtype} .*skip=\\('1',\\)"):
        convert(model)
    assert is_float(model)
    assert convert(model, skip="1").converted == ["0"]


def test_a_second_conversion_with_other_arguments_is_refused_and_changes_nothing():
    model = network()
    report = convert(model)
    states = layer_states(model)
    for other in ({"seed": 1}, {"skip": "5"}, {"refresh": 7}, {"backend": "reference"}):
        with pytest.raises(ValueError, match=r"converted before .* restore"):
            convert(model, **other)
    assert all(a is b for a, b in zip(layer_states(model), states, strict=True))
    assert convert(model) == report


def test_converting_a_model_whose_part_is_converted_is_refused_by_name():
    model = nn.Sequential(network(), nn.Linear(10, 2))
    convert(model[0])
    with pytest.raises(ValueError, match=r"layer '0\.0' was converted before, as part of another module"):
        convert(model)
    assert type(model[1]) is nn.Linear
    assert conversion_of(model) is None
    assert len(layer_states(model[0])) == 3


def test_sharded_weights_are_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), network()
        fully_shard(model, mesh=mesh)
        with pytest.raises(TypeError, match="DTensor cannot be converted; INT8 training works under DDP"):
            convert(model)
        assert is_float(model)
        model = network()
        for layer in (model[0], model[4]):
            fully_shard(layer, mesh=mesh)
        with pytest.raises(TypeError, match="INT8 training works under DDP"):
            Engine(Settings.make("default", ())).convert(model)
        assert is_float(model)
    finally:
        destroy_process_group()


# --- the Trainer -----------------------------------------------------------------------------------------------------


def test_precision_beside_the_plugin_is_refused(make_trainer):
    for precision in ("bf16-mixed", "32-true", 16):
        with pytest.raises(ValueError, match="precision"):
            make_trainer(Int8Precision(), precision=precision)


def test_fsdp_is_refused():
    from lightning.pytorch.strategies import FSDPStrategy

    with pytest.raises(TypeError, match="FSDP"):
        FSDPStrategy(precision_plugin=Int8Precision())


def test_the_fabric_twin_is_refused_by_the_trainer(make_trainer):
    with pytest.raises(Exception, match="invalid type for plugin"):
        make_trainer(FabricInt8Precision())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: setattr(m, "net", nn.ReLU()), "nothing to convert"),
        (lambda m: m.net[5].double(), r"layer 'net\.5': weight dtype"),
        (lambda m: convert(m.net), r"layer 'net\.0' was converted before"),
        (lambda m: convert(m, seed=5), "converted before .* restore"),
    ],
)
def test_a_fit_that_cannot_start_leaves_the_model_alone(spoil, message, make_trainer):
    model = Digits()
    spoil(model)
    before, types = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(Int8Precision()).fit(model)
    assert same(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == types


# --- inputs ----------------------------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return nn.Linear(8, 4), (3, 8)


def conv():
    torch.manual_seed(0)
    return nn.Conv2d(2, 4, 3, padding=1), (3, 2, 5, 5)


both = pytest.mark.parametrize("make", [linear, conv])


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_an_input_of_another_dtype_is_refused_by_layer_and_dtype(make, dtype):
    layer, shape = make()
    model = nn.Sequential(layer)
    convert(model)
    with pytest.raises(TypeError, match=f"layer '0': input dtype: {dtype} .*skip=\\('0',\\)"):
        model(torch.ones(shape).to(dtype))
    assert model(torch.ones(shape)).dtype == torch.float32


@both
def test_a_wrong_number_of_channels_is_refused_by_layer_and_shape(make):
    layer, shape = make()
    model = nn.Sequential(layer)
    convert(model)
    wrong = (shape[0], shape[1] + 1, *shape[2:])
    with pytest.raises(ValueError, match=re.escape(f"layer '0': input shape: {wrong} has {wrong[1]} channels")):
        model(torch.ones(wrong))


@pytest.mark.parametrize("make", [nn.Linear, nn.Conv1d])
def test_an_input_without_enough_axes_is_refused_by_layer_and_shape(make):
    model = nn.Sequential(make(8, 4) if make is nn.Linear else make(8, 4, 3))
    convert(model)
    with pytest.raises(ValueError, match=re.escape("layer '0': input shape: ()")):
        model(torch.tensor(1.0))


def test_an_input_smaller_than_the_kernel_is_refused_by_layer_and_size():
    model = nn.Sequential(nn.Conv2d(2, 4, 5, dilation=2))
    convert(model)
    with pytest.raises(ValueError, match=re.escape("layer '0': input shape: the padded size (8, 9) is smaller")):
        model(torch.ones(1, 2, 8, 9))


EMPTY = [
    (nn.Linear, (8, 4), (0, 8)),
    (nn.Linear, (8, 4), (2, 0, 8)),
    (nn.Linear, (0, 4), (3, 0)),
    (nn.Linear, (8, 0), (3, 8)),
    (nn.Conv1d, (2, 4, 3), (0, 2, 5)),
    (nn.Conv2d, (2, 4, 3), (0, 2, 5, 5)),
    (nn.Conv3d, (2, 4, 3), (0, 2, 5, 5, 5)),
]


@pytest.mark.parametrize(("kind", "arguments", "shape"), EMPTY)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_batches_give_what_the_float_layer_gives(kind, arguments, shape):
    layer = kind(*arguments)
    twin = copy.deepcopy(layer)
    convert(layer)
    results = []
    for module in (layer, twin):
        x = torch.ones(shape, requires_grad=True)
        y = module(x)
        y.sum().backward()
        results.append([y.detach(), x.grad, module.weight.grad, module.bias.grad])
    assert same(results[0], results[1])


def test_an_empty_batch_between_others_changes_nothing():
    model, twin = network(), network()
    for m in (model, twin):
        convert(m)
        if m is model:
            m.eval()(images()[:0]).sum().backward()
            m.zero_grad(set_to_none=True)
        m.train()(images()).square().sum().backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@both
def test_a_non_finite_input_shows_everywhere_and_is_forgotten(make, value):
    layer, shape = make()
    clean, spoilt = torch.randn(shape), torch.randn(shape)
    spoilt.view(-1)[5] = value
    convert(layer, refresh=1)
    y = layer(spoilt)
    y.sum().backward()
    assert y.isnan().all()
    assert layer.weight.grad.isnan().all()
    layer.zero_grad()
    layer(clean).square().sum().backward()
    assert layer(clean).isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@both
def test_a_non_finite_gradient_shows_everywhere_and_is_forgotten(make, value):
    layer, shape = make()
    convert(layer, refresh=1)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    g.view(-1)[3] = value
    y.backward(g)
    assert x.grad.isnan().all()
    assert layer.weight.grad.isnan().all()
    x.grad = layer.weight.grad = None
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_a_non_finite_batch_leaves_the_ranges_of_a_training_run_as_they_were():
    """At a refresh and between refreshes, whatever came before."""
    for bad_step in (0, 2, 3):
        model = network()
        convert(model, refresh=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(6):
            optimizer.zero_grad()
            x = images(step)
            loss = model.eval()(x * NAN if step == bad_step else x).square().sum()
            loss.backward()
            assert loss.isfinite() == (step != bad_step)
            if step != bad_step:
                optimizer.step()
        clips = [o.clip_value for s in layer_states(model) for o in s.distinct_operands() if o.tensor != "w"]
        assert all(c.isfinite().all() for c in clips)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_non_finite_weight_shows_and_recovers():
    layer, shape = linear()
    x = torch.randn(shape)
    convert(layer)
    expected = layer.eval()(x)
    good = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[1, 2] = NAN
        assert layer(x).isnan().all()
        layer.weight.copy_(good)
    assert torch.equal(layer(x), expected)


@both
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40])
def test_zeros_and_denormals_give_the_bias_and_next_to_no_gradient(make, value):
    layer, shape = make()
    convert(layer)
    x = torch.full(shape, value, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.reshape(-1, *[1] * (y.dim() - 2)).expand_as(y))
    (y * value).sum().backward()
    # Stochastic rounding may lift a denormal to one step of the smallest scale there is, about 1e-31.
    largest = 0.0 if value == 0.0 else 1e-29
    assert x.grad.abs().max() <= largest
    assert layer.weight.grad.abs().max() <= largest


def test_zero_weights_give_the_bias_and_pass_gradients_to_the_weight():
    layer, shape = linear()
    nn.init.zeros_(layer.weight)
    convert(layer)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand_as(y))
    y.square().sum().backward()
    assert not x.grad.any()
    assert layer.weight.grad.any()


@both
def test_second_derivatives_are_refused_by_layer(make):
    layer, shape = make()
    model = nn.Sequential(layer)
    convert(model)
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"layer '0': second derivatives .*skip=\('0',\)"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_gradient_penalty_works_around_a_skipped_layer():
    model = nn.ModuleDict({"critic": nn.Linear(8, 1), "net": nn.Linear(8, 8)})
    convert(model, skip="critic")
    x = model["net"](torch.randn(3, 8)).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model["critic"](x).square().sum(), x, create_graph=True)
    grad.norm().backward()
    assert model["critic"].weight.grad.any()


# --- the state in a checkpoint ---------------------------------------------------------------------------------------


def trained_engine(settings=None, seed=0):
    model = network(seed)
    engine = Engine(settings or Settings.make("default", ()))
    engine.convert(model)
    model(images()).sum().backward()
    return engine


def without(field):
    return lambda state: {k: v for k, v in state.items() if k != field}


def changed(field, value):
    return lambda state: {**state, field: value}


def with_entry(field, value):
    def spoil(state):
        state = copy.deepcopy(state)
        state["layers"]["4"]["output.lhs"][field] = value
        return state

    return spoil


def without_last_layer(state):
    return {**state, "layers": dict(list(state["layers"].items())[:-1])}


BAD_STATES = [
    (lambda _: {}, "field 'version' is missing"),
    (lambda _: None, "field 'version' is missing"),
    (changed("version", 99), "version: 99"),
    (changed("version", "1"), "version: '1'"),
    (without("layers"), "field 'layers' is missing: the state is truncated"),
    (without("steps"), "field 'steps' is missing: the state is truncated"),
    (without("loss_scale"), "field 'loss_scale' is missing"),
    (changed("recipe", "unified"), "recipe: 'unified' was saved, 'default' is in use"),
    (without_last_layer, "layer '5', slot 'grad_input.lhs': converted now but not saved"),
    (changed("steps", "three"), "steps: 'three'"),
    (changed("steps", None), "steps: None"),
    (changed("steps", -1), "steps: -1"),
    (changed("loss_scale", "big"), "loss_scale: 'big'"),
    (changed("layers", None), "layers: None"),
    (changed("layers", {"0": None}), "layer '0'"),
    (with_entry("clip_value", "wide"), "layer '4', slot 'output.lhs': clip_value: 'wide' does not fit"),
    (with_entry("clip_value", torch.ones(3)), "layer '4', slot 'output.lhs': clip_value: tensor("),
    (with_entry("key", torch.zeros(2, dtype=torch.int64)), "layer '4', slot 'output.lhs': key: tensor("),
    (with_entry("key", torch.zeros(3)), "layer '4', slot 'output.lhs': key: tensor("),
    (with_entry("refreshed", 1.5), "layer '4', slot 'output.lhs': refreshed: 1.5"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, message):
    state = trained_engine().state_dict()
    engine = trained_engine(seed=1)
    before = engine.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.load_state_dict(spoil(state))
    assert same(engine.state_dict(), before)


def test_a_state_with_other_layers_names_the_first():
    state = trained_engine().state_dict()
    engine = trained_engine(Settings.make("default", skip="0"))
    with pytest.raises(ValueError, match=re.escape("layer '0', slot 'grad_input.lhs': saved but not converted now")):
        engine.load_state_dict(state)


def test_a_state_of_a_recipe_with_other_numbers_is_refused():
    """Same name, but the gradient is rounded to nearest: the run would not go on as it began."""
    recipe, nearest = Settings.make("default", ()).recipe, OperandSpec()
    nearest = replace(
        recipe,
        grad_input=replace(recipe.grad_input, lhs=nearest),
        grad_weight=replace(recipe.grad_weight, lhs=nearest),
    )
    state = trained_engine().state_dict()
    engine = trained_engine(Settings.make(nearest, ()))
    message = r"INT8 plugin state: numerics: .*stochastic.* was saved, .*nearest.* is in use"
    with pytest.raises(ValueError, match=message) as refused:
        engine.load_state_dict(state)
    assert len(str(refused.value)) < 400, "the place, not two recipes"


@pytest.mark.parametrize("plugin", [Int8Precision, FabricInt8Precision])
def test_a_plugin_state_without_its_scaler_changes_nothing(plugin):
    precision, other = plugin(), plugin()
    for p, seed in ((precision, 0), (other, 1)):
        model = network(seed)
        p.convert_module(model)
        model(images(seed)).sum().backward()
    before = other.state_dict()
    state = precision.state_dict()
    del state["scaler"]
    with pytest.raises(ValueError, match="scaler"):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)


def test_a_model_is_usable_after_a_refused_state():
    engine = trained_engine()
    with pytest.raises(ValueError, match="INT8 plugin state"):
        engine.load_state_dict({})
    model = network()
    convert(model)
    model(images()).sum().backward()
    restore(model)
    assert is_float(model)
