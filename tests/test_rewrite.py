"""Conversion in place and back: `convert`, `restore` and the report."""

import copy
import gc
import json
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import network, same, snapshot
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from lightning_int8 import convert, gemm_counts, restore
from lightning_int8.layers import Int8Conv2d, Int8Linear
from lightning_int8.rewrite import conversion_of, layer_states


def train_step(model, x, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def images(seed=1, count=4):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def clip_values(model):
    return [o.clip_value for s in layer_states(model) for o in s.distinct_operands() if o.clip_value is not None]


# --- in place, once, and back ---------------------------------------------------------------------------------------


def test_conversion_keeps_objects_parameters_keys_and_buffers():
    model = network()
    modules, parameters, before = list(model.modules()), list(model.parameters()), snapshot(model)
    convert(model)
    assert [type(model[0]), type(model[4])] == [Int8Conv2d, Int8Linear]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(model.state_dict(), before)
    assert isinstance(model[4], nn.Linear)
    assert "int8" in repr(model[0])


def test_hooks_of_a_layer_still_run():
    model, calls = network(), []
    for register in ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"):
        getattr(model[4], register)(lambda *_, name=register: calls.append(name))
    model[4].weight.register_hook(lambda g: calls.append("weight"))
    convert(model)
    train_step(model, images())
    assert sorted(calls) == sorted(
        ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook", "weight"]
    )


def test_converting_twice_is_converting_once():
    model = network()
    first = convert(model, skip="0")
    train_step(model, images())
    states, clips = layer_states(model), clip_values(model)
    again = convert(model, skip="0")
    assert [replace(r, route="") for r in again.rows] == [replace(r, route="") for r in first.rows]
    assert all(a is b for a, b in zip(layer_states(model), states, strict=True))
    assert same(clip_values(model), clips)


def test_restore_gives_the_float_model_back_bit_for_bit():
    model, twin = network(), network()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    convert(model)
    train_step(model, images())
    trained = snapshot(model)
    restore(model)
    assert same(model.state_dict(), trained)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    twin.load_state_dict(trained)
    assert torch.equal(model.eval()(images(2)), twin.eval()(images(2)))
    assert "int8" not in repr(model)


def test_restore_of_a_float_model_changes_nothing():
    model = network()
    types = [type(m) for m in model.modules()]
    restore(model)
    assert [type(m) for m in model.modules()] == types


def test_a_restored_model_can_be_converted_with_other_arguments():
    model = network()
    convert(model)
    restore(model)
    assert convert(model, skip="0", seed=3).converted == ["4", "5"]


def test_a_layer_is_a_model_too():
    layer = nn.Linear(8, 4)
    assert convert(layer).converted == [""]
    train_step(layer, torch.randn(3, 8))
    restore(layer)
    assert type(layer) is nn.Linear


def test_a_new_head_after_conversion_is_converted_too():
    """Fine-tuning: train, replace the last layer, train again."""
    model = network()
    convert(model)
    train_step(model, images())
    model[5] = nn.Linear(16, 3)
    report = convert(model)
    train_step(model, images())
    assert "5" in report.converted
    assert type(model[5]) is Int8Linear
    assert gemm_counts(model)["5"]["grad_weight"] == 1


def test_a_part_that_was_restored_is_converted_again():
    model = nn.Sequential(network(), nn.Linear(10, 2))
    convert(model)
    restore(model[0])
    assert convert(model).converted == ["0.0", "0.4", "0.5", "1"]
    assert {type(m) for m in model.modules()} >= {Int8Conv2d, Int8Linear}
    train_step(model, images())
    assert all(counts["output"] == 1 for counts in gemm_counts(model).values())


# --- what is skipped, and why ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("head", ["head"]),
        (("head",), ["head"]),
        (["head", "body.*.0"], ["body.0.0", "body.1.0", "head"]),
        ("body.1", ["body.1.0", "body.1.1"]),
        ("b*", ["body.0.0", "body.0.1", "body.1.0", "body.1.1"]),
        ("*.1", ["body.0.1", "body.1.0", "body.1.1"]),
        ((), []),
    ],
)
def test_skip_takes_names_globs_and_enclosing_modules(skip, kept):
    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = nn.ModuleDict({"body": nn.Sequential(block(), block()), "head": nn.Linear(4, 2)})
    report = convert(model, skip=skip)
    rows = {row.name: row for row in report.rows}
    assert [name for name, row in rows.items() if row.decision == "float"] == kept
    assert all("skip=" in rows[name].reason for name in kept)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in kept)


