"""Models of other libraries, built from small configurations: converted, trained a step, compared with float."""

import copy
import importlib

import pytest
import torch
from torch import nn

from lightning_int8 import ContractionSpec, OperandSpec, Recipe, convert, gemm_counts, restore

COSINE_FLOOR = {
    "bert": 0.998,
    "vit": 0.985,
    "resnet": 0.88,
    "gpt2": 0.999,
    "llama": 0.998,
    "torchvision resnet18": 0.88,
    "torchvision densenet121": 0.90,
    "timm convnext_atto": 0.997,
    "timm vit_tiny_patch16_224": 0.97,
}
"""Cosine of each parameter's gradient with 8-bit operands and in float, at random weights, a little below the least one
measured. In deep networks of ReLUs and in batch norms over few values the noise of the forward pass decides."""

WIDE_BITS = 24
WIDE_COSINE_FLOOR = 0.999999
"""The same with operands of three planes: what 8 bits lack is noise and goes with it."""

BFLOAT16_FLOOR = 0.95
"""Likewise with bfloat16 between the contractions."""

EVAL_FLOOR, TRAINING_FLOOR = 0.9999, 0.995
"""Likewise for whole networks with fixed and with own statistics, which in the last layers are of few values: there
float32 itself comes to 0.9999 of float64, with one order of summation or another."""

NEGLIGIBLE = 1e-6
"""Norm of a gradient relative to the largest one, below which it is rounding noise in float too."""

LABELS = torch.tensor([0, 1, 2, 0])


def recipe_of(bits):
    operand, gradient = OperandSpec(bits=bits), OperandSpec(bits=bits, rounding="stochastic")
    return Recipe(
        name=f"{bits} bits",
        output=ContractionSpec(lhs=operand, rhs=operand),
        grad_input=ContractionSpec(lhs=gradient, rhs=operand),
        grad_weight=ContractionSpec(lhs=gradient, rhs=operand),
    )


def bert(library):
    config = library.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **small("hidden_dropout_prob"))
    tokens = torch.randint(0, 50, (4, 12))
    return library.BertForSequenceClassification(config), {"input_ids": tokens, "labels": LABELS}


def vit(library):
    config = library.ViTConfig(image_size=16, patch_size=4, num_labels=3, **small("hidden_dropout_prob"))
    return library.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16), "labels": LABELS}


def resnet(library):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    config = library.ResNetConfig(layer_type="basic", num_labels=3, **sizes)
    return library.ResNetForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32), "labels": LABELS}


def gpt2(library):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    tokens = torch.randint(0, 50, (4, 12))
    return library.GPT2LMHeadModel(library.GPT2Config(**sizes, **none)), {"input_ids": tokens, "labels": tokens}


def llama(library):
    config = library.LlamaConfig(vocab_size=50, max_position_embeddings=16, num_key_value_heads=2, **small())
    tokens = torch.randint(0, 50, (4, 12))
    return library.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def small(*dropouts):
    """Two blocks of width 32; without dropout, so that two models can be compared."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return sizes | dict.fromkeys([*dropouts, "attention_probs_dropout_prob"] if dropouts else [], 0.0)


TRANSFORMERS = [bert, vit, resnet, gpt2, llama]


def build(make):
    """A model in training mode, the arguments of its forward, and a function that gives the loss."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = make(library)
    return model.train(), lambda m: m(**batch).loss


def gradients(model, loss):
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def least_cosine(truth, measured):
    """The least aligned parameter, and those whose gradient is negligible."""
    assert truth.keys() == measured.keys()
    largest = max(g.norm() for g in truth.values())
    negligible = {name for name, g in truth.items() if g.norm() < NEGLIGIBLE * largest}
    cosine = nn.CosineSimilarity(0)
    rest = truth.keys() - negligible
    return *min(
        (cosine(truth[n].flatten().double(), measured[n].flatten().double()).item(), n) for n in rest
    ), negligible


def check_gradients(model, loss, recipe, floor):
    """Convert a copy of ``model`` and compare its gradients; returns the copy and its report."""
    converted = copy.deepcopy(model)
    report = convert(converted, recipe=recipe)
    _, truth = gradients(model, loss)
    _, measured = gradients(converted, loss)
    cosine, parameter, negligible = least_cosine(truth, measured)
    assert cosine > floor, f"{parameter}: {cosine:.5f}"
    # A constant added to all keys cancels in the softmax: their bias has no gradient.
    assert all(n.endswith(("key.bias", "k_proj.bias")) for n in negligible), negligible
    return converted, report


def owned_layers(model):
    """Names of the Linear and Conv layers of a float model."""
    return [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]


def check_counts(model, report, pairs, first):
    """Every converted layer executed its three contractions once, but for grad_input of the layer that sees data."""
    counts = gemm_counts(model)
    assert list(counts) == report.converted
    for layer, of in counts.items():
        expected = {"output": pairs, "grad_input": 0 if layer == first else pairs, "grad_weight": pairs}
        assert of == expected, layer


def first_layer(model):
    """The converted layer that sees data without gradient; none where an embedding comes first."""
    has_embedding = any(isinstance(m, nn.Embedding) for m in model.modules())
    return None if has_embedding else owned_layers(model)[0]


