"""Co-training in a real Trainer: budget, publication, idle time, resume, and what stays frozen.

The engine is a fake that records what it is given; policy, drafter and Lightning are real.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.callbacks.drafter_training import DrafterTraining
from fastrl.callbacks.feature_buffer import BufferSettings
from fastrl.callbacks.time_budget import TimeBudget
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.rank_board import IdleHook, IdleTime, IdleWindow
from fastrl.types import RolloutBatch, SamplingParams, SequenceFeatures
from tests.recording_logger import RecordingLogger

VOCAB_SIZE = 13
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.2,
)


class FakeEngine:
    """Records publications: their version, the weights as they were, and the tensors themselves."""

    def __init__(self, drafter_path: str | None) -> None:
        self.drafter_path = drafter_path
        self.is_started = False
        self.published: list[tuple[int, dict[str, Tensor]]] = []
        self.served: dict[str, Tensor] = {}

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert self.is_started, "load_drafter before start"
        self.served = dict(named_tensors)
        self.published.append((version, copy.deepcopy(self.served)))


class FakeRollouts(LightningDataModule):
    """Batches of random tokens, a function of the RL step; idle time before each, if given."""

    def __init__(self, engine: FakeEngine, num_rl_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.engine = engine
        self.num_rl_steps = num_rl_steps
        self.on_idle: IdleHook | None = None
        self.idle_time: IdleTime | None = None
        self.idle_window: IdleWindow | None = None

    def ensure_started(self) -> None:
        self.engine.is_started = True

    def train_dataloader(self) -> DataLoader[RolloutBatch]:
        return DataLoader(range(self.num_rl_steps), batch_size=1, collate_fn=self.rollout)

    def rollout(self, _: list[int]) -> RolloutBatch:
        self.ensure_started()
        rl_step = self.trainer.lightning_module.rl_step
        if self.on_idle is not None and self.idle_window is not None:
            with torch.inference_mode():
                self.on_idle(self.idle_window)
        generator = torch.Generator().manual_seed(rl_step)
        tokens_BT = torch.randint(VOCAB_SIZE, (4, 12), generator=generator)
        everywhere = torch.ones_like(tokens_BT, dtype=torch.bool)
        return RolloutBatch(
            tokens_BT=tokens_BT,
            attention_mask_BT=everywhere,
            response_mask_BT=everywhere,
            rollout_logprobs_BT=torch.zeros(4, 12),
            rewards_B=torch.zeros(4),
            group_B=torch.zeros(4, dtype=torch.int64),
            is_truncated_B=torch.zeros(4, dtype=torch.bool),
            policy_version_B=torch.zeros(4, dtype=torch.int64),
            sampling=SamplingParams(),
            rl_step=rl_step,
        )

    def transfer_batch_to_device(
        self, batch: RolloutBatch, device: torch.device, dataloader_idx: int
    ) -> RolloutBatch:
        return batch.to(device)


class FakePolicyModule(LightningModule):
    """A tiny policy that a plain language-model loss changes at every RL step."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = LlamaForCausalLM(CONFIG)
        self.rl_step = 0
        self.policy_version = 0
        self.collect_features = False
        self.feature_layers: tuple[int, ...] = ()
        self.features: list[SequenceFeatures] = []

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        output = self.policy(batch.tokens_BT, labels=batch.tokens_BT, output_hidden_states=True)
        if self.collect_features:
            inputs = [output.hidden_states[layer] for layer in self.feature_layers]
            states_BTS = torch.cat((output.hidden_states[-1], *inputs), dim=-1)
            self.features = [
                SequenceFeatures(
                    tokens_T=tokens_T,
                    hidden_TD=hidden_TD,
                    num_prompt_tokens=3,
                    rl_step=self.rl_step,
                )
                for tokens_T, hidden_TD in zip(batch.tokens_BT, states_BTS.detach(), strict=True)
            ]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(output.loss)
        optimizer.step()
        self.rl_step += 1
        self.policy_version += 1

    def take_features(self) -> list[SequenceFeatures]:
        taken, self.features = self.features, []
        return taken

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.policy.named_parameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.policy.parameters(), lr=self.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rl_step"] = self.rl_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rl_step = checkpoint["rl_step"]