class TiltedLinear(nn.Linear):
    pass


def replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (lambda: nn.LSTM(4, 4), "recurrent"),
        (lambda: nn.GRUCell(4, 4), "recurrent"),
        (lambda: nn.MultiheadAttention(4, 2), "attention"),
        (lambda: nn.Bilinear(4, 4, 4), "bilinear"),
        (lambda: TiltedLinear(4, 4), "subclass of Linear"),
        (lambda: nn.LazyLinear(4), "subclass of Linear"),
        (lambda: nn.LazyConv2d(4, 3), "subclass of Conv2d"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "parametrized"),
        pytest.param(
            lambda: weight_norm(nn.Linear(4, 4)), "not a Parameter", marks=pytest.mark.filterwarnings("ignore")
        ),
        (replaced_forward, "replaced on the instance"),
        pytest.param(
            lambda: torch.jit.script(nn.Linear(4, 4)), "not a layer type", marks=pytest.mark.filterwarnings("ignore")
        ),
    ],
)
def test_the_report_says_why_a_layer_stays_in_float(layer, reason):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": layer()})
    kind = type(model["odd"])
    report = convert(model)
    row = next(r for r in report.rows if r.name == "odd")
    assert row.decision == "float"
    assert reason in row.reason
    assert report.converted == ["plain"]
    assert type(model["odd"]) is kind


def test_a_lazy_layer_is_converted_once_it_has_its_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert convert(model).converted == ["1"]
    model(torch.randn(2, 6))
    restore(model)
    assert convert(model).converted == ["0", "1"]


def test_embeddings_norms_and_activations_are_no_rows():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    assert [row.name for row in convert(model).rows] == ["3"]


def test_the_report_is_a_table_and_json():
    report = convert(network(), skip="4")
    assert "2 of 3 layers run INT8" in str(report)
    rows = json.loads(json.dumps(report.to_dict()))["rows"]
    assert [(r["name"], r["kind"], r["decision"]) for r in rows] == [
        ("0", "Conv2d", "int8"),
        ("4", "Linear", "float"),
        ("5", "Linear", "int8"),
    ]


def test_only_integer_contractions_are_counted():
    model = network()
    report = convert(model, backend="reference")
    train_step(model, images())
    assert all("no INT8" in row.route for row in report.rows)
    assert all(count == 0 for counts in gemm_counts(model).values() for count in counts.values())
    assert all(state.counts.of("output") == 1 for state in layer_states(model))


# --- transformers: torch's fused evaluation path goes around the layers ----------------------------------------------


def encoder(**arguments):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_evaluates_with_the_layers_it_trains_with(padded):
    model, x = encoder(), torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]) if padded else None
    convert(model)
    trained = model(x, src_key_padding_mask=mask).detach()
    model.eval()
    with torch.no_grad():
        evaluated = model(x, src_key_padding_mask=mask)
    assert all(c["output"] == 2 for name, c in gemm_counts(model).items() if "linear" in name)
    keep = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    # Attention stays in float and has a fused path of its own; a float feed-forward would be 3e-3 away.
    assert (evaluated - trained)[keep].norm() < 1e-5 * trained[keep].norm()


