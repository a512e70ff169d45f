"""What layers of the target are given in a forward, for a drafter that reads it.

Leaves out the hidden state after the final norm, which the forward returns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
