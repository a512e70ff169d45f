"""A drafter's own forward over the engine's cache, for kinds that have no faster one.

Leaves out the EAGLE drafter, whose operations are fused (eagle_forward.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fastrl.rollout.attention import KVView
from fastrl.rollout.drafters.eagle import EagleDrafter


class ModuleForward:
    """Serves a drafter's weights as they are.

    Args:
        drafter: on its device, in its dtype.
        embedding: the target's.
    """

    def __init__(self, drafter: EagleDrafter, embedding: nn.Module) -> None:
        self._drafter = drafter
        self._embedding = embedding

    def refresh(self) -> None:
        """Nothing is copied."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What it computes with, by the drafter's names."""
        yield from self._drafter.named_weights()

    def __call__(
        self,
        tokens_BT: Tensor,
        hidden_BTD: Tensor,
        positions_BT: Tensor,
        view: KVView,
        longest_position: int,
    ) -> Tensor:
        """As `EagleForward`."""
        output_BTD: Tensor = self._drafter(
            self._embedding(tokens_BT),
            hidden_BTD,
            positions_BT.expand(tokens_BT.shape),
            kv_view=view,
        )
        return output_BTD
