"""Whole GRPO steps against a naive loop: one token at a time, float64, no padding, no batching."""

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.modules import GRPO, OptimizerSettings
from fastrl.modules.loading import load_causal_lm
from fastrl.rollout.sampling import log_distribution
from fastrl.types import RolloutBatch, SamplingParams

Fit = Callable[..., Any]
RaggedBatch = Callable[..., RolloutBatch]

NO_CLIPPING = OptimizerSettings(lr=0.02, max_grad_norm=1e9)


class NaiveGRPO:
    """GRPO by the book, on the rows' own tokens."""

    def __init__(self, model_folder: str, batch: RolloutBatch, **options: Any) -> None:
        self.options = {"aggregation": "token-mean", "normalize_std": True, "kl_coef": 0.0}
        self.options |= {"kl_estimator": "k3", "entropy_coef": 0.0, "clip_high": 0.2} | options
        self.batch = batch
        self.policy = load_causal_lm(model_folder).double()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.02, weight_decay=0.0)
        self.initial = copy.deepcopy(self.policy)
        self.old = [self.logprobs(self.policy, row)[0].detach() for row in range(len(batch))]

    def logprobs(self, model: Any, row: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a row's response tokens, and entropies."""
        tokens = self.batch.tokens_BT[row][self.batch.attention_mask_BT[row]]
        mask = self.batch.response_mask_BT[row][: len(tokens)]
        logits = model(input_ids=tokens[None]).logits[0]
        values, entropies = [], []
        for t in range(len(tokens)):
            if mask[t]:
                distribution = logits[t - 1] / self.batch.sampling.temperature
                distribution = distribution - distribution.exp().sum().log()
                values.append(distribution[tokens[t]])
                entropies.append(-(distribution.exp() * distribution).sum())
        return torch.stack(values), torch.stack(entropies)

    def advantage(self, row: int) -> float:
        rewards = self.batch.rewards_B.tolist()
        groups = self.batch.group_B.tolist()
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == groups[row]]
        centered = rewards[row] - statistics.fmean(peers)
        return centered / statistics.stdev(peers) if self.options["normalize_std"] else centered

    def row_losses(self, row: int) -> list[Tensor]:
        policy, entropy = self.logprobs(self.policy, row)
        reference = self.logprobs(self.initial, row)[0].detach()
        losses = []
        for t in range(len(policy)):
            ratio = (policy[t] - self.old[row][t]).exp()
            clipped = ratio.clamp(1 - 0.2, 1 + self.options["clip_high"])
            loss = -min(ratio * self.advantage(row), clipped * self.advantage(row))
            log_r = reference[t] - policy[t]
            kl = log_r**2 / 2 if self.options["kl_estimator"] == "k2" else log_r.exp() - 1 - log_r
            loss = loss + self.options["kl_coef"] * kl - self.options["entropy_coef"] * entropy[t]
            losses.append(loss)
        return losses

    def loss(self, rows: range) -> Tensor:
        by_row = [self.row_losses(row) for row in rows]
        total = torch.stack([loss for losses in by_row for loss in losses]).sum()
        if self.options["aggregation"] == "token-mean":
            return total / sum(map(len, by_row))
        if self.options["aggregation"] == "sequence-mean":
            return sum((torch.stack(x).mean() for x in by_row), torch.tensor(0.0)) / len(rows)
        return total / (len(rows) * self.batch.sampling.max_tokens)

    def step(self, rows: range) -> float:
        """One optimizer step; returns the gradients' norm."""
        self.optimizer.zero_grad()
        self.loss(rows).backward()
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        self.optimizer.step()
        return math.sqrt(sum(float(g.square().sum()) for g in gradients))

    def gradients(self, rows: range) -> dict[str, Tensor]:
        self.loss(rows).backward()
        return {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}


