"""A linear layer as it is served: its weights stand still until the next publication.

A CPU's matrix kernel wants weights in a layout of its own, and with so few rows as a draft step has
makes it anew in half the time of every call. Here it is made once, and the sums stay the same up to
rounding. On other devices, and where PyTorch comes without that kernel (oneDNN's), the weights are
served as they are.

Leaves out training. Shape legend: fastrl/types.py; O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_USUAL_ROWS = 32
"""For which the layout is made: it serves others too."""


class ServedLinear:
    """`linear` by weights as they were when this was made.

    Args:
        weight_OI: its storage may be served on.
        bias_O: likewise; None for none.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        weight_OI = weight_OI.detach()
        self.bias_O = None if bias_O is None else bias_O.detach()
        self._is_packed = has_kernel(weight_OI.device, weight_OI.dtype)
        if self._is_packed:
            pack = torch.ops.mkldnn._reorder_linear_weight
            self._weight: Tensor = pack(weight_OI.contiguous(), _USUAL_ROWS)
        else:
            self._weight = weight_OI

    @classmethod
    def joined(cls, *layers: nn.Linear) -> ServedLinear:
        """Of layers with the same input: their outputs side by side."""
        if len(layers) == 1:
            return cls(layers[0].weight, layers[0].bias)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        weight_OI = torch.cat([layer.weight.detach() for layer in layers])
        return cls(weight_OI, torch.cat([bias.detach() for bias in biases]) if biases else None)

    @property
    def weight_OI(self) -> Tensor:
        """What it computes with; a copy where that has a layout of its own."""
        return self._weight.to_dense() if self._is_packed else self._weight

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs [*, O] of inputs [*, I]."""
        if self._is_packed:
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
                inputs, self._weight, self.bias_O, "none", [], ""
            )
            return outputs
        return linear(inputs, self._weight, self.bias_O)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights are laid out anew, which is a copy."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
