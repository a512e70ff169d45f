"""The LM head that drafts: the target's, some of its rows, or the drafter's own.

Leaves out what is drafted from the logits. Shape legend: fastrl/types.py; F tokens of the draft
vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.torch_engine.served_linear import ServedLinear


class DraftHead:
    """Logits of a drafter's outputs, and which tokens they are of.

    Args:
        drafter: whose outputs.
        lm_head: the target's.
    """

    def __init__(self, drafter: EagleDrafter, lm_head: nn.Module) -> None:
        self._drafter = drafter
        self._lm_head = lm_head
        self._linear: ServedLinear | None = None
        self._source_FD: Tensor | None = None  # what it was made of

    def refresh(self) -> None:
        """Either model's weights have changed."""
        token_map_F = self._drafter.token_map_F
        weight_FD = self._drafter.draft_head(self._lm_head.get_parameter("weight"))
        bias_F = getattr(self._lm_head, "bias", None)
        if not self._drafter.PREDICTS_HIDDEN:
            bias_F = None  # its own head has none
        elif bias_F is not None and token_map_F is not None:
            bias_F = bias_F.detach()[token_map_F]
        self._linear, self._source_FD = ServedLinear(weight_FD, bias_F), weight_FD

    def served(self, weight: Tensor) -> Tensor:
        """A weight of the drafter's, as it is served where it is this head's."""
        if self._linear is not None and weight is self._source_FD:
            return self._linear.weight_OI
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, F] of the drafter's outputs [*, D]."""
        if self._linear is None:
            self.refresh()
        assert self._linear is not None, "refresh takes the weights"
        return self._linear(self._drafter.head_input(hidden))

    def tokens(self, index: Tensor) -> Tensor:
        """The target's token ids of places in the draft vocabulary."""
        token_map_F = self._drafter.token_map_F
        return index if token_map_F is None else token_map_F[index]
