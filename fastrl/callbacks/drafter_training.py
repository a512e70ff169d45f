"""Co-trains the engine's drafter, EAGLE or EAGLE-3, with the policy, and publishes it there.

After each RL step the hidden states of the policy's own training forward first tell how good the
drafter is on sequences it has not seen, by depth (drafter_evaluation.py); then they go into a
buffer. The drafter takes optimizer steps on rows drawn from it: in the time that a rank waits for
the others' rollouts (`on_idle`) and, for what is left of the step's budget (a number of steps, a
share of its time, or both), at the batch's end. Every few RL steps a copy of its weights goes to
the engine, so training that was not published never changes serving. Embedding and LM head stay the
policy's.

Each rank trains a drafter of its own on its own responses, without a word to the others; before a
publication they are averaged, so that all publish the same one (drafter_ranks.py). Leaves out
training while this rank still generates.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fastrl.callbacks.drafter_evaluation import held_out_metrics
from fastrl.callbacks.drafter_learner import DrafterLearner, whole_shared_weights
from fastrl.callbacks.drafter_ranks import IdleWork, idle_metrics, seed_of_rank
from fastrl.callbacks.feature_buffer import BufferSettings, FeatureBuffer
from fastrl.callbacks.rank_files import RankFiles, state_in_common
from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.callbacks.time_budget import SpentTime, TimeBudget
from fastrl.rollout.drafters.averaging import average_over_ranks
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.drafters.training import LOSS_NAMES, shared_weights
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.rank_board import IdleHook, IdleTime, IdleWindow
from fastrl.types import PolicySource, RolloutBatch, Span

When = Literal["idle", "batch_end"]

_SLEEP_S = 0.01  # while too few ranks are idle
_MOST_SPANS = 10_000  # of a run that nobody shows them of


class _RolloutSource(Protocol):
    """What this callback asks of the datamodule."""

    engine: RolloutEngine
    on_idle: IdleHook | None
    """Given the time in which this rank has finished its rollouts and others have not."""
    idle_time: IdleTime | None
    """Of the last training batch's rollouts."""
    seed: int
    """The run's."""

    def ensure_started(self) -> None:
        """Start the engine if it is not running."""
        ...