class RecordingGRPO(GRPO):
    """Keeps the gradients of the last optimizer step."""

    def on_before_optimizer_step(self, optimizer: object) -> None:
        self.gradients = {
            name: p.grad.clone() for name, p in self.policy.named_parameters() if p.grad is not None
        }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregation": "sequence-mean", "entropy_coef": 0.05},
        {"aggregation": "constant", "normalize_std": False},
    ],
    ids=["grpo", "sequence-mean-and-entropy", "dr-grpo"],
)
def test_first_update_has_the_naive_gradients(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, options: dict[str, Any]
) -> None:
    batch = ragged_batch(sampling=SamplingParams(temperature=0.7, max_tokens=9))
    module = RecordingGRPO(model_folder, optimizer=NO_CLIPPING, **options)
    fit(module, [batch])
    naive = NaiveGRPO(model_folder, batch, **options).gradients(range(6))
    assert module.gradients.keys() == naive.keys()
    for name, gradient in module.gradients.items():
        expected = naive[name].float()
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
def test_epochs_and_mini_batches_are_ppo_with_the_batch_start_as_old_policy(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, kl_estimator: Any
) -> None:
    batch = ragged_batch()
    options = {"kl_coef": 0.3, "kl_estimator": kl_estimator, "aggregation": "sequence-mean"}
    options["clip_high"] = 0.02
    module = GRPO(model_folder, optimizer=NO_CLIPPING, num_epochs=2, num_mini_batches=2, **options)
    logged = fit(module, [batch]).logged_metrics
    naive = NaiveGRPO(model_folder, batch, **options)
    norms = [naive.step(rows) for _ in range(2) for rows in (range(3), range(3, 6))]
    for (name, parameter), expected in zip(
        module.policy.named_parameters(), naive.policy.parameters(), strict=True
    ):
        assert torch.allclose(parameter, expected.float(), atol=2e-4), name
    assert logged["policy/grad_norm"] == pytest.approx(statistics.fmean(norms), rel=1e-3)
    assert logged["policy/ratio_max"] > 1.2
    assert 0 < logged["policy/clip_fraction"] < 1
    assert logged["policy/kl"] > 0


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "constant"])
def test_micro_batches_change_neither_loss_nor_gradients(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, aggregation: Any
) -> None:
    results = []
    for micro_batch_tokens in (10_000, 17, 1):
        module = RecordingGRPO(
            model_folder,
            optimizer=NO_CLIPPING,
            micro_batch_tokens=micro_batch_tokens,
            aggregation=aggregation,
            kl_coef=0.1,
            entropy_coef=0.01,
        )
        trainer = fit(module, [ragged_batch(0)])
        results.append((trainer.logged_metrics, module.gradients))
    (metrics, gradients), *others = results
    for other_metrics, other_gradients in others:
        for name in ("loss", "grad_norm", "entropy", "kl", "clip_fraction", "logprob_gap"):
            given, expected = other_metrics[f"policy/{name}"], metrics[f"policy/{name}"]
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_with_one_update_the_rollout_logprobs_are_compared_but_never_trained_on(
    model_folder: str, make_batch: Callable[..., RolloutBatch], fit: Fit
) -> None:
    rows = [([1, 2], [3, 4, 5]), ([1, 2], [6])]
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    exact = log_distribution(
        load_causal_lm(model_folder)(input_ids=tokens).logits, SamplingParams()
    )
    logprobs = [exact[0, t - 1, tokens[0, t]].item() for t in (2, 3, 4)]
    weights, gaps = [], []
    for shift in (0.0, 0.25):
        given = [[x - shift for x in logprobs], [-2.0]]
        module = GRPO(model_folder, optimizer=NO_CLIPPING)
        logged = fit(module, [make_batch(rows, [1, 0], [0, 0], rollout_logprobs=given)])
        weights.append(torch.cat([p.detach().flatten() for p in module.policy.parameters()]))
        gaps.append(float(logged.logged_metrics["policy/logprob_gap"]))
        assert logged.logged_metrics["policy/ratio_max"] == 1
    assert torch.equal(*weights)
    assert gaps[1] - gaps[0] == pytest.approx(0.25 * 3 / 4, abs=1e-5)


def test_kl_is_to_the_initial_model_at_every_rl_step(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    # With one update a step, the first step's policy is the reference itself.
    for num_steps, is_moved in ((1, False), (2, True)):
        module = GRPO(model_folder, optimizer=NO_CLIPPING, kl_coef=0.1)
        logged = fit(module, [ragged_batch(version) for version in range(num_steps)])
        assert (logged.logged_metrics["policy/kl"] > 1e-3) == is_moved


def test_group_size_one_is_an_error_with_its_cure(
    model_folder: str, make_batch: Callable[..., RolloutBatch], fit: Fit
) -> None:
    batch = make_batch([([1], [2, 3]), ([4], [5])], [1.0, 0.0], [0, 1])
    with pytest.raises(ValueError, match=r"set data\.group_size, or use .*modules\.Reinforce"):
        fit(GRPO(model_folder), [batch])


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.5, 0.2), (0.2, 0.0)])
def test_bad_clip_bounds_are_an_error(model_folder: str, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"model\.clip_low must be in \(0, 1\]"):
        GRPO(model_folder, clip_low=low, clip_high=high)
