"""REINFORCE learns what is rewarded, in a real Trainer, and refuses what it is not valid for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrl.modules import GRPO, OptimizerSettings, PolicyModule, Reinforce
from fastrl.modules.loading import load_causal_lm
from fastrl.types import RolloutBatch

REWARDED, OTHER = 7, 9


def log_prob_of_rewarded(policy: Any) -> float:
    logits = policy(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    return float(logits.log_softmax(-1)[REWARDED].detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, **kw: Reinforce(folder, **kw),
        lambda folder, **kw: Reinforce(folder, baseline="leave_one_out", **kw),
        lambda folder, **kw: GRPO(folder, **kw),
        lambda folder, **kw: GRPO(folder, num_epochs=2, num_mini_batches=2, kl_coef=0.01, **kw),
    ],
    ids=["reinforce", "leave-one-out", "grpo", "grpo-with-everything"],
)
def test_rewarded_tokens_become_more_likely(
    model_folder: str,
    make_batch: Callable[..., RolloutBatch],
    fit: Callable[..., Any],
    make: Callable[..., PolicyModule],
) -> None:
    rows = [([1, 2, 3], [REWARDED, 5]), ([1, 2, 3], [OTHER, 5])] * 2
    batches = [make_batch(rows, [1, 0, 1, 0], [0, 0, 0, 0], version=i) for i in range(10)]
    module = make(model_folder, optimizer=OptimizerSettings(lr=3e-3, warmup_steps=2))
    fit(module, batches)
    before = log_prob_of_rewarded(load_causal_lm(model_folder))
    assert log_prob_of_rewarded(module.policy) > before + 0.5


@pytest.mark.parametrize("baseline", ["batch_mean", "leave_one_out"])
def test_loss_is_the_token_mean_of_minus_advantage_times_logprob(
    model_folder: str,
    make_batch: Callable[..., RolloutBatch],
    fit: Callable[..., Any],
    baseline: Any,
) -> None:
    rows = [([1, 2], [3, 4]), ([1, 2], [5])]
    logged = fit(Reinforce(model_folder, baseline=baseline), [make_batch(rows, [3, 0], [0, 0])])
    advantages = [1.5, -1.5] if baseline == "batch_mean" else [3.0, -3.0]
    model, total = load_causal_lm(model_folder).requires_grad_(False), 0.0
    for (prompt, response), advantage in zip(rows, advantages, strict=True):
        tokens = [*prompt, *response]
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        for t, token in enumerate(response, start=len(prompt)):
            total -= advantage * float(logprobs[t - 1, token])
    assert logged.logged_metrics["policy/loss"].item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("option", ["num_epochs", "num_mini_batches"])
def test_several_updates_a_batch_are_refused(model_folder: str, option: str) -> None:
    with pytest.raises(ValueError, match=r"set both to 1, or use fastrl\.modules\.GRPO"):
        Reinforce(model_folder, **{option: 2})
