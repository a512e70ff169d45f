"""Served layers against `torch.nn.functional.linear` of the weights they were made of."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fastrl.rollout.torch_engine.served_linear import ServedLinear


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("size", [(5, 3), (96, 64), (200, 48)], ids=str)
def test_bfloat16_is_served_exactly(size, num_rows, has_bias):
    torch.manual_seed(0)
    weight = torch.randn(size, dtype=torch.bfloat16)
    bias = torch.randn(size[0], dtype=torch.bfloat16) if has_bias else None
    inputs = torch.randn(2, num_rows, size[1], dtype=torch.bfloat16)
    served = ServedLinear(weight, bias)
    exact = linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(served(inputs).double(), exact, rtol=2**-8, atol=2**-6)
    assert torch.equal(served.weight_OI, weight)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_joined_layers_give_their_outputs_side_by_side(has_bias):
    torch.manual_seed(0)
    layers = [nn.Linear(48, size, bias=has_bias) for size in (32, 16, 16)]
    inputs = torch.randn(2, 5, 48)
    with torch.inference_mode():
        served = ServedLinear.joined(*layers)
        expected = torch.cat([layer(inputs) for layer in layers], dim=-1)
        torch.testing.assert_close(served(inputs), expected)
        assert torch.equal(served.weight_OI, torch.cat([layer.weight for layer in layers]))


def test_what_does_not_lie_as_it_is_read_is_served_all_the_same():
    """Rows that were picked, transposed weights."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 32).t(), torch.randn(3, 7, 64).transpose(0, 1)
    torch.testing.assert_close(ServedLinear(weight)(inputs), linear(inputs, weight))
