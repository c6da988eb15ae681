"""The networks of the MAML paper's sinusoid and Omniglot experiments."""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn


def sinusoid_network() -> nn.Sequential:
    """Make the regression network, 1-40-40-1 with ReLU.

    The weights are torch's default: from MAML's normal of 0.01 training needs some two thousand
    meta-steps more to get going, and ends no better.
    """
    return nn.Sequential(
        nn.Linear(1, 40),
        nn.ReLU(),
        nn.Linear(40, 40),
        nn.ReLU(),
        nn.Linear(40, 1),
    )


def omniglot_mlp(ways: int) -> nn.Sequential:
    """Make the fully connected Omniglot network, 784-256-128-64-64-ways with batch norm.

    Images of any layout are flattened; weights are drawn from a normal of 0.01.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    widths = [784, 256, 128, 64, 64]
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers[f"linear{i}"] = _linear(inputs, outputs)
        layers[f"norm{i}"] = _shift_only(nn.BatchNorm1d(outputs, 1e-3, track_running_stats=False))
        layers[f"relu{i}"] = nn.ReLU()
    layers["linear5"] = _linear(widths[-1], ways)
    return nn.Sequential(layers)


def omniglot_conv(ways: int) -> nn.Sequential:
    """Make the convolutional Omniglot network: four convolutions of stride 2, no pooling.

    Images are [N, 1, 28, 28]. The spatial mean of the last 64 channels goes to one linear layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = [1, 64, 64, 64, 64]
    for i, (inputs, outputs) in enumerate(pairwise(channels), start=1):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers[f"conv{i}"] = conv
        layers[f"norm{i}"] = _shift_only(nn.BatchNorm2d(outputs, 1e-3, track_running_stats=False))
        layers[f"relu{i}"] = nn.ReLU()
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = _linear(channels[-1], ways)
    return nn.Sequential(layers)


def not_batch_norm(name: str, parameter: Tensor) -> bool:
    """Choose what the inner loop of the Omniglot networks moves: all but batch norm's shift."""
    return not name.startswith("norm")


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


def _shift_only(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    # Before a ReLU and another linear layer a scale adds nothing; MAML has none.
    norm.weight.requires_grad_(False)
    return norm