class Watch(Callback):
    """Calls a function after each training batch, behind the callback under test."""

    def __init__(self, look: Callable[[Trainer], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.look(trainer)


@pytest.fixture
def drafter_path(tmp_path: Path) -> str:
    folder = tmp_path / "drafter"
    EagleDrafter.for_target(CONFIG, seed=5).save_pretrained(folder)
    return str(folder)


def small_callback(**options: Any) -> DrafterTraining:
    defaults = {
        "learning_rate": 1e-2,
        "steps_per_batch": 3,
        "tokens_per_step": 30,
        "buffer": BufferSettings(max_tokens=100),
        "publish_every_n_steps": 2,
    }
    return DrafterTraining(**(defaults | options))


def fit(
    callback: DrafterTraining,
    drafter_path: str | None,
    num_rl_steps: int,
    *,
    others: Iterable[Callback] = (),
    idle_window: IdleWindow | None = None,
    ckpt_path: str | None = None,
    policy_learning_rate: float = 0.1,
    seed: int = 0,
    first_rl_step: int = 0,
    logger: Logger | None = None,
) -> tuple[FakeEngine, FakePolicyModule]:
    engine, module = FakeEngine(drafter_path), FakePolicyModule(policy_learning_rate)
    module.rl_step = first_rl_step
    rollouts = FakeRollouts(engine, num_rl_steps, seed)
    rollouts.idle_window = idle_window
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger or False,
        log_every_n_steps=1,
        callbacks=[callback, *others],
        enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, datamodule=rollouts, ckpt_path=ckpt_path, weights_only=ckpt_path is not None
    )
    return engine, module


def window_of(num_polls: int) -> IdleWindow:
    """Open for `num_polls` questions, then closed; the count starts again after closing."""
    polls = 0

    def should_stop() -> bool:
        nonlocal polls
        polls += 1
        if polls > num_polls:
            polls = 0
            return True
        return False

    return idle_window(should_stop)


def idle_window(should_stop: Callable[[], bool], num_idle_ranks: int = 1) -> IdleWindow:
    return IdleWindow(should_stop=should_stop, num_idle_ranks=lambda: num_idle_ranks)


def recorded_metrics(names: list[str], into: list[list[float]]) -> Watch:
    return Watch(
        lambda trainer: into.append([trainer.callback_metrics[name].item() for name in names])
    )


def logged_rows(logger: RecordingLogger, names: list[str]) -> list[list[float]]:
    """Of the RL steps that logged them, in order."""
    logged = [scalars for _, scalars in logger.logged if names[0] in scalars]
    return [[float(scalars[name]) for name in names] for scalars in logged]


def logged_at(logger: RecordingLogger, name: str) -> list[int | None]:
    """RL steps for which a scalar was logged."""
    return [step for step, scalars in logger.logged if name in scalars]


def test_budget_publications_and_metrics_follow_the_schedule(drafter_path: str) -> None:
    """3 optimizer steps an RL step, published after steps 2 and 4; 48 tokens each, at most 100."""
    rows: list[list[float]] = []
    names = ["drafter/num_steps", "drafter/version", "drafter/buffer_tokens"]
    engine, _ = fit(small_callback(), drafter_path, 5, others=[recorded_metrics(names, into=rows)])
    assert rows == [[3, 0, 48], [3, 1, 96], [3, 1, 96], [3, 2, 96], [3, 2, 96]]
    assert [version for version, _ in engine.published] == [1, 2]


def test_what_a_publication_takes_is_part_of_co_trainings_time(
    drafter_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged for the steps that published, 2 and 4."""
    load = FakeEngine.load_drafter

    def load_slowly(self: FakeEngine, *args: Any) -> None:
        time.sleep(0.02)
        load(self, *args)

    monkeypatch.setattr(FakeEngine, "load_drafter", load_slowly)
    logger = RecordingLogger(tmp_path)
    rows: list[list[float]] = []
    watch = recorded_metrics(["time/drafter"], into=rows)
    fit(small_callback(), drafter_path, 5, others=[watch], logger=logger)
    assert logged_at(logger, "time/publish_drafter") == [2, 4]
    published = logged_rows(logger, ["time/publish_drafter"])
    for (publication,), (co_training,) in zip(published, (rows[1], rows[3]), strict=True):
        assert 0.02 <= publication < co_training


def test_training_lowers_the_loss_of_a_policy_that_stands_still(
    drafter_path: str, tmp_path: Path
) -> None:
    """On random sequences it has not seen; and the loss logged is the sum of its two parts."""
    names = ["drafter/loss", "drafter/loss_ce", "drafter/loss_hidden", "drafter/top1_agreement"]
    logger = RecordingLogger(tmp_path)
    loss_of_depth_1 = LossSettings(num_depths=1, hidden_weight=0.5)
    callback = small_callback(steps_per_batch=20, loss=loss_of_depth_1)
    fit(callback, drafter_path, 4, logger=logger, policy_learning_rate=0.0)
    rows = logged_rows(logger, names)
    assert len(rows) == 4
    for loss, cross_entropy, hidden, agreement in rows:
        assert loss == pytest.approx(cross_entropy + 0.5 * hidden, rel=1e-5)
        assert 0 <= agreement <= 1
    assert rows[-1][2] < 0.6 * rows[0][2]
    assert rows[-1][3] > rows[0][3] + 0.2


def test_a_drafter_of_fewer_tokens_trains_on_these_and_resumes_with_them(
    drafter_path: str, tmp_path: Path
) -> None:
    """Its best token agrees with the target's as often as that is one of its own, at most."""
    whole = EagleDrafter.from_pretrained(drafter_path)
    folders = {}
    for name, tokens in (("few", (1, 2, 5, 8)), ("others", (1, 2, 5, 9))):
        whole.trim_vocabulary(tokens)
        folders[name] = str(tmp_path / name)
        whole.save_pretrained(folders[name])
    logger = RecordingLogger(tmp_path)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    fit(small_callback(), folders["few"], 4, logger=logger, others=[saver])
    rows = logged_rows(logger, ["drafter/loss_ce", "drafter/top1_agreement"])
    assert rows[-1][0] < rows[0][0]
    assert all(agreement < 0.8 for _, agreement in rows)
    checkpoint = str(next(tmp_path.glob("step=*.ckpt")))
    fit(small_callback(), folders["few"], 4, ckpt_path=checkpoint)
    for name in ("others", "drafter"):
        with pytest.raises(ValueError, match="resume with the drafter that the run began with"):
            fit(small_callback(), str(tmp_path / name), 4, ckpt_path=checkpoint)


def test_the_loss_is_of_as_many_depths_as_its_settings_say(
    drafter_path: str, tmp_path: Path
) -> None:
    """At the first optimizer step, where the drafter and its depth 1 are still the same."""
    rows = []
    for num_depths in (1, 2, 3):
        settings = LossSettings(num_depths=num_depths)
        logger = RecordingLogger(tmp_path)
        fit(small_callback(steps_per_batch=1, loss=settings), drafter_path, 1, logger=logger)
        rows += logged_rows(logger, ["drafter/loss", "drafter/loss_ce"])
    losses, cross_entropies = zip(*rows, strict=True)
    assert len(set(losses)) == 3
    assert len(set(cross_entropies)) == 1


def test_published_weights_are_the_drafters_alone_and_the_policy_is_untouched(
    drafter_path: str,
) -> None:
    """Names are the drafter's own; a policy run without co-training ends with the same weights."""
    engine, module = fit(small_callback(), drafter_path, 2)
    (_, published), own = engine.published[0], EagleDrafter.from_pretrained(drafter_path)
    assert published.keys() == dict(own.named_weights()).keys()
    assert not any("embed" in name or "lm_head" in name for name in published)
    assert all((published[name] != weight).any() for name, weight in own.named_weights())
    _, module_alone = fit(small_callback(steps_per_batch=0), drafter_path, 2)
    for ours, alone in zip(
        module.policy.parameters(), module_alone.policy.parameters(), strict=True
    ):
        assert torch.equal(ours, alone)


def test_training_after_a_publication_never_changes_what_is_served(drafter_path: str) -> None:
    engine, _ = fit(small_callback(), drafter_path, 3)
    (_, as_published) = engine.published[-1]
    assert all(torch.equal(engine.served[name], weight) for name, weight in as_published.items())


def test_idle_time_is_used_until_the_window_closes_and_counts_against_the_budget(
    drafter_path: str,
) -> None:
    """Two steps before each rollout but the first (nothing to learn from yet), one is left."""
    rows: list[list[float]] = []
    watch = recorded_metrics(["drafter/num_steps"], into=rows)
    callback = small_callback()
    open_for_two = window_of(2)
    steps_at_window: list[int] = []

    def should_stop() -> bool:
        steps_at_window.append(len(callback._losses))
        return open_for_two.should_stop()

    fit(callback, drafter_path, 3, others=[watch], idle_window=idle_window(should_stop))
    assert rows == [[3], [3], [3]]
    assert steps_at_window == [0, 1, 2, 0, 1, 2]


def test_idle_time_beyond_the_budget_is_used_too(drafter_path: str) -> None:
    rows: list[list[float]] = []
    watch = recorded_metrics(["drafter/num_steps"], into=rows)
    fit(small_callback(), drafter_path, 3, others=[watch], idle_window=window_of(7))
    assert rows == [[3], [7], [7]]


def test_a_closed_window_allows_no_step(drafter_path: str) -> None:
    rows: list[list[float]] = []
    watch = recorded_metrics(["drafter/num_steps"], into=rows)
    fit(
        small_callback(steps_per_batch=0),
        drafter_path,
        3,
        others=[watch],
        idle_window=idle_window(lambda: True),
    )
    assert rows == [[0], [0], [0]]


def test_idle_training_waits_for_as_many_idle_ranks_as_it_is_told(drafter_path: str) -> None:
    """And not beyond the window's end."""
    callback = small_callback()
    fit(callback, drafter_path, 1)
    callback.min_idle_ranks = 3
    counts = iter([1, 1, 2, 3])
    window = window_of(5)
    callback._train_while_idle(
        IdleWindow(should_stop=window.should_stop, num_idle_ranks=lambda: next(counts))
    )
    assert callback._idle_work.num_steps == 2  # three of the five questions went by before
    callback._train_while_idle(idle_window(lambda: True, num_idle_ranks=2))
    assert callback._idle_work.num_steps == 2


def test_without_idle_in_when_nobody_trains_in_idle_time(drafter_path: str) -> None:
    rows: list[list[float]] = []
    watch = recorded_metrics(["drafter/num_steps"], into=rows)
    callback = small_callback(when=("batch_end",))
    fit(callback, drafter_path, 3, others=[watch], idle_window=window_of(7))
    assert rows == [[3], [3], [3]]


def test_without_batch_end_in_when_only_idle_time_is_used(drafter_path: str) -> None:
    rows: list[list[float]] = []
    watch = recorded_metrics(["drafter/num_steps"], into=rows)
    callback = small_callback(when=("idle",), steps_per_batch=None)
    engine, _ = fit(callback, drafter_path, 3, others=[watch], idle_window=window_of(2))
    assert rows == [[0], [2], [2]]
    assert [version for version, _ in engine.published] == [1]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_culprit(drafter_path: str) -> None:
    """Hidden states of the policy's that are no numbers; the drafter keeps its weights."""
    callback = small_callback()

    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.rl_step == 2:
                pl_module.policy.lm_head.weight.data.fill_(torch.inf)

    with pytest.raises(FloatingPointError, match=r"after RL step 2: loss nan.*\['fc\.weight'\]"):
        fit(callback, drafter_path, 4, others=[Poison()])
    assert all(weight.isfinite().all() for weight in callback._learner().weights().values())


def test_hook_and_feature_collection_end_with_the_fit(drafter_path: str) -> None:
    _, module = fit(small_callback(), drafter_path, 1)
    assert module.trainer.datamodule.on_idle is None
    assert not module.collect_features


def test_loading_gives_a_resumed_run_no_time_to_train(drafter_path: str, tmp_path: Path) -> None:
    """Its first RL step's share is of that step, though it is not the first of an epoch."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    class LongLoading(Callback):
        def on_fit_start(self, *_: Any) -> None:
            nonlocal now
            now += 1000

    numbers: list[list[float]] = []
    saver = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    fit(small_callback(), drafter_path, 2, others=[saver])
    callback = small_callback(steps_per_batch=None, max_step_share=0.5)
    callback.budget = TimeBudget(0.5, clock)
    others = [LongLoading(), recorded_metrics(["drafter/num_steps"], into=numbers)]
    fit(callback, drafter_path, 2, others=others, ckpt_path=str(tmp_path / "step=1.ckpt"))
    assert len(numbers) == 1
    assert numbers[0][0] < 20


@pytest.mark.parametrize("idle_polls", [None, 2])
def test_a_resumed_run_continues_bit_identically(
    drafter_path: str, tmp_path: Path, idle_polls: int | None
) -> None:
    """Stopped after 3 of 6 RL steps, one after a publication: the engine gets that back first."""

    def window() -> IdleWindow | None:
        return None if idle_polls is None else window_of(idle_polls)

    metrics_whole: list[list[float]] = []
    metrics_resumed: list[list[float]] = []
    names = ["drafter/num_steps", "drafter/version", "drafter/buffer_tokens"]
    logger_whole, logger_resumed = RecordingLogger(tmp_path), RecordingLogger(tmp_path)
    saver = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    whole, _ = fit(
        small_callback(),
        drafter_path,
        6,
        others=[recorded_metrics(names, into=metrics_whole), saver],
        idle_window=window(),
        logger=logger_whole,
    )
    resumed, _ = fit(
        small_callback(),
        drafter_path,
        6,
        others=[recorded_metrics(names, into=metrics_resumed)],
        idle_window=window(),
        ckpt_path=str(tmp_path / "step=3.ckpt"),
        seed=99,
        logger=logger_resumed,
    )
    assert metrics_resumed == metrics_whole[3:]
    losses_whole, losses_resumed = (
        logged_rows(logger, ["drafter/loss", "drafter/held_out_loss_depth_2"])
        for logger in (logger_whole, logger_resumed)
    )
    assert len(losses_resumed) == 3
    assert losses_resumed == losses_whole[3:]
    assert [version for version, _ in whole.published] == [1, 2, 3]
    assert [version for version, _ in resumed.published] == [1, 2, 3]
    for (_, theirs), (_, ours) in zip(whole.published, resumed.published, strict=True):
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_checkpoint_before_the_first_publication_publishes_nothing_on_resume(
    drafter_path: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    fit(small_callback(publish_every_n_steps=4), drafter_path, 2, others=[saver])
    resumed, _ = fit(
        small_callback(publish_every_n_steps=4),
        drafter_path,
        2,
        ckpt_path=str(tmp_path / "step=1.ckpt"),
    )
    assert resumed.published == []


def test_state_survives_a_stop_between_restore_and_training(
    drafter_path: str, tmp_path: Path
) -> None:
    """A checkpoint saved before training begins again must not lose the restored state."""
    callback = small_callback()
    fit(callback, drafter_path, 2)
    state = callback.state_dict()
    interrupted = small_callback()
    interrupted.load_state_dict(state)
    assert interrupted.state_dict() is state


def test_draws_from_the_buffer_follow_the_runs_seed(drafter_path: str) -> None:
    published = [
        fit(small_callback(), drafter_path, 2, seed=seed)[0].published[0][1] for seed in (1, 1, 2)
    ]
    first, again, other = (torch.cat([w.flatten() for w in p.values()]) for p in published)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_second_fit_goes_on_with_the_trained_drafter(drafter_path: str) -> None:
    """Two fits of two RL steps, the second with a new engine and datamodule: it is given what the
    first published, and ends where one fit of four does. The policy stands still, for it starts
    anew."""
    whole, _ = fit(small_callback(), drafter_path, 4, policy_learning_rate=0.0)
    callback = small_callback()
    first, _ = fit(callback, drafter_path, 2, policy_learning_rate=0.0)
    second, _ = fit(callback, drafter_path, 2, policy_learning_rate=0.0, first_rl_step=2)
    assert [version for version, _ in first.published] == [1]
    assert [version for version, _ in second.published] == [1, 2]
    for (_, ours), (_, theirs) in zip(second.published, whole.published, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_frozen_drafter_is_evaluated_but_neither_trained_nor_published(
    drafter_path: str, tmp_path: Path
) -> None:
    """`steps_per_batch: 0`, the control of configs/quickstart_frozen.yaml."""
    rows: list[list[float]] = []
    names = ["drafter/num_steps", "drafter/version"]
    callback = small_callback(steps_per_batch=0, publish_every_n_steps=1)
    watch, logger = recorded_metrics(names, into=rows), RecordingLogger(tmp_path)
    engine, _ = fit(callback, drafter_path, 3, others=[watch], logger=logger)
    assert engine.published == []
    assert rows == [[0, 0]] * 3
    acceptances = logged_rows(logger, ["drafter/held_out_acceptance_depth_1"])
    assert len(acceptances) == 3
    assert all(0 < acceptance < 1 for (acceptance,) in acceptances)
    assert logged_at(logger, "drafter/loss") == []
    for name, weight in EagleDrafter.from_pretrained(drafter_path).named_weights():
        assert torch.equal(callback.state_dict()["drafter"][name], weight)


class TimedTraining(DrafterTraining):
    """On a clock of its own, by which an optimizer step takes a second."""

    now = 0.0

    def _train(self) -> list[float]:
        self.now += 1.0
        return super()._train()


class TimedRollouts(Callback):
    """Seconds that go by before each update: the given ones in turn, over and over."""

    def __init__(self, callback: TimedTraining, seconds: Iterable[float] = (10.0,)) -> None:
        self.callback = callback
        self.seconds = itertools.cycle(seconds)

    def on_train_batch_start(self, *args: Any) -> None:
        self.callback.now += next(self.seconds)


def timed_callback(**options: Any) -> TimedTraining:
    callback = TimedTraining(**({"learning_rate": 1e-2, "tokens_per_step": 30} | options))
    callback.budget = TimeBudget(options["max_step_share"], lambda: callback.now)
    return callback


@pytest.mark.parametrize(
    ("share", "steps_per_batch", "num_steps"), [(0.5, None, 10), (0.2, None, 2), (0.5, 4, 4)]
)
def test_the_share_of_the_rl_steps_time_is_kept_and_logged(
    drafter_path: str, share: float, steps_per_batch: int | None, num_steps: int
) -> None:
    """Of 10 s and the training itself, in seconds; and steps_per_batch stays the most."""
    rows: list[list[float]] = []
    names = ["drafter/num_steps", "drafter/time_share", "drafter/max_time_share"]
    callback = timed_callback(max_step_share=share, steps_per_batch=steps_per_batch)
    others = [TimedRollouts(callback), recorded_metrics(names, into=rows)]
    fit(callback, drafter_path, 3, others=others)
    measured = num_steps / (10 + num_steps)
    assert rows == [pytest.approx([num_steps, measured, share])] * 3


def test_an_rl_step_without_time_for_training_logs_no_losses(
    drafter_path: str, tmp_path: Path
) -> None:
    """Nor does it repeat those of the step before; how good the drafter is, it logs all the same.

    A fifth of 10 s is time for two optimizer steps, a fifth of nothing for none.
    """
    callback = timed_callback(max_step_share=0.2, steps_per_batch=None)
    logger = RecordingLogger(tmp_path)
    others = [TimedRollouts(callback, seconds=(10.0, 0.0))]
    fit(callback, drafter_path, 3, others=others, logger=logger)
    assert logged_rows(logger, ["drafter/num_steps"]) == [[2], [0], [2]]
    for name in ("loss", "loss_hidden", "loss_ce", "top1_agreement", "top1_acceptance"):
        assert logged_at(logger, f"drafter/{name}") == [1, 3]
    assert logged_at(logger, "drafter/held_out_loss_depth_1") == [1, 2, 3]


def test_the_share_changes_the_drafter_and_never_the_policy(drafter_path: str) -> None:
    drafters, policies = [], []
    for share in (0.2, 0.5):
        callback = timed_callback(max_step_share=share, steps_per_batch=None)
        _, module = fit(callback, drafter_path, 3, others=[TimedRollouts(callback)])
        drafters.append(torch.cat([w.flatten() for w in callback.state_dict()["drafter"].values()]))
        policies.append(torch.cat([w.detach().flatten() for w in module.policy.parameters()]))
    assert not torch.equal(*drafters)
    assert torch.equal(*policies)


def test_a_resumed_budget_goes_on_with_what_was_saved(drafter_path: str, tmp_path: Path) -> None:
    """A step of 1 s in RL steps of 10 s and a share of 4%: savings make it every third."""
    rows_whole: list[list[float]] = []
    rows_resumed: list[list[float]] = []
    saver = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    names = ["drafter/num_steps"]
    callback = timed_callback(max_step_share=0.04, steps_per_batch=None)
    others = [TimedRollouts(callback), recorded_metrics(names, into=rows_whole), saver]
    fit(callback, drafter_path, 8, others=others)
    callback = timed_callback(max_step_share=0.04, steps_per_batch=None)
    others = [TimedRollouts(callback), recorded_metrics(names, into=rows_resumed)]
    fit(callback, drafter_path, 8, others=others, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert {0.0, 1.0} == {row[0] for row in rows_whole}
    assert rows_resumed == rows_whole[4:]


def test_held_out_agreement_is_of_the_drafter_before_it_trains_on_the_sequences(
    drafter_path: str, tmp_path: Path
) -> None:
    """The first RL step's is the untrained drafter's, however much that step trains."""
    names = ["drafter/held_out_loss_depth_1", "drafter/held_out_loss_depth_6"]
    rows: dict[int, list[list[float]]] = {}
    for steps_per_batch in (0, 20):
        callback = small_callback(steps_per_batch=steps_per_batch, publish_every_n_steps=100)
        logger = RecordingLogger(tmp_path)
        fit(callback, drafter_path, 2, logger=logger)
        rows[steps_per_batch] = logged_rows(logger, names)
    assert rows[0][0] == rows[20][0]
    assert rows[0][1] != rows[20][1]


def test_a_run_without_a_drafter_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"drafter_path is null.*set drafter_path"):
        fit(small_callback(), None, 1)


def test_a_drafter_of_another_target_is_refused(tmp_path: Path) -> None:
    other = LlamaConfig(**(CONFIG.to_diff_dict() | {"vocab_size": VOCAB_SIZE + 1}))
    EagleDrafter.for_target(other, seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size 14, but the policy's is 13"):
        fit(small_callback(), str(tmp_path), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"steps_per_batch": -1}, "steps_per_batch must be >= 0, or null, got -1"),
        ({"steps_per_batch": None}, "both null.*set either"),
        ({"max_step_share": 1.5}, "in \\(0, 1\\).*got 1.5"),
        ({"tokens_per_step": 0}, "tokens_per_step must be >= 1, got 0"),
        ({"publish_every_n_steps": 0}, "publish_every_n_steps must be >= 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_callback(**options)


def test_a_checkpoint_can_be_saved_after_a_validation_alone(tmp_path: Path) -> None:
    callback = DrafterTraining()
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module = LightningModule()
    module.rl_step = 3
    callback.setup(trainer, module, "validate")
    checkpoint: dict[str, Any] = {}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["drafter_ranks"]["num_ranks"] == 1
    assert checkpoint["drafter_ranks"]["rl_step"] == 3
