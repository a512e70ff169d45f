"""The EAGLE-3 drafter's forward as the engine serves it; see eagle_forward.py.

`Eagle3Drafter.forward` is the definition; tests hold the two together. Leaves out the joining of
features and the LM head's norm, which are the drafter's own (drafting.py, draft_head.py). Shape
legend: fastrl/types.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine.eagle_forward import LayerForward, normed


class Eagle3Forward(LayerForward):
    """The EAGLE-3 drafter's: its attention reads embedding and hidden state side by side."""

    def refresh(self) -> None:
        """Take the drafter's weights, after they were loaded."""
        super().refresh()
        layer = self._layer()
        hidden_norm = layer.get_submodule("hidden_norm")
        assert isinstance(hidden_norm, LlamaRMSNorm), "the drafter makes it"
        self._embedding_norm, self._hidden_norm = layer.input_layernorm, hidden_norm

    def _layer(self) -> LlamaDecoderLayer:
        assert isinstance(self._drafter, Eagle3Drafter), "of this kind alone"
        return self._drafter.midlayer

    def _read(self, embeddings_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        parts = (
            normed(embeddings_BTD, self._embedding_norm),
            normed(hidden_BTD, self._hidden_norm),
        )
        return torch.cat(parts, dim=-1), hidden_BTD
