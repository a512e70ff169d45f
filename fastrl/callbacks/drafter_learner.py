"""A drafter under training and its AdamW: one optimizer step on one packed row at a time.

The row is co-training's micro-step: idle time ends within one. Leaves out which sequences are drawn
(feature_buffer.py) and when a step is taken (drafter_training.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.rollout.drafters.training import BETAS, loss_values, row_loss, shared_weights
from fastrl.rollout.sharded_weights import whole
from fastrl.types import SequenceFeatures

_MAX_GRAD_NORM = 1.0


class DrafterLearner:
    """A float32 drafter of its own, beside the one that the engine serves.

    Args:
        drafter: to train.
        learning_rate: of AdamW, constant.
        tokens_per_step: pairs of one optimizer step.
        loss: depths and weights.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        learning_rate: float,
        tokens_per_step: int,
        loss: LossSettings,
    ) -> None:
        self.drafter = drafter
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.0
        )
        self._tokens_per_step = tokens_per_step
        self._loss = loss

    def step(
        self, sequences: Sequence[SequenceFeatures], shared: tuple[Tensor, Tensor]
    ) -> list[float]:
        """One optimizer step; values in the order of `LOSS_NAMES`.

        Args:
            sequences: of which a row is packed.
            shared: the policy's embedding and LM head, whole.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; nothing is changed then.
        """
        target_size = self.drafter.config.hidden_size
        packed = fold_segments(pack_sequences(sequences, self._tokens_per_step, target_size))
        result = row_loss(self.drafter, shared, packed, self._loss)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad for n, p in self.drafter.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(list(gradients.values()))
        if not (norm + result.loss.detach()).isfinite():
            culprits = [name for name, grad in gradients.items() if not grad.isfinite().all()]
            raise FloatingPointError(
                f"DrafterTraining, after RL step {max(f.rl_step for f in sequences)}: loss "
                f"{result.loss.item():g}, gradient norm {norm.item():g}, first non-finite gradient "
                f"{culprits[:1] or 'none'}. The drafter is that before this step; lower the "
                f"callback's learning_rate, and resume with --ckpt_path last"
            )
        nn.utils.clip_grads_with_norm_(self.drafter.parameters(), _MAX_GRAD_NORM, norm)
        self.optimizer.step()
        return loss_values(result)

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by name: the live tensors."""
        return {name: weight.detach() for name, weight in self.drafter.named_weights()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, what they read, optimizer."""
        return {
            "drafter": self.weights(),
            **self.drafter.what_it_reads(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.drafter.check_reads_the_same(state)
        self.drafter.load_weights(state["drafter"].items(), source="the resumed checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])


def whole_shared_weights(policy: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The policy's embedding and LM head, [V, D] each, to be read without other ranks.

    Of a policy that is not sharded they are the live weights; of a sharded one copies, which all
    ranks gather together.
    """
    embedding, lm_head = shared_weights(policy)
    whole_embedding = whole(embedding, dtype=embedding.dtype, device=embedding.device)
    if lm_head is embedding:
        return whole_embedding, whole_embedding
    return whole_embedding, whole(lm_head, dtype=lm_head.dtype, device=lm_head.device)