def test_restore_gives_a_transformer_its_fused_path_back():
    model, twin, x = encoder().eval(), encoder().eval(), torch.randn(3, 5, 16)
    convert(model)
    restore(model)
    assert vars(model.layers[0]).keys() == vars(twin.layers[0]).keys()
    assert model.layers[0].activation_relu_or_gelu == twin.layers[0].activation_relu_or_gelu == 1
    assert model.use_nested_tensor == twin.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


def test_a_transformer_without_converted_layers_keeps_its_fused_path():
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(16, 2)})
    convert(model, skip="encoder")
    assert model["encoder"].layers[0].activation_relu_or_gelu == 1


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_a_shared_module_is_one_layer_that_runs_twice():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    keys = list(model.state_dict())
    assert convert(model).converted == ["0"]
    train_step(model, torch.randn(3, 8))
    assert gemm_counts(model) == {"0": {"output": 2, "grad_input": 1, "grad_weight": 2}}
    assert list(model.state_dict()) == keys
    restore(model)
    assert type(shared) is nn.Linear


@pytest.mark.parametrize("name", ["0", "2"])
def test_a_shared_module_can_be_skipped_by_any_of_its_names(name):
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 2))
    assert convert(model, skip=name).converted == ["3"]


def test_tied_weights_stay_tied_and_collect_both_gradients():
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False))
        model[2].weight = model[0].weight
        return model

    model, twin, tokens = tied(), tied(), torch.tensor([[1, 2, 3]])
    convert(model)
    for m in (model, twin):
        m(tokens).square().sum().backward()
    assert model[2].weight is model[0].weight
    assert len(list(model.parameters())) == 3
    error = (model[0].weight.grad - twin[0].weight.grad).norm() / twin[0].weight.grad.norm()
    assert 0 < error < 0.05


# --- copies ----------------------------------------------------------------------------------------------------------


def by_deepcopy(model, _):
    return copy.deepcopy(model)


def by_pickle(model, _):
    return pickle.loads(pickle.dumps(model))


def by_file(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_file])
def test_a_copy_trains_on_as_the_original_would_and_leaves_it_alone(duplicate, tmp_path):
    model = network()
    convert(model, refresh=2)
    for seed in range(3):
        train_step(model, images(seed))
    twin, before = duplicate(model, tmp_path), snapshot(model)
    for seed in range(3, 6):
        train_step(twin, images(seed))
    assert same(model.state_dict(), before)
    assert conversion_of(model).clock.steps == 3
    for seed in range(3, 6):
        train_step(model, images(seed))
    assert same(model.state_dict(), twin.state_dict())
    assert same(clip_values(model), clip_values(twin))


def test_a_copy_restores_alone():
    model = network()
    convert(model)
    twin = copy.deepcopy(model)
    restore(twin)
    assert type(twin[4]) is nn.Linear
    assert type(model[4]) is Int8Linear


def test_an_averaged_copy_evaluates_its_own_weights():
    model = network()
    convert(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(3):
        train_step(model, images(seed))
        averaged.update_parameters(model)
    twin = copy.deepcopy(averaged).eval()
    restore(twin)
    found, expected = averaged.eval()(images(9)), twin(images(9))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_model_that_goes_out_of_use_is_freed():
    model = network()
    convert(model)
    train_step(model, images())
    layer = weakref.ref(model[0])
    del model
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activations_in_place_change_nothing(memory_format):
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(144, 4), nn.ReLU(inplace)
        model = nn.Sequential(*layers).to(memory_format=memory_format)
        convert(model)
        model(images()).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert same(*results)


def test_weights_given_from_outside_are_used():
    """torch.func.functional_call swaps parameters for one call."""
    model = network().eval()
    convert(model)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        assert not torch.func.functional_call(model, zeros, (images(),)).any()
        assert model(images()).any()


def test_a_pruned_layer_runs_and_restores():
    from torch.nn.utils import prune

    model = network()
    convert(model)
    prune.l1_unstructured(model[4], "weight", 0.5)
    train_step(model, images())
    assert model[4].weight_orig.grad.any()
    restore(model)
    assert type(model[4]) is nn.Linear
