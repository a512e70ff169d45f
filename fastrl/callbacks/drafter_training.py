"""Co-trains the engine's drafter, EAGLE or EAGLE-3, with the policy, and publishes it there.

After each RL step the hidden states of the policy's own training forward first tell how good the
drafter is on sequences it has not seen, by depth (drafter_evaluation.py); then they go into a
buffer. The drafter takes optimizer steps on rows drawn from it, in the engine's idle time
(`on_idle`) and, for what is left of the step's budget (a number of steps, a share of its time, or
both), at the batch's end. Every few RL steps a copy of its weights goes to the engine, so training
that was not published never changes serving. Embedding and LM head stay the policy's.

Leaves out several ranks (each would train, and publish, a drafter of its own).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrl.callbacks.drafter_evaluation import held_out_metrics
from fastrl.callbacks.feature_buffer import BufferSettings, FeatureBuffer
from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.callbacks.time_budget import SpentTime, TimeBudget
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.rollout.drafters.training import (
    BETAS,
    LOSS_NAMES,
    loss_values,
    row_loss,
    shared_weights,
)
from fastrl.rollout.engine import IdleWindow, RolloutEngine
from fastrl.types import PolicySource, RolloutBatch

_MAX_GRAD_NORM = 1.0


class _RolloutSource(Protocol):
    """What this callback asks of the datamodule."""

    engine: RolloutEngine
    seed: int
    """The run's."""

    def ensure_started(self) -> None:
        """Start the engine if it is not running."""
        ...


