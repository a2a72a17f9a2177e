"""Every recipe of the folder: it trains, its work is counted, it survives YAML, and bad ones are refused by name."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_int8 import ContractionSpec, OperandSpec, Recipe, convert, gemm_counts, ranges, recipes
from lightning_int8.policies import BitWidthRule, DeviationFactor
from lightning_int8.recipe_mapping import OF_THE_MODEL, recipe_from_mapping
from lightning_int8.report import current
from lightning_int8.rewrite import conversion_of
from lightning_int8.spec import CHANNEL_AXIS, CONTRACTIONS, NORMS, OPERANDS, reduction_limit

LOSS_RATIO = 0.5
"""Loss after the toy training over loss before; float32 reaches about 0.05."""

STEPS = 30


def to_mapping(value):
    """A recipe as nested mappings, as a user would write it in YAML."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Recipe):
        parts = {glob: to_mapping(part) for glob, part in value.overrides}
        fields["overrides"] = {glob: {k: v for k, v in m.items() if k not in OF_THE_MODEL} for glob, m in parts.items()}
    module = type(value).__module__
    return {"name": module.rpartition(".")[2], **fields} if module.startswith(ranges.__name__) else fields


def test_the_folder_is_the_list():
    folder = Path(recipes.__file__).parent
    assert sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__") == recipes.names()
    assert "default" in recipes.names()


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_carries_its_file_name_and_says_what_it_departs_from(name):
    recipe = recipes.get(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipes.get(recipe) is recipe
    doc = importlib.import_module(f"lightning_int8.recipes.{name}").__doc__
    assert "Paper" in doc
    if "Paper: none" not in doc:
        assert "Kept" in doc
        assert "Departures" in doc


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get(name).output.lhs.bits = 16


def toy_problem():
    """Four noisy prototypes of 1x8x8, and a network of the converted layer types."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randn(4, 1, 8, 8)[labels] + 0.5 * torch.randn(64, 1, 8, 8)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return images, labels, nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 4))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_lowers_the_loss_and_its_contractions_are_counted(name):
    images, labels, model = toy_problem()
    report = convert(model, recipe=name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < LOSS_RATIO * losses[0], losses
    counts = gemm_counts(model)
    assert list(counts) == report.converted
    kept = {r.name for r in current(conversion_of(model).report, model).rows if r.reason.startswith("keep_float")}
    assert kept == {{"first": "0", "last": "5"}[position] for position in recipes.get(name).keep_float}
    for layer, of in counts.items():
        if layer in kept:
            assert of["output"] == 1, "the first step shows the order"
            continue
        assert of["output"] >= STEPS, layer
        assert of["grad_weight"] >= STEPS, layer
        assert of["grad_input"] == 0 if layer == "0" else of["grad_input"] >= STEPS, layer


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_survives_yaml(name, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(to_mapping(recipes.get(name))))
    assert recipes.get(path) == recipes.get(name)
    assert recipes.get(str(path)) == recipes.get(name)


RULES = st.one_of(
    st.builds(ranges.make, st.sampled_from(ranges.names()), every=st.none() | st.integers(1, 1000)),
    st.builds(ranges.make, st.just("ema_absmax"), decay=st.floats(0.0, 1.0, exclude_max=True)),
)


@st.composite
def any_recipe(draw):
    def operand(contraction, side):
        per = draw(st.sampled_from(["tensor", "channel"])) if (contraction, side) in CHANNEL_AXIS else "tensor"
        rounding = draw(st.sampled_from(["nearest", "stochastic"]))
        bits = draw(st.sampled_from([8, 9, 16, 24]))
        affine = bits != 9 and draw(st.booleans())
        return OperandSpec(bits=bits, range=draw(RULES), per=per, rounding=rounding, affine=affine)

    parts = {c: ContractionSpec(lhs=operand(c, "lhs"), rhs=operand(c, "rhs")) for c in CONTRACTIONS}
    rest = {
        "norm": draw(st.sampled_from(NORMS)),
        "keep_float": draw(st.sampled_from([(), ("first",), ("last",), ("first", "last")])),
        "learning_rate": draw(st.none() | st.builds(DeviationFactor, alpha=st.floats(0, 100), beta=st.floats(0, 1))),
        "bit_width": draw(st.none() | st.builds(BitWidthRule, mode=st.sampled_from([1, 2]))),
    }
    recipe = Recipe(name=draw(st.text("abc_", min_size=1)), **parts, **rest)
    plain = Recipe(name=recipe.name, keep_float=recipe.keep_float, grad_weight=parts["grad_weight"])
    overrides = draw(st.sampled_from([(), (("head", plain),), (("*.dw", plain), ("head", plain))]))
    return dataclasses.replace(recipe, overrides=overrides)


@given(any_recipe())
@settings(deadline=None, max_examples=50)
def test_any_recipe_survives_yaml(recipe):
    again = recipe_from_mapping(yaml.safe_load(yaml.safe_dump(to_mapping(recipe))))
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_a_file_without_a_name_takes_the_name_of_the_file_and_the_defaults(tmp_path):
    path = tmp_path / "wide.yml"
    path.write_text("output: {lhs: {bits: 16, range: {name: ema_absmax, decay: 0.5, every: 4}}}")
    lhs = OperandSpec(bits=16, range=ranges.make("ema_absmax", decay=0.5, every=4))
    assert recipes.get(path) == Recipe(name="wide", output=ContractionSpec(lhs=lhs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {lhs: {bits: 12}}", r"recipe\.output\.lhs: bits: 12 is not one of 8, 9, 16, 24"),
        ("output: {lhs: {bits: 8.0}}", r"recipe\.output\.lhs: bits: 8\.0 is not one of"),
        ("grad_input: {lhs: {rounding: up}}", r"recipe\.grad_input\.lhs: rounding: 'up' is not one of"),
        ("grad_weight: {rhs: {affine: 1}}", r"recipe\.grad_weight\.rhs: affine: 1 is not one of"),
        ("grad_weight: {rhs: {bit: 8}}", r"recipe\.grad_weight\.rhs: field 'bit' is not one of bits, "),
        ("grad_weights: {}", r"recipe: field 'grad_weights' is not one of name, output"),
        ("output: 8", r"recipe\.output: 8 is not a mapping of fields"),
        ("output: {lhs: {per: channel}}", r"output\.lhs\.per: 'channel' is not possible: .* channels of x"),
        ("output: {lhs: {range: absmin}}", r"recipe\.output\.lhs\.range: range: 'absmin' is not one of absmax"),
        ("output: {lhs: {range: 3}}", r"recipe\.output\.lhs\.range: 3 is neither the name"),
        ("output: {lhs: {range: {every: 3}}}", r"recipe\.output\.lhs\.range: .* nor a mapping with 'name'"),
        ("output: {lhs: {range: {name: absmax, every: 0}}}", r"recipe\.output\.lhs\.range: every: 0 is not"),
        ("output: {lhs: {range: {name: absmax, path: 3}}}", r"recipe\.output\.lhs\.range: .*field 'path' is not one"),
        ("output: {lhs: {range: {name: absmax, 3: 4}}}", r"recipe\.output\.lhs\.range: "),
        ("output: {lhs: {range: {name: ema_absmax, decay: x}}}", r"recipe\.output\.lhs\.range: "),
        ("[1, 2]", r"recipe: \[1, 2\] is not a mapping of fields"),
        ("output: {lhs: ", r"bad\.yaml"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_path_of_the_field(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        recipes.get(path)
    assert str(path) in str(error.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe: 'defualt' is not one of default"):
        recipes.get("defualt")
    with pytest.raises(ValueError, match=r"recipe: cannot read .*gone\.yaml"):
        recipes.get(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="recipe: 8 is not a name, a path or a Recipe"):
        recipes.get(8)
    with pytest.raises(ValueError, match="field 'name' is missing"):
        recipe_from_mapping({})


# --- Validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 4),
        ("bits", 10),
        ("bits", "8"),
        ("bits", True),
        ("per", "row"),
        ("rounding", "up"),
        ("affine", None),
        ("range", "absmax"),
        ("range", type(ranges.make("absmax"))),
    ],
)
def test_a_bad_field_of_an_operand_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        OperandSpec(**{field: value})


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_a_scale_that_the_sum_runs_over_is_refused_by_operand(contraction, side):
    spec = {contraction: ContractionSpec(**{side: OperandSpec(per="channel")})}
    if (contraction, side) in CHANNEL_AXIS:
        assert getattr(Recipe(name="fine", **spec), contraction) == spec[contraction]
        return
    tensor = dict(zip(("lhs", "rhs"), OPERANDS[contraction], strict=True))[side]
    with pytest.raises(ValueError, match=rf"recipe 'mine': {contraction}\.{side}\.per: .* the channels of {tensor},"):
        Recipe(name="mine", **spec)


def test_parts_of_the_wrong_type_are_named():
    with pytest.raises(ValueError, match=r"grad_input: OperandSpec.* is not a ContractionSpec"):
        Recipe(name="mine", grad_input=OperandSpec())
    with pytest.raises(ValueError, match=r"grad_weight\.rhs: 8 is not an OperandSpec"):
        Recipe(name="mine", grad_weight=ContractionSpec(rhs=8))


@pytest.mark.parametrize(
    ("a", "b", "limit"),
    [
        ({}, {}, 133_144),
        ({"affine": True}, {}, 66_572),
        ({"affine": True}, {"affine": True}, 33_286),
        ({"bits": 16}, {}, 132_104),
        ({"bits": 24}, {"bits": 16}, 131_071),
        ({"bits": 16, "affine": True}, {"bits": 24, "affine": True}, 33_025),
    ],
)
def test_the_reduction_limit_is_the_longest_sum_that_int32_holds(a, b, limit):
    a, b = OperandSpec(**a), OperandSpec(**b)
    assert reduction_limit(a, b) == reduction_limit(b, a) == limit
    largest = a.largest_difference * b.largest_difference
    assert limit * largest < 2**31 <= (limit + 1) * largest
