"""Small image networks in plain torch.nn: ResNet, MobileNetV2 and VGG-11 for pictures of about 32 x 32 pixels.

Every network has the parts ``stem``, ``features`` and ``head``, takes float ``(B, in_channels, H, W)`` and returns
logits ``(B, classes)``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    """Return a convolution without bias, batch norm and, where one is given, the activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    if activation is not None:
        parts.append(activation(inplace=True))
    return nn.Sequential(*parts)


class SmallImageNetwork(nn.Module):
    """Stem, features, global average and one linear layer."""

    def __init__(self, stem: nn.Module, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of images ``(B, in_channels, H, W)``."""
        return self.head(self.pool(self.features(self.stem(images))).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016), which is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs, H / stride, W / stride)`` of x ``(B, inputs, H, W)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(depth: int, in_channels: int, classes: int, width: int = 16) -> SmallImageNetwork:
    """Return the ResNet for CIFAR of He et al. (2016), with projection shortcuts.

    Args:
        depth: 6 n + 2 weighted layers.
        in_channels: Of the image.
        classes: logits.
        width: Channels of the first of the three stages; the next two have twice and four times as many.

    Raises:
        ValueError: ``depth`` is not 6 n + 2 with n at least 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: {depth} is not 6 n + 2 (8, 14, 20, 26, 32, ...)")
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            outputs = width * 2**stage
            blocks.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    stem = conv_norm(in_channels, width, 3, activation=nn.ReLU)
    return SmallImageNetwork(stem, nn.Sequential(*blocks), inputs, classes)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter per channel by 3x3, project by 1x1 without activation (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_norm(inputs, hidden, 1, activation=nn.ReLU6)] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand,
            conv_norm(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            conv_norm(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs, H / stride, W / stride)`` of x ``(B, inputs, H, W)``."""
        return x + self.body(x) if self.residual else self.body(x)


def mobilenetv2(in_channels: int, classes: int) -> SmallImageNetwork:
    """Return MobileNetV2 at width 1 with the first two strides of 2 left out, as is usual for pictures of 32 pixels."""
    settings = [  # expansion, outputs, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    blocks: list[nn.Module] = []
    inputs = 32
    for expansion, outputs, repeats, stride in settings:
        for repeat in range(repeats):
            blocks.append(InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion))
            inputs = outputs
    blocks.append(conv_norm(inputs, 1280, 1, activation=nn.ReLU6))
    stem = conv_norm(in_channels, 32, 3, activation=nn.ReLU6)
    return SmallImageNetwork(stem, nn.Sequential(*blocks), 1280, classes)


def vgg11(in_channels: int, classes: int) -> SmallImageNetwork:
    """Return VGG-11 with batch norm (Simonyan and Zisserman 2015), one linear layer and a global average at its end.

    The fifth pooling is left out: 28 pixels survive only four.
    """
    layers: list[nn.Module] = [nn.MaxPool2d(2)]
    inputs = 64
    for outputs in (128, 0, 256, 256, 0, 512, 512, 0, 512, 512):
        if outputs:
            layers.append(conv_norm(inputs, outputs, 3, activation=nn.ReLU))
            inputs = outputs
        else:
            layers.append(nn.MaxPool2d(2))
    stem = conv_norm(in_channels, 64, 3, activation=nn.ReLU)
    return SmallImageNetwork(stem, nn.Sequential(*layers), inputs, classes)


MODELS: dict[str, Callable[[int, int], SmallImageNetwork]] = {
    "resnet8": lambda in_channels, classes: resnet(8, in_channels, classes),
    "resnet20": lambda in_channels, classes: resnet(20, in_channels, classes),
    "mobilenetv2": mobilenetv2,
    "vgg11": vgg11,
}
