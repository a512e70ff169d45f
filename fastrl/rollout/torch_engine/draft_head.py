"""The LM head that drafts: the target's, some of its rows, or the drafter's own.

Leaves out what is drafted from the logits. Shape legend: fastrl/types.py; F tokens of the draft
vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from fastrl.rollout.drafters.eagle import EagleDrafter


class DraftHead:
    """Logits of a drafter's outputs, and which tokens they are of.

    Args:
        drafter: whose outputs.
        lm_head: the target's.
    """

    def __init__(self, drafter: EagleDrafter, lm_head: nn.Module) -> None:
        self._drafter = drafter
        self._lm_head = lm_head
        self._weight_FD: Tensor | None = None
        self._bias_F: Tensor | None = None

    def refresh(self) -> None:
        """Either model's weights have changed."""
        token_map_F = self._drafter.token_map_F
        self._weight_FD = self._drafter.draft_head(self._lm_head.get_parameter("weight")).detach()
        self._bias_F = getattr(self._lm_head, "bias", None)
        if not self._drafter.PREDICTS_HIDDEN:
            self._bias_F = None  # its own head has none
        elif self._bias_F is not None and token_map_F is not None:
            self._bias_F = self._bias_F.detach()[token_map_F]

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, F] of the drafter's outputs [*, D]."""
        if self._weight_FD is None:
            self.refresh()
        assert self._weight_FD is not None, "refresh takes the weights"
        return linear(self._drafter.head_input(hidden), self._weight_FD, self._bias_F)

    def tokens(self, index: Tensor) -> Tensor:
        """The target's token ids of places in the draft vocabulary."""
        token_map_F = self._drafter.token_map_F
        return index if token_map_F is None else token_map_F[index]
