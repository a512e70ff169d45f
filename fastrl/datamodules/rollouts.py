"""Rollout generation as a data module: one batch of the training loader is one RL step.

A batch is made when it is asked for, and Lightning asks after the previous step has ended: the
loaders are sized, and Lightning prefetches unsized ones only. So rollouts come from the current
policy (lag 0).

Ranks that have scored their training responses while others have not have idle time, which is
handed to `on_idle`; all go on together. Between the batches of a validation ranks do not wait for
one another, so there is none.

The engine and the reward workers start on first use, because `setup` runs before a checkpoint is
restored, and they end with the run, however it ends. Leaves out how rollouts are generated
(fastrl/rollout).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from transformers import PreTrainedTokenizerBase

from fastrl.datamodules.chat_template import (
    context_length,
    load_tokenizer,
    tokenize_questions,
)
from fastrl.datamodules.collate import collate
from fastrl.datamodules.prompts import PromptCursor, PromptOrder, PromptSource, even_slices
from fastrl.datamodules.rewards.base import RewardFunction
from fastrl.datamodules.rewards.workers import RewardPool
from fastrl.datamodules.streams import BatchLoader, load_batches
from fastrl.model_files import resolve_model
from fastrl.rollout.architecture import architecture_of_folder, differences
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.rank_board import IdleHook, IdleTime, RankBoard, RankError
from fastrl.types import PolicySource, Prompt, RolloutBatch, SamplingParams, Span

_SHORTEST_PHASE_S = 1e-5
"""A check that nobody has set takes less."""


class RolloutDataModule(pl.LightningDataModule):
    """Samples responses from the current policy and scores them.

    Over data-parallel ranks each step's prompts are dealt out one by one; which prompts a step
    takes does not depend on the number of ranks, nor which a mini-batch takes (if their number is a
    multiple of it).

    Args:
        model_path: The policy's `model_path`, for its tokenizer and the engine.
        prompts: Where questions come from.
        engine: Generates the rollouts.
        reward: Scores a response; runs in worker processes.
        num_steps: RL steps a trainer epoch has; with `trainer.max_epochs: 1`, those of the whole
            run.
        prompts_per_step: Prompts an RL step samples, over all ranks.
        group_size: Responses to each prompt.
        sampling: How training responses are sampled.
        val_sampling: How held-out responses are sampled; as in training where left out.
        val_num_samples: Responses to each held-out prompt.
        system_prompt: System message put before each question; none where left out.
        max_prompt_tokens: Longer prompts, chat template included, are left out and counted.
        reward_workers: Worker processes that score responses.
        reward_timeout_s: Time limit of each score in seconds; beyond it a response scores 0.
        rank_timeout_s: Longest that a rank which has finished its share of a step's responses waits
            for the others, in seconds; then the run ends with the names of those missing.
        seed: Seeds the order of prompts and the randomness of every token; `seed_everything` on the
            command line.
    """

    tokenizer: PreTrainedTokenizerBase
    """Of the policy's model, loaded in `setup`."""

    def __init__(
        self,
        model_path: str,
        prompts: PromptSource,
        engine: RolloutEngine,
        reward: RewardFunction,
        num_steps: int,
        prompts_per_step: int = 16,
        group_size: int = 8,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  (frozen)
        val_sampling: SamplingParams | None = None,
        val_num_samples: int = 1,
        system_prompt: str | None = None,
        max_prompt_tokens: int = 1024,
        reward_workers: int = 2,
        reward_timeout_s: float = 5.0,
        rank_timeout_s: float = 3600.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_counts(
            num_steps=num_steps,
            prompts_per_step=prompts_per_step,
            group_size=group_size,
            val_num_samples=val_num_samples,
            max_prompt_tokens=max_prompt_tokens,
        )
        if sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature must be > 0 for training, got 0: greedy responses to a "
                "prompt are all the same; set data.sampling.temperature, e.g. to 1 "
                "(data.val_sampling may be greedy)"
            )
        if rank_timeout_s <= 0:
            raise ValueError(
                f"rank_timeout_s must be > 0, got {rank_timeout_s}; set data.rank_timeout_s"
            )
        self.model_path = resolve_model(model_path)
        self.prompts = prompts
        self.engine = engine
        self.num_steps = num_steps
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.sampling = sampling
        self.val_sampling = val_sampling or sampling
        self.val_num_samples = val_num_samples
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.rank_timeout_s = rank_timeout_s
        self.seed = seed
        self.rewards = RewardPool(reward, num_workers=reward_workers, timeout_s=reward_timeout_s)
        self._cursor = PromptCursor()
        self._train_prompts: list[Prompt] = []
        self._held_out_prompts: list[Prompt] = []
        self.on_published: Callable[[], None] | None = None
        """Called before each generation, when the engine has the weights that it is to use: what
        holds them against the policy's."""
        self.on_idle: IdleHook | None = None
        """Given the time in which this rank has finished a training step's rollouts and others have
        not: what trains the drafter."""
        self.idle_time: IdleTime | None = None
        """Of the last training batch."""
        self._board: RankBoard | None = None  # from the first start on
        self._pad_token_id = 0
        self._is_started = False
        self._has_published = False
        self._engine_state: dict[str, Any] | None = None
        self._drafter = architecture_of_folder(engine.drafter_path)

    # ---------------------------------------------------------------- prompts

    def setup(self, stage: str) -> None:
        """Load and tokenize the prompts; the weights come later, after a checkpoint is restored."""
        if self._train_prompts:
            return
        self.tokenizer = load_tokenizer(self.model_path)
        self._pad_token_id = _pad_token_id(self.tokenizer)
        splits = self.prompts.load()
        self.rewards.prepare()
        limit = min(self.max_prompt_tokens, context_length(self.model_path) - 1)
        self._held_out_prompts, train_prompts = (
            tokenize_questions(
                questions,
                self.tokenizer,
                system_prompt=self.system_prompt,
                max_prompt_tokens=limit,
                split=split,
            )
            for questions, split in ((splits.held_out, "held-out"), (splits.train, "training"))
        )
        PromptOrder(len(train_prompts), self.seed).take(0, self.prompts_per_step)
        self._train_prompts = train_prompts

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Among data-parallel ranks: those of a tensor-parallel group share their prompts."""
        assert self.trainer is not None
        replicas = self.trainer.distributed_sampler_kwargs
        return (replicas["rank"], replicas["num_replicas"]) if replicas else (0, 1)

    def _step_prompts(self, rl_step: int) -> list[Prompt]:
        """This rank's share of an RL step's prompts: every so many-th, so that the ranks' k-th
        mini-batches are together what one process makes its k-th of."""
        rank, world_size = self._rank_and_world_size()
        if self.prompts_per_step % world_size:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of the {world_size} "
                f"data-parallel ranks; set data.prompts_per_step"
            )
        order = PromptOrder(len(self._train_prompts), self.seed)
        indices, position = order.take(self._cursor.at(rl_step), self.prompts_per_step)
        self._cursor.taken(rl_step, position)
        return [self._train_prompts[index] for index in indices[rank::world_size]]

    def _held_out_batches(self) -> list[list[Prompt]]:
        """This rank's held-out prompts, in as many batches on every rank, each about a step's
        load."""
        rank, world_size = self._rank_and_world_size()
        num_prompts = len(self._held_out_prompts)
        if num_prompts == 0:
            return []
        if num_prompts < world_size:
            raise ValueError(
                f"{num_prompts} held-out prompts are too few for {world_size} ranks; hold out "
                f"more, or none"
            )
        mine = self._held_out_prompts[even_slices(num_prompts, world_size)[rank]]
        rollouts_per_step = self.prompts_per_step * self.group_size
        prompts_per_batch = max(rollouts_per_step // (world_size * self.val_num_samples), 1)
        smallest_share = num_prompts // world_size
        num_batches = -(-smallest_share // prompts_per_batch)
        return [mine[part] for part in even_slices(len(mine), num_batches)]

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> BatchLoader[RolloutBatch]:
        """`num_steps` RL steps from the prompt cursor on."""
        return load_batches(self.num_steps, lambda _: self._training_batch())

    def val_dataloader(self) -> BatchLoader[RolloutBatch]:
        """The held-out prompts, with the same randomness each time, so that curves are
        comparable."""
        batches = self._held_out_batches()
        return load_batches(len(batches), lambda index: self._held_out_batch(batches[index]))

    def test_dataloader(self) -> BatchLoader[RolloutBatch]:
        """As for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> BatchLoader[RolloutBatch]:
        """As for validation."""
        return self.val_dataloader()

    def transfer_batch_to_device(
        self, batch: RolloutBatch, device: torch.device, dataloader_idx: int
    ) -> RolloutBatch:
        """Lightning's own way would assign to the fields of a frozen record."""
        return batch.to(device)

    # ---------------------------------------------------------------- one batch

    def _training_batch(self) -> RolloutBatch:
        rl_step = self._policy.rl_step
        return self._make_batch(
            self._step_prompts(rl_step),
            self.sampling,
            self.group_size,
            stream=rl_step,
            is_training=True,
        )

    def _held_out_batch(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        return self._make_batch(prompts, self.val_sampling, self.val_num_samples, stream=0)

    def ensure_started(self) -> None:
        """Start engine, without weights, and reward workers; rollouts do so on first use.

        A callback that pushes a drafter before the first rollout calls it beforehand.
        """
        if not self._is_started:
            self._board = RankBoard.join(self.rank_timeout_s)
            self.engine.start(self.model_path)
            self._is_started = True
            if self._engine_state is not None:
                self.engine.load_state_dict(self._engine_state)
            self.rewards.start()

    def _make_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        num_samples: int,
        *,
        stream: int,
        is_training: bool = False,
    ) -> RolloutBatch:
        """Publish → generate → score → wait for other ranks, in training → collate. `stream` is the
        RL step that seeds the randomness."""
        started = time.perf_counter()
        self.ensure_started()
        board = self._board if is_training else None
        if board is not None:
            board.begin()
        self.publish_policy()
        published = time.perf_counter()
        if self.on_published is not None:
            self.on_published()
        checked = time.perf_counter()
        rollouts = self.engine.generate(
            prompts, sampling, num_samples=num_samples, seed=self.seed, rl_step=stream
        )
        generated = time.perf_counter()
        reward_results = self.rewards.score(
            [rollout.text for rollout in rollouts], [rollout.prompt for rollout in rollouts]
        )
        scored = time.perf_counter()
        timings = {
            "publish": published - started,
            "rollout": generated - checked,
            "reward": scored - generated,
        }
        if board is not None:
            self.idle_time = board.pass_idle_time(self.on_idle)
            timings["idle"] = self.idle_time.seconds
        return collate(
            rollouts,
            reward_results,
            sampling=sampling,
            rl_step=self._policy.rl_step,
            pad_token_id=self._pad_token_id,
            stats=self.engine.stats(),
            timings=timings,
            spans=_spans(
                ("publish", started, published),
                ("health", published, checked),
                ("rollout", checked, generated),
                ("reward", generated, scored),
            ),
        )

    @property
    def _policy(self) -> PolicySource:
        assert self.trainer is not None, "rollouts need a Trainer, whose module is the policy"
        return cast(PolicySource, self.trainer.lightning_module)

    def publish_policy(self) -> None:
        """Push the weights to an engine just started, and whenever they have changed."""
        self.ensure_started()
        policy = self._policy
        # A resumed engine knows the version of its weights before it has any.
        if not self._has_published or self.engine.policy_version != policy.policy_version:
            self.engine.load_policy(policy.policy_tensors(), policy.policy_version)
            self._has_published = True

    # ---------------------------------------------------------------- state and end

    def state_dict(self) -> dict[str, Any]:
        """The prompt cursor, the engine's state, and what its drafter is."""
        if self._is_started:
            self._engine_state = self.engine.state_dict()
        return {
            "position": self._cursor.at(self._policy.rl_step),
            "engine": self._engine_state,
            "drafter": self._drafter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved cursor; the engine takes its state when it starts.

        Raises ValueError for a run whose drafter was of another architecture.
        """
        theirs = state_dict["drafter"]
        if theirs and self._drafter and (different := differences(theirs, self._drafter)):
            raise ValueError(
                f"the checkpoint is of a run with another drafter: {different}; what it learnt of "
                f"drafting belongs to that one: set the engine's drafter_path to it, or start anew"
            )
        self._cursor = PromptCursor(state_dict["position"])
        self._engine_state = state_dict["engine"]

    def teardown(self, stage: str) -> None:
        """End the engine and the reward workers; a later run starts them again."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """The same when training fails, or is stopped with Ctrl-C; other ranks are told, and the
        error tells of them."""
        if self._board is not None:
            if not isinstance(exception, RankError | KeyboardInterrupt):
                self._board.explain(exception)
            self._board.fail(exception)
        self._close()

    def _close(self) -> None:
        self.rewards.close()
        if self._is_started:
            self._engine_state = self.engine.state_dict()
        self._is_started = self._has_published = False
        self._board = None
        self.engine.close()


def _spans(*phases: tuple[str, float, float]) -> tuple[Span, ...]:
    """Name, start and end of each; those without length are left out."""
    return tuple(
        Span(name=name, start_s=start, seconds=end - start)
        for name, start, end in phases
        if end - start > _SHORTEST_PHASE_S
    )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}; set data.{name}")


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token does, padding being masked; 0 where the tokenizer has none of its own."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