class DrafterTraining(Callback):
    """Trains the drafter along with the policy.

    On one rank and without `max_step_share` a run is reproducible to the last bit. With it, or with
    idle time, the number of optimizer steps depends on timing, and so do the drafter's weights;
    tokens, losses and the policy do not, since drafts decide only how fast a response comes.

    Args:
        learning_rate: of AdamW, constant; a tiny drafter takes 6e-3.
        steps_per_batch: most optimizer steps that a rank takes an RL step; those of idle time
            count, and may exceed it. 0 leaves the drafter frozen, idle time aside; null: only
            max_step_share limits.
        max_step_share: most of an RL step's wall time that co-training at the batch's end takes,
            in (0, 1); null: only steps_per_batch limits.
        tokens_per_step: pairs of one optimizer step, packed without padding; bounds its memory.
        buffer: how much is kept for training, and what is drawn more often; null: the defaults.
        publish_every_n_steps: RL steps between publications to the engine, of what any rank has
            trained since the last; the ranks' drafters are averaged before, weighted by the
            optimizer steps that each took.
        loss: how many depths of a draft are trained, and the weight of hidden states; null: the
            defaults.
        when: when it trains: `idle`, while this rank has finished its rollouts and others have not;
            `batch_end`, after the RL step's update, within the budget.
        min_idle_ranks: ranks that have finished before those start to train in idle time.
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
        when: Sequence[When] = ("idle", "batch_end"),
        min_idle_ranks: int = 1,
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
            (
                len(when) > 0 and set(when) <= set(get_args(When)),
                f"when must be one or more of {', '.join(get_args(When))}",
                list(when),
            ),
            (min_idle_ranks >= 1, "min_idle_ranks must be >= 1", min_idle_ranks),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"DrafterTraining: {expectation}, got {given}")
        if "batch_end" in when and steps_per_batch is None and max_step_share is None:
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
        self.when = tuple(when)
        self.min_idle_ranks = min_idle_ranks
        self._trained: DrafterLearner | None = None
        self._shared: tuple[Tensor, Tensor] | None = None  # the policy's, whole
        self._published: dict[str, Tensor] | None = None
        self._losses: list[list[float]] = []
        self._unpublished_steps = 0
        """Optimizer steps that this rank took since the last publication."""
        self._idle_work = IdleWork()
        self._spans = deque[Span](maxlen=_MOST_SPANS)
        self._restored: dict[str, Any] | None = None
        self._restored_own: dict[str, Any] | None = None  # of a rank other than 0
        self._restored_ranks: int | None = None  # that a checkpoint is of
        self._files: RankFiles | None = None

    @property
    def published_weights(self) -> Mapping[str, Tensor] | None:
        """What the engine was last given; None: what it loaded by itself, its checkpoint."""
        return self._published

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that has no drafter, or fewer ranks than have to be idle."""
        self._files = RankFiles(trainer)
        if stage != "fit":
            return
        if _engine(trainer).drafter_path is None:
            raise ValueError(
                "DrafterTraining: the engine's drafter_path is null, so there is no drafter to "
                "train; set drafter_path of the datamodule's engine to a drafter checkpoint "
                "folder, or remove the DrafterTraining callback"
            )
        if "idle" in self.when and self.min_idle_ranks > max(trainer.world_size - 1, 1):
            raise ValueError(
                f"DrafterTraining: min_idle_ranks {self.min_idle_ranks} of {trainer.world_size} "
                f"ranks are never idle while another generates; lower it, or leave 'idle' out of "
                f"`when`"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the drafter under training: a float32 copy of its own, beside the engine's.

        After an earlier fit, training goes on with what that one ended with.
        """
        if self._restored is None and self._trained is not None:
            self._restored = self.state_dict()
        policy = cast(PolicySource, pl_module).policy
        shared_weights(policy)
        drafter = load_drafter(cast(str, _engine(trainer).drafter_path), target=policy.config)
        self._trained = DrafterLearner(
            drafter.to(pl_module.device, torch.float32),
            self.learning_rate,
            self.tokens_per_step,
            self.loss,
        )
        run_seed = _rollout_source(trainer).seed
        self._generator.manual_seed(seed_of_rank(run_seed, trainer.global_rank))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between checkpoint restore and the first rollout: give the engine its drafter back."""
        source = cast(PolicySource, pl_module)
        self._restore(trainer)
        self._shared = whole_shared_weights(source.policy)
        if self._published is not None:
            _rollout_source(trainer).ensure_started()
            _engine(trainer).load_drafter(self._published.items(), self.version)
        source.collect_features = True
        source.feature_layers = self._learner().drafter.feature_layers
        if "idle" in self.when:
            _rollout_source(trainer).on_idle = self._train_while_idle
        self.budget.resume()  # an epoch that is gone on with has no start

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
        idle = idle_metrics(self._idle_work, _rollout_source(trainer).idle_time, pl_module.device)
        self._shared = whole_shared_weights(source.policy)
        features = source.take_features()
        held_out = held_out_metrics(
            self._learner().drafter,
            *self._shared,
            features,
            max_pairs=self.tokens_per_step,
            seed=source.rl_step,
        )
        num_refused = self.buffer.add(features)
        while self._may_step():
            self._step()
        published: dict[str, float] = {}
        if source.rl_step % self.publish_every_n_steps == 0:
            published = self._publish(_engine(trainer))
        pl_module.log_dict(
            {
                **self._step_metrics(self.budget.close()),
                **idle,
                "drafter/refused_sequences": float(num_refused),
                "step": float(source.rl_step),
            },
            on_step=True,
            on_epoch=False,
            batch_size=len(batch),
        )
        log_step_scalars(trainer, self._mean_losses() | held_out | published, source.rl_step)
        self._losses, self._idle_work = [], IdleWork()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave neither hook nor feature collection behind."""
        if stage == "fit" and self._trained is not None:
            _rollout_source(trainer).on_idle = None
            source = cast(PolicySource, pl_module)
            source.collect_features, source.feature_layers = False, ()

    # Training and publication

    def _may_step(self) -> bool:
        """Whether data, number of steps and time allow one more at the batch's end."""
        if "batch_end" not in self.when:
            return False
        is_under = self.steps_per_batch is None or len(self._losses) < self.steps_per_batch
        return len(self.buffer) > 0 and is_under and self.budget.has_room()

    def _step(self) -> None:
        """One optimizer step on one packed row: what idle training can be interrupted between."""
        with self._span("drafter"), self.budget.optimizer_step():
            self._losses.append(self._train())
        self._unpublished_steps += 1

    def _train(self) -> list[float]:
        """The step itself; values in the order of `LOSS_NAMES`."""
        assert self._shared is not None, "on_train_start has not run"
        sequences = self.buffer.sample(self._generator, self.tokens_per_step)
        return self._learner().step(sequences, self._shared)

    def _train_while_idle(self, window: IdleWindow) -> None:
        """Train until all ranks have finished; no collective, nothing that waits for another."""
        if not len(self.buffer):
            return
        while window.num_idle_ranks() < self.min_idle_ranks and not window.should_stop():
            time.sleep(_SLEEP_S)
        start, num_before = time.perf_counter(), len(self._losses)
        with torch.inference_mode(False), torch.enable_grad():
            while not window.should_stop():
                self._step()
        self._idle_work.seconds += time.perf_counter() - start
        self._idle_work.num_steps += len(self._losses) - num_before

    def _publish(self, engine: RolloutEngine) -> dict[str, float]:
        """Make one drafter of the ranks', and give the engine a copy that later training does not
        change; the seconds it took. Nothing where no rank has trained."""
        started = time.perf_counter()
        weights = self._learner().weights()
        if not average_over_ranks(weights, self._unpublished_steps):
            return {}
        self._published = {name: weight.clone() for name, weight in weights.items()}
        self._unpublished_steps = 0
        self.version += 1
        with self._span("publish_drafter"):
            engine.load_drafter(self._published.items(), self.version)
        return {"time/publish_drafter": time.perf_counter() - started}

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._spans.append(Span(name=name, start_s=started, seconds=seconds))

    def take_spans(self) -> tuple[Span, ...]:
        """Optimizer steps and publications since the last call, the newest ones."""
        spans = tuple(self._spans)
        self._spans.clear()
        return spans

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
            "time/drafter": spent.seconds + self._idle_work.seconds,
        }
        if self.budget.share is not None:
            metrics["drafter/max_time_share"] = self.budget.share
        return metrics

    def _learner(self) -> DrafterLearner:
        assert self._trained is not None, "on_fit_start has not run: no drafter is loaded"
        return self._trained

    # State

    def state_dict(self) -> dict[str, Any]:
        """Drafter, optimizer, buffer, random state, what the engine serves, the step under way."""
        if (restored := self._restored_own or self._restored) is not None:
            return restored
        if self._trained is None:
            return {}
        return {
            **self._trained.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generator": self._generator.get_state(),
            "published": self._published,
            "version": self.version,
            "unpublished_steps": self._unpublished_steps,
            "budget": self.budget.state_dict(),
            "losses": self._losses,
            "idle_work": (self._idle_work.seconds, self._idle_work.num_steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts: some strategies restore before the drafter exists."""
        self._restored = state_dict or None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have each rank write what is its own, before rank 0 writes the checkpoint."""
        rl_step = cast(PolicySource, pl_module).rl_step
        self._rank_files().save(trainer, checkpoint, self.state_dict, rl_step)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read what is this rank's own, if the run goes on on as many ranks."""
        if trainer.state.fn == TrainerFn.FITTING:
            files = self._rank_files()
            self._restored_ranks, self._restored_own = files.load(trainer, checkpoint)

    def _rank_files(self) -> RankFiles:
        assert self._files is not None, "setup has not run"
        return self._files

    def _restore(self, trainer: Trainer) -> None:
        if (state := self._restored_own or self._restored) is None:
            return
        if self._restored_ranks not in (None, trainer.world_size):
            state = state_in_common(
                state,
                num_ranks=self._restored_ranks,
                rank=trainer.global_rank,
                own_weights=self._learner().weights(),
                own_generator=self._generator.get_state(),
            )
        self._learner().load_state_dict(state)
        self.buffer.load_state_dict(state["buffer"])
        self._generator.set_state(state["generator"].cpu())
        self._published, self.version = state["published"], state["version"]
        self._unpublished_steps = state["unpublished_steps"]
        self.budget.load_state_dict(state["budget"])
        self._losses = list(state["losses"])
        seconds, num_steps = state["idle_work"]
        self._idle_work = IdleWork(seconds=seconds, num_steps=num_steps)
        self._restored = self._restored_own = self._restored_ranks = None


def _rollout_source(trainer: Trainer) -> _RolloutSource:
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        raise ValueError(
            "DrafterTraining needs a datamodule with a rollout engine, got none; pass a "
            "RolloutDataModule to Trainer.fit(datamodule=...)"
        )
    return cast(_RolloutSource, trainer.datamodule)  # type: ignore[attr-defined]


def _engine(trainer: Trainer) -> RolloutEngine:
    return _rollout_source(trainer).engine
