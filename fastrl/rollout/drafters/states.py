"""The target's states that a drafter reads, from a forward of transformers' model.

Leaves out the embedded engine's own forward (torch_engine/target.py), which gives the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def inputs_of_layers(base_model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """By layer, what these are given in the last forward under it; the others' are not kept."""
    inputs: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[layer] = args[0] if args else kwargs["hidden_states"]

    handles = [
        base_model.get_submodule(f"layers.{layer}").register_forward_pre_hook(
            functools.partial(keep, layer), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
