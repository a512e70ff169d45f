"""The training forward: log-probabilities, entropies and hidden states of a micro-batch.

Leaves out what is done with them (base.py), and the LM head's mathematics (logprobs.py). Shape
legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.modules.logprobs import response_logprobs
from fastrl.modules.micro_batches import TrainingRows
from fastrl.modules.sharding import as_forward
from fastrl.rollout.drafters.states import inputs_of_layers
from fastrl.types import SamplingParams


def policy_forward(
    model: PreTrainedModel,
    micro: TrainingRows,
    sampling: SamplingParams,
    *,
    has_entropy_gradient: bool = False,
    read_layers: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of response tokens, [B, T], and hidden states, [B, T, D],
    side by side with the inputs of the layers that are read.

    No attention mask: rows are padded on the right, where causal attention never looks.
    """

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        with inputs_of_layers(model.base_model, read_layers) as inputs:
            output = model.base_model(input_ids=micro.tokens_BT, use_cache=False)
        hidden_BTD = states_BTS = output.last_hidden_state
        if read_layers:
            parts = (hidden_BTD, *(inputs[layer] for layer in read_layers))
            states_BTS = torch.cat([part.detach() for part in parts], dim=-1)
        logprobs_BT, entropy_BT = response_logprobs(
            hidden_BTD,
            micro.tokens_BT,
            micro.response_mask_BT,
            model.get_output_embeddings(),  # type: ignore[no-untyped-call]
            sampling,
            vocab_size=model.config.vocab_size,
            has_entropy_gradient=has_entropy_gradient,
        )
        return logprobs_BT, entropy_BT, states_BTS

    return as_forward(model, forward)
