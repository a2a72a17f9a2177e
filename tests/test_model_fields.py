"""What a recipe says about the whole model: norms, layers that stay float, overrides by name, the optimizer."""

import dataclasses
import warnings

import pytest
import torch
from conftest import Digits, same, snapshot
from torch import nn

from lightning_int8 import ContractionSpec, Int8Precision, OperandSpec, convert, gemm_counts, recipes, restore
from lightning_int8.norm import FixedPointBatchNorm2d, RangeBatchNorm1d, RangeBatchNorm2d, RangeSyncBatchNorm
from lightning_int8.optim import FixedPointSGD
from lightning_int8.report import current
from lightning_int8.rewrite import conversion_of, layer_states


class Branched(nn.Module):
    """Defined in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.never = nn.Linear(2, 2)
        self.stem = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 1, 8, 8)).square().mean().backward()
    optimizer.step()


# --- Layers that stay float ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [("first",), ("last",), ("first", "last"), ()])
def test_first_and_last_are_those_that_ran_first_and_last(keep):
    model = Branched()
    convert(model, dataclasses.replace(recipes.get("default"), keep_float=keep))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        step(model, optimizer)
    expected = {{"first": "stem", "last": "head"}[position] for position in keep}
    report = current(conversion_of(model).report, model)
    assert {r.name: r.reason for r in report.rows if r.decision == "float"} == {
        {"first": "stem", "last": "head"}[p]: f"keep_float: runs {p}" for p in keep
    }
    counts = gemm_counts(model)
    assert {name for name, count in counts.items() if count["output"] == 1} == expected
    assert {name for name, count in counts.items() if count["output"] == 3} == {"stem", "body.0", "head"} - expected
    assert counts["never"]["output"] == 0


def test_a_layer_kept_float_computes_what_the_float_layer_does():
    model = Branched()
    convert(model, dataclasses.replace(recipes.get("default"), keep_float=("first",)))
    step(model, torch.optim.SGD(model.parameters(), 0.0))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.stem(x), nn.functional.conv2d(x, model.stem.weight, model.stem.bias))
    restore(model)
    assert type(model.stem) is nn.Conv2d


def test_a_step_without_data_leaves_the_order_to_the_next_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    convert(model, dataclasses.replace(recipes.get("default"), keep_float=("first", "last")))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for samples in (0, 8):
        assert not any(s.kept_float for s in layer_states(model))
        optimizer.zero_grad()
        model(torch.randn(samples, 4)).sum().backward()
        optimizer.step()
    assert [s.name for s in layer_states(model) if s.kept_float] == ["0", "2"]


def test_a_new_head_takes_the_place_of_the_last_layer():
    model = Branched()
    recipe = dataclasses.replace(recipes.get("default"), keep_float=("first", "last"))
    convert(model, recipe)
    step(model, torch.optim.SGD(model.parameters(), 0.01))
    convert(model, recipe)
    assert {s.name for s in layer_states(model) if s.kept_float} == {"stem", "head"}, "again changes nothing"
    model.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    convert(model, recipe)
    step(model, torch.optim.SGD(model.parameters(), 0.01))
    assert {s.name for s in layer_states(model) if s.kept_float} == {"stem", "head.1"}


def test_a_layer_that_stays_float_is_logged(make_trainer, monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_int8.engine.rank_zero_info", lines.append)
    make_trainer(Int8Precision("unified")).fit(Digits())
    assert lines == [
        f"layer 'net.{i}' stays in float from now on: keep_float: runs {p}" for i, p in ((0, "first"), (5, "last"))
    ]


# --- Norms -----------------------------------------------------------------------------------------------------------


def normed():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*conv, nn.Linear(288, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))


def test_norms_are_replaced_and_come_back():
    model, before = normed(), snapshot(normed())
    report = convert(model, "scalable")
    assert type(model[1]) is RangeBatchNorm2d
    assert type(model[5]) is RangeBatchNorm1d
    assert same(snapshot(model), before)
    rows = {r.name: (r.kind, r.decision) for r in report.rows}
    assert rows["1"] == ("BatchNorm2d", "range")
    assert report.converted == ["0", "4", "6"]
    assert "3 of 3 layers run INT8" in str(report)
    assert convert(model, "scalable").converted == report.converted, "again changes nothing"
    restore(model)
    assert [type(m) for m in model] == [type(m) for m in normed()]


def test_skip_and_overrides_decide_about_norms_too():
    model = normed()
    convert(model, "scalable", skip=("1",))
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[5]) is RangeBatchNorm1d
    base = recipes.get("scalable")
    model = normed()
    convert(model, dataclasses.replace(base, overrides={"1": dataclasses.replace(base, norm="fixed_point")}))
    assert type(model[1]) is FixedPointBatchNorm2d
    assert type(model[5]) is RangeBatchNorm1d


def test_a_norm_with_a_forward_of_its_own_is_left_alone():
    model = normed()
    model[1].forward = lambda x: x
    report = convert(model, "scalable")
    row = next(r for r in report.rows if r.name == "1")
    assert (row.decision, row.reason) == ("float", "its forward was replaced on the instance")
    assert type(model[1]) is nn.BatchNorm2d


def test_norms_that_a_strategy_synchronises_after_conversion_are_converted_again():
    model = normed()
    convert(model, "scalable")
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is nn.SyncBatchNorm
    convert(synced, "scalable")
    assert type(synced[1]) is RangeSyncBatchNorm
    restore(synced)
    assert type(synced[1]) is nn.SyncBatchNorm


# --- Overrides -------------------------------------------------------------------------------------------------------


def test_overrides_count_for_the_layers_that_match_the_last_one():
    base = recipes.get("default")
    wide = ContractionSpec(lhs=OperandSpec(bits=16), rhs=base.grad_weight.rhs)
    widest = ContractionSpec(lhs=OperandSpec(bits=24), rhs=base.grad_weight.rhs)
    overrides = {
        "body": dataclasses.replace(base, grad_weight=wide),
        "*.0": dataclasses.replace(base, grad_weight=widest),
        "st*": dataclasses.replace(base, grad_weight=wide),
    }
    model = Branched()
    convert(model, dataclasses.replace(base, overrides=overrides))
    bits = {s.name: s.operands["grad_weight.lhs"].bits for s in layer_states(model)}
    assert bits == {"head": 8, "body.0": 24, "never": 8, "stem": 16}


def test_an_override_that_matches_nothing_is_refused():
    base = recipes.get("default")
    model = Branched()
    with pytest.raises(ValueError, match=r"overrides: 'tail\*' matches no layer; layers: head, body\.0"):
        convert(model, dataclasses.replace(base, overrides={"tail*": base}))
    assert type(model.head) is nn.Linear


def test_overrides_of_an_override_are_refused():
    base = recipes.get("default")
    nested = dataclasses.replace(base, overrides={"a": base})
    with pytest.raises(ValueError, match=r"recipe 'default': overrides: 'b': .* without overrides of its own"):
        dataclasses.replace(base, overrides={"b": nested})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "norm: 'layer' is not one of 'float', 'range', 'fixed_point'"),
        ({"keep_float": ("second",)}, "keep_float: 'second' is not one of 'first', 'last'"),
        ({"learning_rate": 0.1}, "learning_rate: 0.1 is not a DeviationFactor, nor None"),
        ({"bit_width": 16}, "bit_width: 16 is not a BitWidthRule, nor None"),
        ({"overrides": (("a", 3),)}, "overrides: 'a': 3 is not a Recipe"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"^recipe 'default': {message}"):
        dataclasses.replace(recipes.get("default"), **fields)


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_a_file_names_only_what_is_different(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("""
base: distribution_adaptive
keep_float: []
learning_rate: {alpha: 10}
grad_weight: {lhs: {range: {slope: 0.5}}}
overrides:
  "*.downsample.*": {grad_weight: {lhs: {bits: 16}}}
  head:
    bit_width: {threshold: 0.01, operands: [g]}
