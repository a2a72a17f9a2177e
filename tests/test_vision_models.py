"""The small image networks and the module that trains them."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_int8.vision.classifier import ImageClassifier
from lightning_int8.vision.data import ImageData
from lightning_int8.vision.models import MODELS, resnet
from lightning_int8.vision.readers import ImageSet, read_mnist_5k

# For three input channels and ten classes. ResNets: the papers' tables with projections. MobileNetV2: torchvision's
# 3,504,872 with ten instead of 1,000 classes. VGG-11: torchvision's features with batch norm, without biases, and one
# linear layer.
PARAMETERS = {"resnet8": 78_042, "resnet20": 272_474, "mobilenetv2": 2_236_682, "vgg11": 9_228_362}
# Convolutions and linear layers: 6 n + 2 and two projections; 17 blocks (one without expansion); 8 and 1.
LAYERS = {"resnet8": 10, "resnet20": 22, "mobilenetv2": 53, "vgg11": 9}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_logits_have_one_column_a_class_and_every_parameter_learns(name, channels, size):
    torch.manual_seed(0)
    network = MODELS[name](channels, 7)
    logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_have_the_published_sizes(name):
    network = MODELS[name](3, 10)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == LAYERS[name]


def test_the_networks_are_plain_torch_layers_with_a_stem_and_a_head():
    for build in MODELS.values():
        network = build(1, 10)
        assert {"stem", "features", "head"} <= {name for name, _ in network.named_children()}
        computing = [m for m in network.modules() if any(True for _ in m.parameters(recurse=False))]
        assert {type(m) for m in computing} == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_a_depth_that_no_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth: {depth} is not 6 n"):
        resnet(depth, 3, 10)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ValueError, match="model: 'resnet9' is not one of resnet8"):
        ImageClassifier("resnet9")


@pytest.mark.parametrize("channels", [1, 3])
def test_activations_are_channels_last(channels):
    classifier = ImageClassifier("resnet8", channels)
    seen = []
    classifier.network.features.register_forward_hook(lambda module, inputs, output: seen.append(output))
    classifier(torch.randn(2, channels, 28, 28))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_a_seed_decides_the_first_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().reshape(-1) for p in ImageClassifier("resnet8").parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_training_follows_one_cycle_and_learns_digits():
    images = read_mnist_5k()
    few = ImageSet(
        train_images=images.train_images[:640],
        train_labels=images.train_labels[:640],
        test_images=images.test_images[:200],
        test_labels=images.test_labels[:200],
    )
    torch.manual_seed(0)
    classifier = ImageClassifier("resnet8", lr=0.1)
    data = ImageData(image_set=few, batch_size=32)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, datamodule=data)
    assert trainer.global_step == 80
    (schedule,) = [config.scheduler for config in trainer.lr_scheduler_configs]
    assert schedule.total_steps == 80
    assert schedule.get_last_lr()[0] < 1e-3 * 0.1, "the cycle ends with the last step"
    (logged,) = trainer.test(classifier, datamodule=data, verbose=False)
    with torch.no_grad():
        guesses = torch.cat([classifier.eval()(x).argmax(1) for x, _ in data.test_dataloader()])
    assert logged["test_accuracy"] == pytest.approx((guesses == few.test_labels).float().mean().item())
    assert logged["test_accuracy"] > 0.5, "guessing gives 0.1"