@pytest.mark.parametrize("make", TRANSFORMERS, ids=lambda make: make.__name__)
def test_a_transformers_model_trains_a_step(make):
    model, loss = build(make)
    name, keys, expected = make.__name__, list(model.state_dict()), owned_layers(model)
    converted, report = check_gradients(model, loss, "default", COSINE_FLOOR[name])
    assert report.converted == expected
    assert list(converted.state_dict()) == keys
    check_counts(converted, report, pairs=1, first=first_layer(model))
    before = loss(converted).item()
    assert before == pytest.approx(loss(model).item(), rel=0.01)
    torch.optim.SGD(converted.parameters(), lr=0.02).step()
    assert loss(converted).item() < before


@pytest.mark.parametrize("make", TRANSFORMERS, ids=lambda make: make.__name__)
def test_the_gradients_of_wide_operands_are_those_of_float(make):
    model, loss = build(make)
    converted, report = check_gradients(model, loss, recipe_of(WIDE_BITS), WIDE_COSINE_FLOOR)
    check_counts(converted, report, pairs=(WIDE_BITS // 8) ** 2, first=first_layer(model))


def test_the_foreign_layers_of_gpt2_stay_in_float_and_are_reported():
    model, _ = build(gpt2)
    foreign = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    report = convert(model)
    rows = {row.name: row for row in report.rows}
    assert len(foreign) == 8
    for name in foreign:
        assert (rows[name].kind, rows[name].decision) == ("Conv1D", "float")
        assert rows[name].reason == "not a layer type that is converted"
        assert name in str(report)
    assert report.converted == ["lm_head"]


def test_restored_models_compute_what_they_computed():
    model, loss = build(bert)
    before = loss(model)
    convert(model)
    assert loss(model) != before
    restore(model)
    assert loss(model) == before


# --- torchvision and timm --------------------------------------------------------------------------------------------


def vision_model(library, name):
    """A classifier of 3 classes from a library that needs torchvision, or skip with the reason.

    In eval mode, or the batch norms of a random network would turn the noise of a small batch into anything.
    """
    try:
        importlib.import_module("torchvision")  # a build for another torch fails with RuntimeError, not ImportError
        module = importlib.import_module("torchvision.models" if library == "torchvision" else library)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{library} cannot be imported here: {error}")
    torch.manual_seed(0)
    if library == "torchvision":
        return getattr(module, name)(weights=None, num_classes=3).eval()
    options = {"img_size": 64} if name.startswith("vit") else {"ls_init_value": 1.0}
    return module.create_model(name, num_classes=3, **options).eval()


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "densenet121"),
        ("timm", "convnext_atto"),
        ("timm", "vit_tiny_patch16_224"),
    ],
)
def test_a_vision_model_trains_a_step(library, name):
    model = vision_model(library, name)
    images, labels = torch.randn(8, 3, 64, 64), LABELS.repeat(2)

    def loss(m):
        return nn.functional.cross_entropy(m(images), labels)

    key, expected = f"{library} {name}", owned_layers(model)
    converted, report = check_gradients(model, loss, "default", COSINE_FLOOR[key])
    assert report.converted == expected
    check_counts(converted, report, pairs=1, first=expected[0])
    check_gradients(model, loss, recipe_of(WIDE_BITS), WIDE_COSINE_FLOOR)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("train", [True, False])
def test_fusion_changes_no_gradient(name, train):
    """With operands of three planes all that fusion changes is the order of sums in batch norm."""
    model = vision_model("torchvision", name).train(train).requires_grad_(True)
    size = (33, 47) if name == "vgg11" else (65, 47)  # odd: borders that no window covers
    images, labels = torch.randn(8, 3, *size), LABELS.repeat(2)

    def loss(m):
        torch.manual_seed(1)  # of dropout
        return nn.functional.cross_entropy(m(images), labels)

    _, truth = gradients(model, loss)
    found = []
    for fuse in (True, False):
        net = copy.deepcopy(model)
        convert(net, recipe_of(WIDE_BITS), skip="classifier.*" if name == "vgg11" else (), fuse=fuse)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(3):  # at the fourth step ranges are known, and nothing needs to be computed for their sake
            gradients(net, loss)
            optimizer.step()
        found.append(gradients(net, loss)[1])
    (fused, parameter, _), (unfused, _, _) = (least_cosine(truth, measured) for measured in found)
    floor = TRAINING_FLOOR if train else EVAL_FLOOR
    assert fused > floor, f"{parameter}: {fused:.6f}"
    assert unfused > floor


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_fusion_loses_no_more_of_a_gradient_in_bfloat16(name):
    """Operands have three planes: all that is lost is lost between the contractions."""
    model = vision_model("torchvision", name)
    images, labels = torch.randn(8, 3, 65, 47), LABELS.repeat(2)

    def loss(m, dtype=torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return nn.functional.cross_entropy(m(images), labels)

    _, truth = gradients(model, lambda m: loss(m, torch.float32))
    found = {}
    for fuse in (True, False):
        net = copy.deepcopy(model)
        convert(net, recipe_of(WIDE_BITS), fuse=fuse)
        found[fuse], parameter, _ = least_cosine(truth, gradients(net, loss)[1])
        assert found[fuse] > BFLOAT16_FLOOR, f"fuse={fuse}, {parameter}: {found[fuse]:.4f}"
    assert found[True] > found[False] - (1 - BFLOAT16_FLOOR) / 4