class DrafterTraining(Callback):
    """Trains the drafter along with the policy.

    Without `max_step_share` a run is reproducible to the last bit. With it the number of optimizer
    steps depends on timing, and so do the drafter's weights; tokens, losses and the policy do not,
    since drafts decide only how fast a response comes.

    Args:
        learning_rate: of AdamW, constant; a tiny drafter takes 6e-3.
        steps_per_batch: most optimizer steps an RL step; those of idle time count, and may exceed
            it. 0 leaves the drafter frozen, idle time aside; null: only max_step_share limits.
        max_step_share: most of an RL step's wall time that co-training at the batch's end takes,
            in (0, 1); null: only steps_per_batch limits.
        tokens_per_step: pairs of one optimizer step, packed without padding; bounds its memory.
        buffer: how much is kept for training, and what is drawn more often; null: the defaults.
        publish_every_n_steps: RL steps between publications to the engine, of what has been
            trained since the last.
        loss: how many depths of a draft are trained, and the weight of hidden states; null: the
            defaults.
    """

    def __init__(
        self,
        learning_rate: float = 1e-4,
        steps_per_batch: int | None = 16,
        max_step_share: float | None = None,
        tokens_per_step: int = 2048,
        buffer: BufferSettings | None = None,
        publish_every_n_steps: int = 10,
        loss: LossSettings | None = None,
    ) -> None:
        checks = (
            (learning_rate > 0, "learning_rate must be > 0", learning_rate),
            (
                steps_per_batch is None or steps_per_batch >= 0,
                "steps_per_batch must be >= 0, or null",
                steps_per_batch,
            ),
            (tokens_per_step >= 1, "tokens_per_step must be >= 1", tokens_per_step),
            (
                publish_every_n_steps >= 1,
                "publish_every_n_steps must be >= 1",
                publish_every_n_steps,
            ),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"DrafterTraining: {expectation}, got {given}")
        if steps_per_batch is None and max_step_share is None:
            raise ValueError(
                "DrafterTraining: steps_per_batch and max_step_share are both null, so nothing "
                "would end the training of an RL step; set either"
            )
        self.learning_rate = learning_rate
        self.steps_per_batch = steps_per_batch
        self.tokens_per_step = tokens_per_step
        self.publish_every_n_steps = publish_every_n_steps
        self.loss = loss or LossSettings()
        self.buffer = FeatureBuffer(buffer or BufferSettings())
        self.budget = TimeBudget(max_step_share)
        self.version = 0
        """Publications so far; 0 is the checkpoint that the engine loads by itself."""
        self._generator = torch.Generator()  # seeded when a run tells its seed
        self._drafter: EagleDrafter | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._published: dict[str, Tensor] | None = None
        self._losses: list[list[float]] = []
        self._is_published = True
        """Whether the engine has all that was trained."""
        self._idle_seconds = 0.0
        self._restored: dict[str, Any] | None = None

    @property
    def published_weights(self) -> Mapping[str, Tensor] | None:
        """What the engine was last given; None: what it loaded by itself, its checkpoint."""
        return self._published

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that has no drafter, or several ranks."""
        if stage != "fit":
            return
        if _engine(trainer).drafter_path is None:
            raise ValueError(
                "DrafterTraining: the engine's drafter_path is null, so there is no drafter to "
                "train; set drafter_path of the datamodule's engine to a drafter checkpoint "
                "folder, or remove the DrafterTraining callback"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"DrafterTraining trains one drafter in one process, got {trainer.world_size} "
                f"processes; set trainer.devices and trainer.num_nodes to 1, or remove the callback"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the drafter under training: a float32 copy of its own, beside the engine's.

        After an earlier fit, training goes on with what that one ended with.
        """
        if self._restored is None and self._drafter is not None:
            self._restored = self.state_dict()
        policy = cast(PolicySource, pl_module).policy
        shared_weights(policy)
        drafter = load_drafter(cast(str, _engine(trainer).drafter_path), target=policy.config)
        self._drafter = drafter.to(pl_module.device, torch.float32)
        self._optimizer = torch.optim.AdamW(
            self._drafter.parameters(), lr=self.learning_rate, betas=BETAS, weight_decay=0.0
        )
        self._generator.manual_seed(_rollout_source(trainer).seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between checkpoint restore and the first rollout: give the engine its drafter back."""
        source = cast(PolicySource, pl_module)
        self._restore()
        if self._published is not None:
            _rollout_source(trainer).ensure_started()
            _engine(trainer).load_drafter(self._published.items(), self.version)
        source.collect_features = True
        source.feature_layers = self._learner()[0].feature_layers
        _engine(trainer).on_idle = functools.partial(self._train_while_idle, source)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The RL step's time counts from here."""
        self.budget.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of the RL step's time."""
        self.budget.resume()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Evaluate on the step's features, collect them, train within budget, publish when due."""
        source = cast(PolicySource, pl_module)
        self.budget.open()
        features = source.take_features()
        held_out = held_out_metrics(
            self._learner()[0],
            *shared_weights(source.policy),
            features,
            max_pairs=self.tokens_per_step,
            seed=source.rl_step,
        )
        num_refused = self.buffer.add(features)
        while self._may_step():
            self._step(source.policy)
        published: dict[str, float] = {}
        if not self._is_published and source.rl_step % self.publish_every_n_steps == 0:
            published = {"time/publish_drafter": self._publish(_engine(trainer))}
        pl_module.log_dict(
            {
                **self._step_metrics(self.budget.close()),
                "drafter/refused_sequences": float(num_refused),
                "step": float(source.rl_step),
            },
            on_step=True,
            on_epoch=False,
            batch_size=len(batch),
        )
        log_step_scalars(trainer, self._mean_losses() | held_out | published, source.rl_step)
        self._losses, self._idle_seconds = [], 0.0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave neither hook nor feature collection behind."""
        if stage == "fit" and self._drafter is not None:
            _engine(trainer).on_idle = None
            source = cast(PolicySource, pl_module)
            source.collect_features, source.feature_layers = False, ()

    # Training and publication

    def _may_step(self) -> bool:
        """Whether data, number of steps and time allow one more at the batch's end."""
        is_under = self.steps_per_batch is None or len(self._losses) < self.steps_per_batch
        return len(self.buffer) > 0 and is_under and self.budget.has_room()

    def _step(self, policy: PreTrainedModel) -> None:
        """One optimizer step on one packed row: what idle training can be interrupted between."""
        with self.budget.optimizer_step():
            self._losses.append(self._train_on(policy))
        self._is_published = False

    def _train_on(self, policy: PreTrainedModel) -> list[float]:
        """The step itself; values in the order of `LOSS_NAMES`."""
        drafter, optimizer = self._learner()
        sequences = self.buffer.sample(self._generator, self.tokens_per_step)
        target_size = drafter.config.hidden_size
        packed = fold_segments(pack_sequences(sequences, self.tokens_per_step, target_size))
        result = row_loss(drafter, policy, packed, self.loss)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(list(gradients.values()))
        if not (norm + result.loss.detach()).isfinite():
            culprits = [name for name, grad in gradients.items() if not grad.isfinite().all()]
            raise FloatingPointError(
                f"DrafterTraining, after RL step {max(f.rl_step for f in sequences)}: loss "
                f"{result.loss.item():g}, gradient norm {norm.item():g}, first non-finite gradient "
                f"{culprits[:1] or 'none'}. The drafter is that before this step; lower the "
                f"callback's learning_rate, and resume with --ckpt_path last"
            )
        nn.utils.clip_grads_with_norm_(drafter.parameters(), _MAX_GRAD_NORM, norm)
        optimizer.step()
        return loss_values(result)

    def _train_while_idle(self, source: PolicySource, window: IdleWindow) -> None:
        """Train until the window closes; generation may run without gradients, so ask for them."""
        start = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad():
            while len(self.buffer) and not window.should_stop():
                self._step(source.policy)
        self._idle_seconds += time.perf_counter() - start

    def _publish(self, engine: RolloutEngine) -> float:
        """Give the engine a copy that later training does not change; the seconds it took."""
        drafter, _ = self._learner()
        started = time.perf_counter()
        self._published = {name: w.detach().clone() for name, w in drafter.named_weights()}
        self._is_published = True
        self.version += 1
        engine.load_drafter(self._published.items(), self.version)
        return time.perf_counter() - started

    def _mean_losses(self) -> dict[str, float]:
        """Over the RL step's optimizer steps, those done in idle time included; none without."""
        if not self._losses:
            return {}
        columns = zip(*self._losses, strict=True)
        return {
            f"drafter/{name}": sum(column) / len(column)
            for name, column in zip(LOSS_NAMES, columns, strict=True)
        }

    def _step_metrics(self, spent: SpentTime) -> dict[str, float]:
        """What every RL step has."""
        metrics = {
            "drafter/buffer_tokens": float(self.buffer.num_tokens),
            "drafter/num_steps": float(len(self._losses)),
            "drafter/version": float(self.version),
            "drafter/time_share": spent.share,
            "time/drafter": spent.seconds + self._idle_seconds,
        }
        if self.budget.share is not None:
            metrics["drafter/max_time_share"] = self.budget.share
        return metrics

    def _learner(self) -> tuple[EagleDrafter, torch.optim.AdamW]:
        assert self._drafter is not None, "on_fit_start has not run: no drafter is loaded"
        assert self._optimizer is not None, "the optimizer is made along with the drafter"
        return self._drafter, self._optimizer

    # State

    def state_dict(self) -> dict[str, Any]:
        """Drafter, optimizer, buffer, random state, what the engine serves, the step under way."""
        if self._restored is not None:
            return self._restored
        if self._drafter is None:
            return {}
        drafter, optimizer = self._learner()
        return {
            "drafter": {name: weight.detach() for name, weight in drafter.named_weights()},
            **drafter.what_it_reads(),
            "optimizer": optimizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generator": self._generator.get_state(),
            "published": self._published,
            "version": self.version,
            "is_published": self._is_published,
            "budget": self.budget.state_dict(),
            "losses": self._losses,
            "idle_seconds": self._idle_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts: some strategies restore before the drafter exists."""
        self._restored = state_dict or None

    def _restore(self) -> None:
        if (state := self._restored) is None:
            return
        drafter, optimizer = self._learner()
        drafter.check_reads_the_same(state)
        drafter.load_weights(state["drafter"].items(), source="the resumed checkpoint")
        optimizer.load_state_dict(state["optimizer"])
        self.buffer.load_state_dict(state["buffer"])
        self._generator.set_state(state["generator"].cpu())
        self._published, self.version = state["published"], state["version"]
        self._is_published = state["is_published"]
        self.budget.load_state_dict(state["budget"])
        self._losses, self._idle_seconds = list(state["losses"]), state["idle_seconds"]
        self._restored = None


def _rollout_source(trainer: Trainer) -> _RolloutSource:
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        raise ValueError(
            "DrafterTraining needs a datamodule with a rollout engine, got none; pass a "
            "RolloutDataModule to Trainer.fit(datamodule=...)"
        )
    return cast(_RolloutSource, trainer.datamodule)  # type: ignore[attr-defined]


def _engine(trainer: Trainer) -> RolloutEngine:
    return _rollout_source(trainer).engine
