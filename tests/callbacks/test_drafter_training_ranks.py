"""Co-training on several real ranks: idle ones train, all publish one drafter, tokens stay.

The quickstart's policy and drafter, DDP over gloo. The policy's learning rate is 0, so that all
runs have the same policy whatever DDP makes of its gradients; one rank's rollouts take artificially
long.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from fastrl.callbacks import DrafterTraining, StepCheckpoint, Timeline
from fastrl.callbacks.drafter_ranks import seed_of_rank
from fastrl.callbacks.feature_buffer import BufferSettings
from fastrl.callbacks.timeline_trace import read, span_of
from fastrl.checkpoint_io import AtomicCheckpointIO
from fastrl.datamodules import ReasoningGymPrompts, ReasoningGymReward, RolloutDataModule
from fastrl.modules import GRPO, OptimizerSettings
from fastrl.rollout.rank_board import IdleWindow
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import Rollout, RolloutBatch, SamplingParams
from tests.recording_logger import RecordingLogger
from tests.rollout.ranks import raised, run_ranks

MODELS = Path(__file__).parents[2] / "models" / "quickstart"
NUM_STEPS = 6
DELAYS = ((0.0, 1.6), (1.6, 0.0), (0.0, 0.0))
"""Seconds that the rollouts of ranks 0 and 1 take longer, in turn over the RL steps."""


class SlowEngine(TorchEngine):
    """The longest response, by a sleep; and a place to die."""

    num_calls = 0
    delays: tuple[tuple[float, ...], ...] = ()
    dies_in_call: int | None = None

    def generate(self, *args: Any, **options: Any) -> list[Rollout]:
        rollouts = super().generate(*args, **options)
        if self.num_calls == self.dies_in_call:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.delays:
            time.sleep(self.delays[self.num_calls % len(self.delays)][rank_of_process()])
        self.num_calls += 1
        return rollouts


def rank_of_process() -> int:
    return int(os.environ.get("RANK", "0"))


class Recorder(Callback):
    """What a rank saw of each RL step, after co-training."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.lags: list[int] = []
        self.engine_versions: list[int] = []
        self.published: list[dict[str, torch.Tensor] | None] = []
        self.idle: list[float] = []
        self.overruns: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: RolloutBatch, _: int
    ) -> None:
        for one in batch.rollouts:
            self.tokens[(module.rl_step, one.prompt.prompt_id, one.sample_index)] = one.tokens
        self.lags.append(module.policy_version - 1 - int(batch.policy_version_B.min()))
        engine, training = trainer.datamodule.engine, trainer.callbacks[0]
        self.engine_versions.append(engine.drafter_version)
        self.published.append(training.published_weights)
        self.idle.append(trainer.datamodule.idle_time.seconds)
        self.overruns.append(trainer.datamodule.idle_time.overrun_s)


def make_training(**options: Any) -> DrafterTraining:
    defaults: dict[str, Any] = {
        "learning_rate": 6e-3,
        "steps_per_batch": 1,
        "tokens_per_step": 128,
        "buffer": BufferSettings(max_tokens=2000),
        "publish_every_n_steps": 2,
    }
    return DrafterTraining(**(defaults | options))


def make_data(num_steps: int, **options: Any) -> RolloutDataModule:
    engine = SlowEngine(drafter_path=str(MODELS / "drafter"), strategy="2_1_3")
    return RolloutDataModule(
        model_path=str(MODELS / "policy"),
        prompts=ReasoningGymPrompts(task="chain_sum", num_held_out=0),
        engine=engine,
        reward=ReasoningGymReward(),
        num_steps=num_steps,
        prompts_per_step=4,
        group_size=2,
        sampling=SamplingParams(max_tokens=24),
        reward_workers=1,
        seed=7,
        **options,
    )


def fit(
    folder: str,
    training: DrafterTraining,
    data: RolloutDataModule,
    *,
    others: tuple[Callback, ...] = (),
    num_ranks: int = 1,
    ckpt_path: str | None = None,
) -> tuple[Recorder, RecordingLogger]:
    torch.set_num_threads(1)
    recorder, logger = Recorder(), RecordingLogger(Path(folder))
    several: dict[str, Any] = {"strategy": "ddp", "devices": num_ranks} if num_ranks > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[training, recorder, *others],
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in others),
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        **several,
    )
    policy = GRPO(model_path=str(MODELS / "policy"), optimizer=OptimizerSettings(lr=0.0))
    trainer.fit(
        policy, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
    )
    return recorder, logger


