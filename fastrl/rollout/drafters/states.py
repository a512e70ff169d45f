"""The target's states that a drafter reads, from a forward of transformers' model.

Leaves out the embedded engine's own forward (torch_engine/target.py), which gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def joined_states(output: Any, layers: Sequence[int]) -> Tensor:
    """Hidden states after the final norm and, side by side with them, these layers' inputs,
    [*, S]; constants where there are layers.

    Args:
        output: of a base model; of one that was asked for its hidden states, where there are
            layers.
        layers: a drafter's `feature_layers`.
    """
    last: Tensor = output.last_hidden_state
    if not layers:
        return last
    inputs = [output.hidden_states[layer].detach() for layer in layers]
    return torch.cat((last.detach(), *inputs), dim=-1)
