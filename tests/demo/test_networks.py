"""The networks of the demonstrations: shapes, what is frozen, what adapts."""

import pytest
import torch
from torch import nn

from fastmeta.demo.networks import not_batch_norm, omniglot_conv, omniglot_mlp, sinusoid_network


def test_sinusoid_network_has_the_papers_size():
    model = sinusoid_network()
    assert model(torch.zeros(7, 1)).shape == (7, 1)
    assert sum(p.numel() for p in model.parameters()) == 80 + 1640 + 41


@pytest.mark.parametrize("network", [omniglot_mlp, omniglot_conv])
def test_omniglot_networks(network):
    model = network(5)
    images = torch.rand(6, 1, 28, 28)
    assert model(images).shape == (6, 5)
    # batch statistics always: what an image gets depends on the set it is in, in eval() too
    model.eval()
    assert not torch.allclose(model(images)[:3], model(images[:3]), rtol=1e-3, atol=1e-6)
    norms = [m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 4
    for norm in norms:
        assert norm.eps == 1e-3
        assert not norm.weight.requires_grad
        assert (norm.weight == 1).all()
        assert norm.bias.requires_grad


@pytest.mark.parametrize("network", [omniglot_mlp, omniglot_conv])
def test_everything_adapts_but_batch_norm(network):
    model = network(5)
    adapted = {name for name, p in model.named_parameters() if not_batch_norm(name, p)}
    expected = {
        f"{name}.{kind}"
        for name, module in model.named_children()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for kind in ("weight", "bias")
    }
    assert adapted == expected