""")
    recipe, base = recipes.get(path), recipes.get("distribution_adaptive")
    assert recipe.name == "mine"
    assert recipe.output == base.output
    assert recipe.keep_float == ()
    assert (recipe.learning_rate.alpha, recipe.learning_rate.beta) == (10, 0.1)
    rule = recipe.grad_weight.lhs.range
    assert (rule.slope, rule.every) == (0.5, base.grad_weight.lhs.range.every)
    assert recipe.for_layer(["layer.downsample.0"]).grad_weight.lhs.bits == 16
    assert recipe.for_layer(["layer.downsample.0"]).grad_weight.lhs.range == rule
    assert recipe.for_layer(["head"]).bit_width.operands == ("g",)
    assert recipe.for_layer(["stem"]) is recipe


def test_the_16_bit_error_variant_from_yaml_and_from_python(tmp_path):
    path = tmp_path / "wageubn.yaml"
    path.write_text("""
base: wageubn
name: wageubn
output: {lhs: {range: {integer_bits: 3}}}
grad_input: {lhs: {bits: 16}}
grad_weight: {lhs: {bits: 16}, rhs: {range: {integer_bits: 3}}}
""")
    from lightning_int8.recipes import wageubn

    assert recipes.get(path) == wageubn.make(error_bits=16, activation_bits=3)


def test_a_base_is_looked_for_beside_the_file(tmp_path):
    (tmp_path / "recipes" / "shared").mkdir(parents=True)
    (tmp_path / "recipes" / "shared" / "above.yaml").write_text("base: unified\nkeep_float: [last]")
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_text("base: shared/above.yaml\nnorm: range")
    recipe = recipes.get(path)
    assert (recipe.name, recipe.keep_float, recipe.norm) == ("mine", ("last",), "range")
    assert recipe.learning_rate == recipes.get("unified").learning_rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: unifed", r"recipe: 'unifed' is not one of default"),
        ("base: default\noverrides: [1]", r"recipe\.overrides: \[1\] is not a mapping of globs to fields"),
        ("base: default\noverrides: {a: {bits: 8}}", r"recipe\.overrides\.a: field 'bits' is not one of name, output"),
        (
            "base: default\nlearning_rate: {alpha: -1}",
            r"recipe\.learning_rate: alpha: -1 is not a finite number from 0 to inf",
        ),
        ("base: default\nlearning_rate: {alpha: .inf}", r"recipe\.learning_rate: alpha: inf is not a finite number"),
        ("base: default\nbit_width: {operands: xg}", r"recipe\.bit_width: operands: 'xg' is not a sequence of 'x'"),
        ("base: default\nbit_width: {operands: 5}", r"recipe\.bit_width: operands: 5 is not a sequence of 'x'"),
        ("base: default\nbit_width: {epoch_steps: true}", r"epoch_steps: True is not a positive number"),
        ("base: default\nkeep_float: first", r"keep_float: 'first' is not a sequence of 'first' and 'last'"),
        ("base: default\nkeep_float: 5", r"keep_float: 5 is not a sequence of 'first' and 'last'"),
        ("base: default\nname: 5", r"name: 5 is not a string"),
        ("base: default\noptimizer: [SGD]", r"optimizer: \['SGD'\] is not a string"),
        (
            "base: unified\noverrides: {head: {keep_float: [first]}}",
            r"recipe\.overrides\.head: field 'keep_float' is the whole model's and has no override",
        ),
        ("base: bad.yaml", r"bad\.yaml': base: the file is its own base"),
        ("base: default\nbit_width: {mode: 5}", r"recipe\.bit_width: mode: 5 is not 1 or 2"),
        ("base: default\ngrad_input: {lhs: {per: channel}}", r"grad_input\.lhs\.per: 'channel' is not possible"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.get(path)


# --- The optimizer ---------------------------------------------------------------------------------------------------


class FixedPoint(Digits):
    def configure_optimizers(self):
        return FixedPointSGD(self.parameters(), 0.1)


def test_another_optimizer_than_the_recipe_asks_for_is_warned_about_once(make_trainer):
    trainer = make_trainer(Int8Precision("wageubn"), max_epochs=1)
    with pytest.warns(UserWarning, match="recipe 'wageubn' is meant for FixedPointSGD"):
        trainer.fit(Digits())
    trainer.fit_loop.max_epochs = 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is meant for.*")
        trainer.fit(Digits())


def test_the_right_optimizer_is_not_warned_about(make_trainer, recwarn):
    model = FixedPoint()
    make_trainer(Int8Precision("wageubn"), max_epochs=1).fit(model)
    assert not [w for w in recwarn if "is meant for" in str(w.message)]
    steps = model.net[5].weight.detach().double() * 2**23
    assert torch.equal(steps, steps.round()), "weights on the grid of 24 bits"