def run_of_one_rank_of_two(folder: str) -> dict[str, Any]:
    training, data = make_training(), make_data(NUM_STEPS)
    data.engine.delays = DELAYS
    recorder, logger = fit(folder, training, data, others=(Timeline(),), num_ranks=2)
    weights = {name: weight.clone() for name, weight in training._learner().weights().items()}
    logged = [(s, {name: float(value) for name, value in m.items()}) for s, m in logger.logged]
    return {
        **{name: getattr(recorder, name) for name in vars(Recorder())},
        "logged": logged,
        "weights": weights,
        "version": training.version,
        "steps_left": training._unpublished_steps,
        "timeline": [e for path in Path(folder).rglob("timeline.json") for e in read(path)][8:],
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    return run_ranks(run_of_one_rank_of_two, folder, str(folder))


def test_tokens_are_those_of_one_rank(two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Drafters differ between the runs; tokens are a function of seed, step, prompt and sample."""
    alone, _ = fit(str(tmp_path), make_training(), make_data(NUM_STEPS))
    together = two_ranks[0]["tokens"] | two_ranks[1]["tokens"]
    assert len(together) == len(alone.tokens) == NUM_STEPS * 4 * 2
    assert together == alone.tokens
    for rank in two_ranks:
        assert rank["lags"] == [0] * NUM_STEPS
        assert len(rank["tokens"]) == NUM_STEPS * 2 * 2


def test_all_ranks_publish_one_drafter_and_end_with_it(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    assert first["engine_versions"] == second["engine_versions"]
    assert first["version"] == second["version"] == NUM_STEPS // 2
    assert first["published"][0] is None
    for one, other in zip(first["published"][1:], second["published"][1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    last = first["published"][-1]
    assert not torch.equal(first["published"][1]["fc.weight"], last["fc.weight"])
    for rank in two_ranks:  # the last RL step published: what is under training is what is served
        assert all(torch.equal(rank["weights"][name], last[name]) for name in last)
        assert rank["steps_left"] == 0


def test_idle_ranks_train_and_the_longest_is_not_delayed(two_ranks: list[dict[str, Any]]) -> None:
    """From the second RL step on, when there is something to learn from."""
    logged: dict[str, list[float]] = {}
    for _, metrics in two_ranks[0]["logged"]:
        for name, value in metrics.items():
            logged.setdefault(name, []).append(float(value))
    steps = logged["drafter/idle_steps"]
    assert len(steps) == NUM_STEPS
    assert steps[0] == 0  # an empty buffer
    for number in (1, 3, 4):  # one rank took 1.6 s longer
        assert steps[number] >= 3
        assert logged["drafter/idle_share_used"][number] > 0.5
        assert logged["time/idle_all_ranks"][number] > 1.2
    for number in range(NUM_STEPS):
        overruns = [rank["overruns"][number] for rank in two_ranks]
        assert logged["time/idle_overrun"][number] == pytest.approx(max(overruns))
        idle = [rank["idle"][number] for rank in two_ranks]
        assert logged["time/idle_all_ranks"][number] == pytest.approx(sum(idle))
    # Rank 1 waits in the RL steps in which rank 0 takes longer, and the other way round.
    assert two_ranks[1]["idle"][1] > 0.8 > two_ranks[0]["idle"][1]
    assert two_ranks[0]["idle"][3] > 0.8 > two_ranks[1]["idle"][3]


def test_the_timeline_shows_idle_training_between_the_ends_of_two_rollouts(
    two_ranks: list[dict[str, Any]],
) -> None:
    """In the step that it belongs to, and hardly any time without it."""
    for rl_step, waiting in ((2, 1), (4, 0)):
        events = [e for e in two_ranks[0]["timeline"] if e["args"]["rl_step"] == rl_step]
        ends = [
            max(span_of(e).end_s for e in events if e["pid"] == rank and e["name"] == "reward")
            for rank in (0, 1)
        ]
        own = [e for e in events if e["pid"] == waiting]
        update = next(span_of(e) for e in own if e["name"] == "update")
        idle = [
            one
            for e in own
            if e["name"] == "drafter" and (one := span_of(e)).start_s < update.start_s
        ]
        # Until the last rank has told the board, just after it has scored.
        assert ends[waiting] <= idle[0].start_s < idle[-1].start_s < ends[1 - waiting] + 0.2
        waits = sum(e["dur"] / 1e6 for e in own if e["name"] == "waiting")
        assert waits < 0.5 * (ends[1 - waiting] - ends[waiting])


def test_ranks_draw_from_their_buffers_by_seeds_of_their_own() -> None:
    assert seed_of_rank(7, 0) == 7
    seeds = [seed_of_rank(7, rank) for rank in range(100)]
    assert len(set(seeds)) == 100
    assert seeds == [seed_of_rank(7, rank) for rank in range(100)]
    assert seed_of_rank(8, 1) != seed_of_rank(7, 1)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


class DyingTraining(DrafterTraining):
    """Its process is killed in the middle of an idle optimizer step."""

    def _train(self) -> list[float]:
        if rank_of_process() == 1 and len(self._losses) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._train()


def run_in_which_rank_1_dies(folder: str, place: str) -> None:
    """Writes what rank 0 raises, once its Trainer has ended."""
    kind = DyingTraining if place == "training" else DrafterTraining
    training = kind(learning_rate=6e-3, steps_per_batch=1, tokens_per_step=128)
    data = make_data(NUM_STEPS, rank_timeout_s=60.0)
    data.engine.delays = ((1.0, 0.0),) if place == "training" else ()
    if place == "generating" and rank_of_process() == 1:
        data.engine.dies_in_call = 2
    checkpoint = StepCheckpoint(every_n_steps=1)
    error = raised(lambda: fit(folder, training, data, others=(checkpoint,), num_ranks=2))
    (Path(folder) / f"raised{rank_of_process()}").write_text(" ".join(error))
    os._exit(0)


@pytest.mark.parametrize("place", ["training", "generating"])
def test_a_rank_that_is_killed_ends_the_run_with_its_name(tmp_path: Path, place: str) -> None:
    """The other rank's Trainer raises, and ends, without waiting for a dead one to save with it."""
    with pytest.raises(AssertionError, match=r"exit statuses \[0, -9\]"):
        run_ranks(run_in_which_rank_1_dies, tmp_path, str(tmp_path), place)
    message = (tmp_path / "raised0").read_text()
    assert message.startswith("RankError")
    assert "rank 1 has ended without a word" in message
    last = "in idle work" if place == "training" else "generating"
    assert f"last wrote '{last}'" in message
    assert list(tmp_path.rglob("last.ckpt"))  # of a whole step before


class DyingInUpdate(Callback):
    """Kills a rank between a rollout and its update, where the others wait in a collective."""

    def __init__(self, victim: int) -> None:
        self.victim = victim

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.rl_step == 1 and trainer.global_rank == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)


def run_in_which_a_rank_dies_in_an_update(folder: str, victim: int) -> None:
    others = (DyingInUpdate(victim),)
    error = raised(
        lambda: fit(folder, make_training(), make_data(NUM_STEPS), others=others, num_ranks=2)
    )
    (Path(folder) / f"raised{rank_of_process()}").write_text(" ".join(error))
    os._exit(0)


@pytest.mark.parametrize(
    ("victim", "told"),
    [(0, "Rank 0 keeps it"), (1, "rank 1 has ended: it last wrote 'done' in rollout 2")],
)
def test_an_error_of_a_collective_names_the_rank_that_was_killed(
    tmp_path: Path, victim: int, told: str
) -> None:
    with pytest.raises(AssertionError, match="exit statuses"):
        run_ranks(run_in_which_a_rank_dies_in_an_update, tmp_path, str(tmp_path), victim)
    message = (tmp_path / f"raised{1 - victim}").read_text()
    assert told.lower() in message.lower()
    assert "resume with --ckpt_path last" in message


class FailingTraining(DrafterTraining):
    """Raises in idle time, on one rank."""

    def _train_while_idle(self, window: IdleWindow) -> None:
        super()._train_while_idle(window)
        if rank_of_process() == 1 and self.version == 1:
            raise FloatingPointError("loss nan")


def run_in_which_rank_1_fails(folder: str) -> tuple[str, str]:
    training = FailingTraining(publish_every_n_steps=1, tokens_per_step=128, steps_per_batch=1)
    data = make_data(NUM_STEPS, rank_timeout_s=60.0)
    data.engine.delays = ((0.5, 0.0),)
    checkpoint = StepCheckpoint(every_n_steps=1)
    return raised(lambda: fit(folder, training, data, others=(checkpoint,), num_ranks=2))


def test_an_error_in_idle_training_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(run_in_which_rank_1_fails, tmp_path, str(tmp_path))
    assert second[0] == "FloatingPointError"
    assert first[0] == "RankError"
    assert "rank 1 failed with FloatingPointError: loss nan" in first[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": ()}, "when must be one or more of idle, batch_end, got \\[\\]"),
        ({"when": ("overlap",)}, "one or more of idle, batch_end, got \\['overlap'\\]"),
        ({"min_idle_ranks": 0}, "min_idle_ranks must be >= 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_training(**options)


def test_more_idle_ranks_than_there_are_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_idle_ranks 2 of 1 ranks are never idle"):
        fit(str(tmp_path), make_training(min_idle_ranks=2), make_data(1))


class SavedAt(Callback):
    """A checkpoint after the given RL steps, of all callbacks' work on them."""

    def __init__(self, *rl_steps: int) -> None:
        self.rl_steps = rl_steps

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.rl_step in self.rl_steps:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"step-{module.rl_step}.ckpt")


def reproducible_run(
    folder: str, num_ranks: int, num_steps: int, ckpt_path: str | None, saves_at: tuple[int, ...]
) -> dict[str, Any]:
    """Without idle time, whose steps depend on the clock."""
    training = make_training(when=("batch_end",), steps_per_batch=2)
    begun: dict[str, Any] = {}

    class Begin(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not begun:
                begun.update(state_of(training))

    recorder, _ = fit(
        folder,
        training,
        make_data(num_steps),
        others=(Begin(), SavedAt(*saves_at)),
        num_ranks=num_ranks,
        ckpt_path=ckpt_path,
    )
    return {"begun": begun, "ended": state_of(training), "published": recorder.published}


def state_of(training: DrafterTraining) -> dict[str, Any]:
    return {
        "weights": {name: one.clone() for name, one in training._learner().weights().items()},
        "buffer": training.buffer.state_dict()["tokens"],
        "generator": training._generator.get_state(),
        "version": training.version,
        "steps": training._unpublished_steps,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for name in ("buffer", "generator"):
        assert torch.equal(one[name], other[name]), name
    assert (one["version"], one["steps"]) == (other["version"], other["steps"])


@pytest.fixture(scope="module")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of two ranks over five RL steps, saved after the third: one after a publication."""
    folder = tmp_path_factory.mktemp("resumable")
    ranks = run_ranks(reproducible_run, folder / "whole", str(folder), 2, 5, None, (1, 2, 3))
    return folder, ranks


def test_a_resumed_run_of_two_ranks_goes_on_with_each_ranks_own_state(
    resumable: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, whole = resumable
    assert not torch.equal(
        whole[0]["ended"]["weights"]["fc.weight"], whole[1]["ended"]["weights"]["fc.weight"]
    )
    path = str(folder / "step-3.ckpt")
    resumed = run_ranks(reproducible_run, folder / "again", str(folder / "new"), 2, 5, path, ())
    for rank, again in zip(whole, resumed, strict=True):
        assert_same(rank["ended"], again["ended"])
    names = sorted(path.name for path in folder.rglob("drafter-step*"))
    # Those of the last checkpoint, and of the one before it, which last.ckpt would need.
    assert names == ["drafter-step2-rank1.ckpt", "drafter-step3-rank1.ckpt"]


def run_with_lightnings_checkpoints(folder: str) -> None:
    saver = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit(folder, make_training(), make_data(4), others=(saver,), num_ranks=2)


def test_no_file_of_a_rank_is_deleted_where_lightning_names_checkpoints(tmp_path: Path) -> None:
    run_ranks(run_with_lightnings_checkpoints, tmp_path / "ranks", str(tmp_path / "run"))
    assert len(list((tmp_path / "run").rglob("epoch=*.ckpt"))) == 4
    names = sorted(path.name for path in (tmp_path / "run").rglob("drafter-step*"))
    assert names == [f"drafter-step{step}-rank1.ckpt" for step in (1, 2, 3, 4)]


def test_one_rank_goes_on_with_what_two_had_in_common(
    resumable: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, whole = resumable
    with pytest.warns(UserWarning, match="a run on 2 ranks. All ranks go on with the drafter"):
        run = reproducible_run(str(tmp_path), 1, 4, str(folder / "step-3.ckpt"), ())
    for name, weight in whole[0]["published"][2].items():
        assert torch.equal(run["begun"]["weights"][name], weight)
    assert run["begun"]["steps"] == 0
    assert len(run["begun"]["buffer"]) > 0


def test_two_ranks_go_on_with_the_drafter_of_one(tmp_path: Path) -> None:
    reproducible_run(str(tmp_path), 1, 4, None, (3,))
    path = str(tmp_path / "step-3.ckpt")
    saved = AtomicCheckpointIO().load_checkpoint(path)["callbacks"]["DrafterTraining"]
    first, second = run_ranks(
        reproducible_run, tmp_path / "two", str(tmp_path / "new"), 2, 4, path, ()
    )
    assert saved["unpublished_steps"] > 0
    for name, weight in saved["drafter"].items():
        assert torch.equal(first["begun"]["weights"][name], weight)
        assert torch.equal(second["begun"]["weights"][name], weight)
        assert torch.equal(first["ended"]["weights"][name], second["ended"]["weights"][name])
    assert not torch.equal(first["begun"]["generator"], second["begun"]["generator"])


def test_a_missing_file_of_a_rank_is_named(
    resumable: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = resumable
    path = str(folder / "step-1.ckpt")  # whose file is gone: no checkpoint of the run needs it
    with pytest.raises(AssertionError, match=r"in drafter-step1-rank1\.ckpt, which is neither in"):
        run_ranks(reproducible_run, tmp_path, str(tmp_path / "new"), 2, 4, path, ())
