"""PolicyModule: one rollout batch in, one RL step of the policy out, whatever the algorithm.

An algorithm is a subclass that says what its advantages are and what a token's loss is (grpo.py,
reinforce.py; docs/new_algorithm.md). Here is what they share: loading, mini-batches and epochs,
token-budgeted micro-batches, KL to a reference and entropy, manual optimization, logging,
validation. Over several ranks all of it, losses and what is logged, is of the rows of all. Leaves
out critics, and how weights are sharded (sharded_loading.py). Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from fastrl.model_files import resolve_model
from fastrl.modules import checkpoint_header
from fastrl.modules.loading import check_model_folder
from fastrl.modules.micro_batches import (
    MiniBatch,
    MiniBatchSize,
    TrainingRows,
    check_trainable,
    common_numbers,
    mini_batch_sizes,
    sizes_over_ranks,
    split_further,
    split_micro_batches,
    split_mini_batches,
    training_rows,
)
from fastrl.modules.objectives import Aggregation, KLEstimator, LossInputs, kl_estimate
from fastrl.modules.optimization import OptimizerSettings, clip_gradients, count_rl_steps
from fastrl.modules.pass_at_k import mean_pass_at_k
from fastrl.modules.policy_forward import policy_forward
from fastrl.modules.ranks import (
    holds_on_all_ranks,
    num_ranks,
    on_all_ranks,
    over_ranks,
    rows_of_all_ranks,
)
from fastrl.modules.sharded_loading import data_parallel_mesh, load_policy
from fastrl.modules.sharding import (
    check_is_sharded,
    check_strategy,
    gradients_stay_here,
    is_offloaded,
    is_sharded,
    reshard,
)
from fastrl.modules.sharding_settings import ShardingSettings
from fastrl.modules.update_metrics import UpdateMetrics
from fastrl.types import RolloutBatch, SamplingParams, SequenceFeatures, Span

PASS_REWARD = 1 - 1e-6
"""A response passes (pass@k) if its reward is at least this: full marks, up to rounding."""


# Not frozen: Lightning moves predictions to the CPU, and refuses to go through a frozen record.
@dataclass(kw_only=True, slots=True)
class ScoredResponse:
    """What `fastrl predict` returns for each rollout."""

    prompt: str
    response: str
    reward: float


class PolicyModule(LightningModule, ABC):
    """Trains a causal LM on rollouts of itself.

    Args:
        model_path: Hugging Face folder of the model to train (and of the KL reference); or a
            `.gguf` file, or `package:NAME` for the GGUF file in a Python package.
        optimizer: AdamW, its learning rate over RL steps, gradient clipping.
        num_epochs: Passes over each rollout batch.
        num_mini_batches: Optimizer steps per pass; each takes its share of the rows.
        micro_batch_tokens: Most tokens of a forward, padding included; a matter of memory and speed
            alone.
        aggregation: Mean of token losses over all tokens (token-mean), over each response and then
            over responses (sequence-mean), or their sum over responses * sampling.max_tokens
            (constant, Dr.GRPO).
        kl_coef: Weight of the KL divergence to the initial model in the loss; 0 loads no reference.
        kl_estimator: Of that KL: k3 is unbiased and never negative, k2 has an unbiased gradient,
            k1 is unbiased and takes k2's gradient.
        entropy_coef: Weight of the entropy bonus in the loss.
        sharding: How the policy is spread over the ranks of ModelParallelStrategy (FSDP2), and what
            is recomputed in its backward; null: the defaults.
    """

    policy: PreTrainedModel
    """The model under training, loaded in `configure_model`."""
    min_group_size: ClassVar[int] = 1
    """Fewest responses to a prompt that the algorithm's baseline needs."""

    _own_scheduler: LambdaLR | None = None
    """None where a subclass makes its own."""
    _spans: tuple[Span, ...] = ()
    """The last update, until it is taken."""

    def __init__(
        self,
        model_path: str,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (frozen)
        num_epochs: int = 1,
        num_mini_batches: int = 1,
        micro_batch_tokens: int = 4096,
        aggregation: Aggregation = "token-mean",
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: float = 0.0,
        sharding: ShardingSettings | None = None,
    ) -> None:
        super().__init__()
        self.model_path = resolve_model(model_path)
        check_model_folder(self.model_path)
        for name, value in (
            ("num_epochs", num_epochs),
            ("num_mini_batches", num_mini_batches),
            ("micro_batch_tokens", micro_batch_tokens),
        ):
            if value < 1:
                raise ValueError(f"model.{name} must be >= 1, got {value}")
        if kl_coef < 0:
            raise ValueError(f"model.kl_coef must be >= 0 (0: no reference), got {kl_coef}")
        self.optimizer_settings = optimizer
        self.num_epochs = num_epochs
        self.num_mini_batches = num_mini_batches
        self.micro_batch_tokens = micro_batch_tokens
        self.aggregation: Aggregation = aggregation
        self.kl_coef = kl_coef
        self.kl_estimator: KLEstimator = kl_estimator
        self.entropy_coef = entropy_coef
        self.sharding = sharding or ShardingSettings()

        self.automatic_optimization = False
        self.rl_step = 0
        self.policy_version = 0
        self.is_updating = False
        self.collect_features = False
        self.feature_layers: tuple[int, ...] = ()
        self._features: dict[int, SequenceFeatures] = {}
        self._is_configured = False
        # In a tuple, so that it is no submodule: it never changes, and stays out of checkpoints.
        self._reference: tuple[PreTrainedModel, ...] = ()

    # ---- what an algorithm says ------------------------------------------------------------------

    @abstractmethod
    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Advantage of each row, [B], or of each token, [B, T]; over the whole rollout batch."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of each token, [B, T], KL and entropy aside; [B, T] values to log as token means."""

    # ---- model -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the policy and, where KL wants one, the reference; this rank's shards of them, under
        ModelParallelStrategy."""
        if self._is_configured:
            return
        mesh = data_parallel_mesh(self.device_mesh)
        precision = None if mesh is None else str(self.trainer.precision)
        self.policy = load_policy(self.model_path, mesh, self.sharding, precision)
        if self.kl_coef > 0:
            self._reference = (
                load_policy(self.model_path, mesh, self.sharding, precision, is_frozen=True),
            )
        self._is_configured = True

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move what is not offloaded: Lightning would take offloaded shards to the GPU."""
        modules = dict(self._modules)
        for name, module in modules.items():
            if module is not None and is_offloaded(module):
                del self._modules[name]
        try:
            return super().to(*args, **kwargs)
        finally:
            self._modules.update(modules)

    def on_fit_start(self) -> None:
        """Check how weights are sharded and rounded; bring the reference to the policy's device."""
        check_strategy(self.trainer.strategy)
        check_is_sharded(self.trainer.strategy, self.policy)
        rounded = [n for n, p in self.policy.named_parameters() if p.dtype != torch.float32]
        if rounded:
            raise ValueError(
                f"the policy's weights must be float32, {rounded[0]} is not: small updates would "
                f"round away; use trainer.precision 32-true or bf16-mixed"
            )
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision 16-mixed scales the loss, and gradients would be clipped while "
                "scaled; use bf16-mixed or 32-true"
            )
        for reference in self._reference:
            if not is_sharded(reference):
                cast(nn.Module, reference).to(self.device)

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Named weights, the live parameters, sharded ones as they are (the engine gathers them);
        tied ones once, under their first name."""
        reshard(self.policy)  # somebody may have had it answer to a prompt
        yield from self.policy.named_parameters()

    def take_features(self) -> list[SequenceFeatures]:
        """Features of the last batch, in its rows' order; they are handed over once."""
        features, self._features = self._features, {}
        return [features[row] for row in sorted(features)]

    def take_spans(self) -> tuple[Span, ...]:
        """The last update; it is handed over once."""
        spans, self._spans = self._spans, ()
        return spans

    def configure_optimizers(self) -> Any:
        """AdamW and a scheduler that counts RL steps."""
        num_rl_steps = float("inf")
        if self.optimizer_settings.schedule != "constant":
            num_rl_steps = count_rl_steps(self.trainer, self.updates_per_step)
        optimizer, scheduler = self.optimizer_settings.build(self.policy.parameters(), num_rl_steps)
        self._own_scheduler = scheduler
        return [optimizer], [scheduler]

    def on_train_start(self) -> None:
        """A resumed run goes on under its own learning rate, weight decay and schedule."""
        if self._own_scheduler is not None:
            self.optimizer_settings.apply_to(self._own_scheduler)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps an RL step."""
        return self.num_epochs * self.num_mini_batches

    # ---- the RL step -----------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """One RL step: every epoch and mini-batch of a rollout batch."""
        started_s = time.perf_counter()
        lengths = batch.attention_mask_BT.sum(1).tolist()
        mini_batches, sizes = self._split(batch, lengths)
        self._features = {}
        rows = self._prepare(batch, lengths, mini_batches, sizes)
        metrics = UpdateMetrics()
        self.is_updating = True
        for epoch in range(self.num_epochs):
            for mini_batch in mini_batches:
                self._update(rows, mini_batch, batch.sampling, metrics, is_first_epoch=epoch == 0)
        scheduler = cast(LRScheduler, self.lr_schedulers())
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        self.rl_step += 1
        self.policy_version += 1
        self.is_updating = False
        values = {**metrics.result(), "lr": lr}
        seconds = time.perf_counter() - started_s
        self._spans = (Span(name="update", start_s=started_s, seconds=seconds),)
        self._log_step(batch, values, seconds)

    def _split(
        self, batch: RolloutBatch, lengths: Sequence[int]
    ) -> tuple[list[MiniBatch], list[MiniBatchSize]]:
        """This rank's mini-batches, and the sizes that they have with those of the other ranks.

        All ranks get the same error. Of a sharded policy they get as many micro-batches.
        """

        def own_split() -> tuple[list[MiniBatch], list[MiniBatchSize]]:
            check_trainable(batch, self.policy_version)
            mini_batches = [
                split_micro_batches(rows, lengths, self.micro_batch_tokens)
                for rows in split_mini_batches(len(batch), self.num_mini_batches)
            ]
            return mini_batches, mini_batch_sizes(batch.response_mask_BT, mini_batches)

        (own, _), of_ranks = on_all_ranks(own_split)
        sizes = sizes_over_ranks([sizes for _, sizes in of_ranks])
        if not is_sharded(self.policy):
            return own, sizes
        numbers = common_numbers([mini_batches for mini_batches, _ in of_ranks])
        return [
            split_further(micro_batches, number)
            for micro_batches, number in zip(own, numbers, strict=True)
        ], sizes

    def _prepare(
        self,
        batch: RolloutBatch,
        lengths: Sequence[int],
        mini_batches: Sequence[MiniBatch],
        sizes: Sequence[MiniBatchSize],
    ) -> TrainingRows:
        """Everything about the batch that the updates will not change."""
        advantages = self.advantages(batch)
        if not holds_on_all_ranks(advantages.isfinite().all()):
            raise FloatingPointError(
                f"RL step {self.rl_step}: advantages are not finite; rewards range from "
                f"{batch.rewards_B.min():g} to {batch.rewards_B.max():g}. Check the reward function"
            )
        rows = training_rows(batch, lengths, mini_batches, sizes, advantages, self.aggregation)
        micro_batches = [micro for mini_batch in mini_batches for micro in mini_batch]
        old = reference = None
        if self.updates_per_step > 1:
            old = self._frozen_logprobs(self.policy, rows, micro_batches, batch.sampling)
        if self._reference:
            reference = self._frozen_logprobs(
                self._reference[0], rows, micro_batches, batch.sampling
            )
        return replace(rows, old_logprobs_BT=old, reference_logprobs_BT=reference)

    @torch.no_grad()
    def _frozen_logprobs(
        self,
        model: PreTrainedModel,
        rows: TrainingRows,
        micro_batches: Sequence[list[int]],
        sampling: SamplingParams,
    ) -> Tensor:
        """Log-probabilities of all rows' tokens, [B, T], by the forwards that training will do."""
        logprobs_BT = torch.zeros_like(rows.weights_BT)
        for members in micro_batches:
            micro = rows.take(members)
            logprobs, _, _ = policy_forward(model, micro, sampling)
            logprobs_BT[members, : logprobs.shape[1]] = logprobs
        return logprobs_BT

    def _update(
        self,
        rows: TrainingRows,
        mini_batch: MiniBatch,
        sampling: SamplingParams,
        metrics: UpdateMetrics,
        *,
        is_first_epoch: bool,
    ) -> None:
        """One optimizer step: forward and backward of each micro-batch, then clip and step."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        total_loss = torch.zeros((), device=rows.weights_BT.device)
        for place, members in enumerate(mini_batch, start=1):
            micro = rows.take(members)
            keeps_features = self.collect_features and is_first_epoch
            logprobs_BT, entropy_BT, states_BTS = policy_forward(
                self.policy,
                micro,
                sampling,
                has_entropy_gradient=self.entropy_coef != 0,
                read_layers=self.feature_layers if keeps_features else (),
            )
            loss = self._micro_loss(micro, logprobs_BT, entropy_BT, metrics)
            self._backward(loss, is_last=place == len(mini_batch))
            total_loss += loss.detach()
            if keeps_features:
                self._store_features(members, micro, states_BTS.detach())
        grad_norm = clip_gradients(
            self.policy,
            self.optimizer_settings.max_grad_norm,
            loss=total_loss,
            rl_step=self.rl_step,
        )
        optimizer.step()
        metrics.add_update("loss", over_ranks(total_loss, "sum"))
        metrics.add_update("grad_norm", grad_norm.to(total_loss.device))

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Gradients of the sum of all ranks' losses, of which DDP and FSDP2 take the mean."""
        strategy = self.trainer.strategy
        with nullcontext() if is_last else gradients_stay_here(strategy):
            self.manual_backward(loss * num_ranks())

    def _micro_loss(
        self,
        micro: TrainingRows,
        logprobs_BT: Tensor,
        entropy_BT: Tensor,
        metrics: UpdateMetrics,
    ) -> Tensor:
        """This micro-batch's share of the loss of the mini-batch of all ranks; scalar."""
        current_BT = logprobs_BT.detach()
        old_BT = current_BT if micro.old_logprobs_BT is None else micro.old_logprobs_BT
        loss_BT, values = self.loss(
            LossInputs(
                policy_logprobs_BT=logprobs_BT,
                old_logprobs_BT=old_BT,
                advantages_BT=micro.advantages_BT,
                response_mask_BT=micro.response_mask_BT,
            )
        )
        gap_BT = (old_BT - micro.rollout_logprobs_BT).abs()
        values = {**values, "entropy": entropy_BT, "logprob_gap": gap_BT}
        if micro.reference_logprobs_BT is not None:
            kl_BT = kl_estimate(logprobs_BT, micro.reference_logprobs_BT, self.kl_estimator)
            loss_BT = loss_BT + self.kl_coef * kl_BT
            values["kl"] = kl_BT
        if self.entropy_coef != 0:
            loss_BT = loss_BT - self.entropy_coef * entropy_BT
        metrics.add_tokens(values, micro.response_mask_BT)
        log_ratio_BT = torch.where(micro.response_mask_BT, current_BT - old_BT, -math.inf)
        metrics.add_max("ratio_max", log_ratio_BT.max().exp())
        return (micro.weights_BT * loss_BT).sum()

    def _store_features(
        self, members: Sequence[int], micro: TrainingRows, states_BTS: Tensor
    ) -> None:
        num_prompt_tokens = micro.response_mask_BT.int().argmax(1).tolist()
        for place, row in enumerate(members):
            length = micro.lengths[place]
            self._features[row] = SequenceFeatures(
                tokens_T=micro.tokens_BT[place, :length].clone(),
                hidden_TD=states_BTS[place, :length].clone(),
                num_prompt_tokens=num_prompt_tokens[place],
                rl_step=self.rl_step,
            )

    def _log_step(
        self, batch: RolloutBatch, values: Mapping[str, float | Tensor], seconds: float
    ) -> None:
        rewards_B = rows_of_all_ranks(batch.rewards_B.float())
        self.log_dict(
            {
                "step": float(self.rl_step),
                "reward/mean": rewards_B.mean(),
                "reward/std": rewards_B.std(correction=0),
                **{f"policy/{name}": value for name, value in values.items()},
                "time/update": seconds,
            },
            on_step=True,
            on_epoch=False,
            batch_size=len(batch),
        )

    # ---- evaluation ------------------------------------------------------------------------------

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Mean reward and pass@k on held-out prompts."""
        self._log_rewards(batch, "reward/held_out", "reward/pass@")

    def test_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Mean reward and pass@k on test prompts."""
        self._log_rewards(batch, "reward/test", "reward/test_pass@")

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> list[ScoredResponse]:
        """Responses and their rewards, in the batch's order."""
        return [
            ScoredResponse(prompt=rollout.prompt.text, response=rollout.text, reward=reward)
            for rollout, reward in zip(batch.rollouts, batch.rewards_B.tolist(), strict=True)
        ]

    def _log_rewards(self, batch: RolloutBatch, mean_name: str, pass_prefix: str) -> None:
        """Means over all rows of the evaluation, and over its prompts, whatever its batches."""
        self.log_dict(
            {
                "step": float(self.rl_step),
                mean_name: batch.rewards_B.float().mean(),
            },
            on_step=False,
            on_epoch=True,
            batch_size=len(batch),
            sync_dist=True,
        )
        passes = mean_pass_at_k(batch.rewards_B >= PASS_REWARD, batch.group_B)
        self.log_dict(
            {f"{pass_prefix}{k}": value for k, value in passes.items()},
            on_step=False,
            on_epoch=True,
            batch_size=int(batch.group_B.max()) + 1,
            sync_dist=True,
        )

    # ---- checkpoint ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counters beside the weights, and what they are the weights of."""
        checkpoint[checkpoint_header.KEY] = checkpoint_header.make_header(
            type(self), self.policy.config
        )
        checkpoint["rl_step"] = self.rl_step
        checkpoint["policy_version"] = self.policy_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another run's checkpoint, before its weights are loaded; restore the counters."""
        is_resume = self.trainer.state.fn == TrainerFn.FITTING
        checkpoint_header.check_header(
            checkpoint, type(self), self.policy.config, is_resume=is_resume
        )
        self.rl_step = checkpoint["rl_step"]
        self.policy_version = checkpoint["policy_version"]
