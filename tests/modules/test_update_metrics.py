"""Averages over tokens, updates and maxima, by hand."""

import torch

from fastrl.modules.update_metrics import UpdateMetrics


def test_token_means_weigh_tokens_not_micro_batches() -> None:
    metrics = UpdateMetrics()
    mask = torch.tensor([[True, True, True]])
    metrics.add_tokens({"kl": torch.tensor([[1.0, 2.0, 3.0]])}, mask)
    metrics.add_tokens({"kl": torch.tensor([[10.0, float("nan")]])}, torch.tensor([[True, False]]))
    metrics.add_update("loss", torch.tensor(2.0))
    metrics.add_update("loss", torch.tensor(4.0))
    for value in (1.0, 3.0, 2.0):
        metrics.add_max("ratio_max", torch.tensor(value))
    assert metrics.result() == {"kl": (1 + 2 + 3 + 10) / 4, "loss": 3.0, "ratio_max": 3.0}
