"""Every checkpoint of a run leads to the rest of that run; a policy that is gone is not saved."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from fastrl.callbacks.step_checkpoint import StepCheckpoint
from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.checkpoint_io import AtomicCheckpointIO
from fastrl.types import RolloutBatch
from tests.fake_run import FakeLoader, FakePolicy, FakeRollouts

Event = tuple[str, int, float]


class Policy(FakePolicy):
    """Its only weight grows by one each RL step."""

    def __init__(self) -> None:
        super().__init__("tiny")
        torch.nn.init.zeros_(self.weights.weight)
        self.poison_at = 0
        self.fail_mid_update_at = 0

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.is_updating = True
        self.optimizers().step()  # type: ignore[union-attr]
        if self.rl_step + 1 == self.fail_mid_update_at:
            raise RuntimeError("half-way")
        with torch.no_grad():
            self.weights.weight += torch.nan if self.rl_step + 1 == self.poison_at else 1
        self.rl_step += 1
        self.is_updating = False

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.log("reward/held_out", float(batch_idx), on_epoch=True, batch_size=1)


class Rollouts(FakeRollouts):
    """Validates on three batches, so that stopping within a validation is possible."""

    def __init__(self, num_steps: int, before_batch: Callable[[], None] = lambda: None) -> None:
        super().__init__("tiny", num_steps)
        self.before_batch = before_batch

    def make(self) -> RolloutBatch:
        self.before_batch()
        return super().make()

    def val_dataloader(self) -> Any:
        return FakeLoader(3, self.make)


class Recorder(Callback):
    """RL steps and validations that were finished, in order; stops the run at the n-th hook."""

    def __init__(self, stop_at: int = -1, stop: BaseException | None = None) -> None:
        self.events: list[Event] = []
        self.num_hooks = 0
        self.stop_at = stop_at
        self.stop = stop

    def tick(self) -> None:
        self.num_hooks += 1
        if self.num_hooks == self.stop_at and self.stop is not None:
            raise self.stop

    def on_train_batch_start(self, *_: Any) -> None:
        self.tick()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.tick()
        self.events.append(("step", pl_module.rl_step, pl_module.weights.weight.item()))

    def on_validation_start(self, *_: Any) -> None:
        self.tick()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.tick()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tick()
        mean = trainer.callback_metrics["reward/held_out"].item()
        self.events.append(("validation", pl_module.rl_step, mean))


class CopyingIO(AtomicCheckpointIO):
    """Keeps every write of `last.ckpt`: what a SIGKILL after it would leave."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.copies: list[tuple[Path, int]] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        if path.name == "last.ckpt":
            copy = path.with_name(f"copy-{len(self.copies)}.ckpt")
            shutil.copy(path, copy)
            self.copies.append((copy, len(self.recorder.events)))


RUNS = {
    "no validation": {"num_steps": 4, "limit_val_batches": 0},
    "validation at the end": {"num_steps": 3},
    "validation on the way": {"num_steps": 5, "val_check_interval": 2},
    "validation on the way and at the end": {"num_steps": 4, "val_check_interval": 2},
    "two epochs": {"num_steps": 3, "val_check_interval": 2, "max_epochs": 2},
    "two epochs, validation at their ends": {"num_steps": 2, "max_epochs": 2},
}


def fit(
    folder: Path,
    recorder: Recorder,
    *,
    num_steps: int,
    every_n_steps: int = 1,
    ckpt_path: Path | None = None,
    policy: Policy | None = None,
    data: Rollouts | None = None,
    others: Sequence[Callback] = (),
    **settings: Any,
) -> CopyingIO:
    torch.manual_seed(0)
    plugin = CopyingIO(recorder)
    callbacks = [recorder, *others, StepCheckpoint(every_n_steps)]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[plugin],
        **{"max_epochs": 1, "logger": False, **settings},
    )
    trainer.fit(policy or Policy(), datamodule=data or Rollouts(num_steps), ckpt_path=ckpt_path)
    return plugin


def resume(folder: Path, checkpoint: Path, run: dict[str, Any]) -> list[Event]:
    recorder = Recorder()
    fit(folder, recorder, ckpt_path=checkpoint, **run)
    return recorder.events


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_every_write_leads_to_the_rest_of_the_run(tmp_path: Path, run: dict[str, Any]) -> None:
    whole = Recorder()
    copies = fit(tmp_path / "whole", whole, **run).copies
    steps = [event for event in whole.events if event[0] == "step"]
    assert len(copies) >= len(steps)
    for copy, num_events in copies:
        rest = resume(tmp_path / copy.stem, copy, run)
        assert rest == whole.events[num_events:], (copy, num_events)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_run_stopped_in_any_hook_goes_on_as_if_it_had_not_been(
    tmp_path: Path, run: dict[str, Any]
) -> None:
    """An error in the n-th hook, for every n: what was saved then leads to the rest of the run."""
    whole = Recorder()
    fit(tmp_path / "whole", whole, **run)
    for stop_at in range(1, whole.num_hooks + 1):
        folder = tmp_path / f"stopped-{stop_at}"
        stopped = Recorder(stop_at, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            fit(folder, stopped, **run)
        last = folder / "checkpoints" / "last.ckpt"
        if not last.exists():
            assert not any(event[0] == "step" for event in stopped.events)
            continue
        rest = resume(folder / "resumed", last, run)
        num_left = len(whole.events) - len(rest)
        assert rest == whole.events[num_left:], stop_at
        # Nothing that was finished is repeated: saving is at every step, and on the error. But an
        # epoch's last step is saved by the validation after it, if one is due.
        num_repeated = len(stopped.events) - num_left
        assert num_repeated == 0 or (num_repeated == 1 and "max_epochs" in run), stop_at


LONGER_RUNS = {
    "no validation": ({"num_steps": 3, "limit_val_batches": 0}, 4),
    "validation at the end": ({"num_steps": 2}, 3),
    "validation on the way": ({"num_steps": 3, "val_check_interval": 2}, 6),
    "validation on the way and at the end": ({"num_steps": 4, "val_check_interval": 2}, 5),
}


@pytest.mark.parametrize(("run", "num_steps"), LONGER_RUNS.values(), ids=LONGER_RUNS.keys())
def test_a_run_that_is_through_goes_on_when_it_is_given_more_steps(
    tmp_path: Path, run: dict[str, Any], num_steps: int
) -> None:
    """From each of its last checkpoints, as the longer run does."""
    longer = run | {"num_steps": num_steps}
    whole, through = Recorder(), Recorder()
    fit(tmp_path / "whole", whole, **longer)
    copies = fit(tmp_path / "through", through, **run).copies
    first = next(i for i, event in enumerate(whole.events) if event[1] > run["num_steps"])
    for copy, num_events in copies:
        if num_events < len(through.events):
            continue
        assert resume(tmp_path / copy.stem, copy, longer) == whole.events[first:], copy
        assert resume(tmp_path / copy.stem, copy, run) == []


class StoppingAt(Callback):
    """Ends the run after a step, as Lightning's Timer does when trainer.max_time is over."""

    def __init__(self, rl_step: int) -> None:
        self.rl_step = rl_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or pl_module.rl_step == self.rl_step


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_run_whose_time_was_over_goes_on_where_it_stopped(
    tmp_path: Path, run: dict[str, Any]
) -> None:
    """From each of the checkpoints of its last step; Lightning takes the epoch for finished."""
    whole = Recorder()
    fit(tmp_path / "whole", whole, **run)
    num_steps = run["num_steps"] * run.get("max_epochs", 1)
    for stop_at in range(1, num_steps):
        folder = tmp_path / f"stopped-{stop_at}"
        stopped = Recorder()
        copies = fit(folder, stopped, others=[StoppingAt(stop_at)], **run).copies
        assert max(event[1] for event in stopped.events) == stop_at
        first = next(i for i, event in enumerate(whole.events) if event[1] > stop_at)
        for copy, num_events in copies:
            if num_events == len(stopped.events):
                assert resume(folder / copy.stem, copy, run) == whole.events[first:], copy


def test_more_steps_an_epoch_are_taken_in_the_last_one_and_those_to_come(tmp_path: Path) -> None:
    run: dict[str, Any] = {"num_steps": 2, "max_epochs": 2, "limit_val_batches": 0}
    fit(tmp_path, Recorder(), **run)
    last = tmp_path / "checkpoints" / "last.ckpt"
    more = run | {"num_steps": 5}
    assert [e[1] for e in resume(tmp_path / "more", last, more)] == [5, 6, 7]
    limited = more | {"limit_train_batches": 3}
    assert [e[1] for e in resume(tmp_path / "limited", last, limited)] == [5]
    share = more | {"limit_train_batches": 0.6}
    assert [e[1] for e in resume(tmp_path / "share", last, share)] == [5]
    epochs = more | {"max_epochs": 3}
    assert [e[1] for e in resume(tmp_path / "epochs", last, epochs)] == [*range(5, 13)]


def test_last_is_written_every_n_steps_and_validations_are_kept(tmp_path: Path) -> None:
    recorder = Recorder()
    run = {"num_steps": 13, "val_check_interval": 3, "every_n_steps": 4}
    copies = fit(tmp_path, recorder, **run).copies
    saved = [torch.load(path, weights_only=True)["rl_step"] for path, _ in copies]
    assert saved == [3, 4, 6, 8, 9, 12, 12, 13]
    names = {path.name for path in (tmp_path / "checkpoints").glob("[ls]*")}
    assert names == {"last.ckpt", "step-9.ckpt", "step-12.ckpt"}
    assert torch.load(tmp_path / "checkpoints" / "step-9.ckpt", weights_only=True)["rl_step"] == 9


class TimelineLogger(Logger):
    """Records what it is asked, among whatever else is put on the timeline."""

    name, version = "timeline", 0

    def __init__(self, timeline: list[str]) -> None:
        super().__init__()
        self.timeline = timeline

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.timeline.append("log")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save(self) -> None:
        self.timeline.append("save")


class LoggingRecorder(Recorder):
    """Logs in its own hook, as what is not in every step is logged."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        log_step_scalars(trainer, {"early": 1.0}, pl_module.rl_step)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_loggers_are_flushed_before_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: dict[str, Any]
) -> None:
    """Of what was logged before it, a run killed after it loses nothing."""
    timeline: list[str] = []
    write = CopyingIO.save_checkpoint

    def note(self: CopyingIO, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        timeline.append("write")
        write(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CopyingIO, "save_checkpoint", note)
    copies = fit(tmp_path, LoggingRecorder(), logger=TimelineLogger(timeline), **run).copies
    assert timeline.count("write") >= len(copies) > 0
    is_flushed = True
    for event in timeline:
        assert event != "write" or is_flushed, timeline
        is_flushed = event == "save" or (is_flushed and event != "log")


def saved_step(folder: Path) -> int:
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["rl_step"])


def test_a_half_updated_policy_is_not_saved(tmp_path: Path) -> None:
    policy = Policy()
    policy.fail_mid_update_at = 3
    with (
        pytest.warns(UserWarning, match="RuntimeError within the update of RL step 2"),
        pytest.raises(RuntimeError, match="half-way"),
    ):
        fit(tmp_path, Recorder(), num_steps=5, policy=policy)
    assert saved_step(tmp_path) == 2


def test_a_step_whose_callbacks_failed_is_not_saved(tmp_path: Path) -> None:
    """The policy has the step's update, the drafter or the bandit has not."""
    stopped = Recorder(stop_at=6, stop=RuntimeError("the drafter's loss"))  # third step's end
    with (
        pytest.warns(UserWarning, match="within the update of RL step 2"),
        pytest.raises(RuntimeError, match="the drafter's loss"),
    ):
        fit(tmp_path, stopped, num_steps=5)
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize("every_n_steps", [1, 100])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, every_n_steps: int) -> None:
    """At the write that is due, and on the error that they lead to in the next rollouts."""
    policy = Policy()
    policy.poison_at = 3

    def fail_on_poison() -> None:
        if policy.weights.weight.isnan():
            raise FloatingPointError("logits are no numbers")

    data = Rollouts(6, before_batch=fail_on_poison)
    run: dict[str, Any] = {"num_steps": 6, "val_check_interval": 2, "policy": policy, "data": data}
    with (
        pytest.warns(UserWarning, match="what was saved before stands"),
        pytest.raises(FloatingPointError, match=r"weight|no numbers"),
    ):
        fit(tmp_path, Recorder(), every_n_steps=every_n_steps, **run)
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_step_waits_for_its_end_and_a_second_does_not(
    tmp_path: Path, number: signal.Signals
) -> None:
    class Signalling(Policy):
        num_signals = 1

        def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
            if self.rl_step == 2:
                self.is_updating = True
                for _ in range(self.num_signals):
                    signal.raise_signal(number)
            super().training_step(batch, batch_idx)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    waited = Recorder()
    with pytest.raises(SystemExit):
        fit(tmp_path / "once", waited, num_steps=6, every_n_steps=100, policy=Signalling())
    assert [event[1] for event in waited.events] == [1, 2, 3]
    assert saved_step(tmp_path / "once") == 3
    twice = Signalling()
    twice.num_signals = 2
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="within the update"):
        fit(tmp_path / "twice", Recorder(), num_steps=6, every_n_steps=2, policy=twice)
    assert saved_step(tmp_path / "twice") == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_between_steps_stops_at_once(tmp_path: Path) -> None:
    data = Rollouts(6)
    recorder = Recorder()

    def stop_in_fourth() -> None:
        if len(recorder.events) == 3:
            signal.raise_signal(signal.SIGTERM)

    data.before_batch = stop_in_fourth
    with pytest.raises(SystemExit):
        fit(tmp_path, recorder, num_steps=6, every_n_steps=100, data=data)
    assert saved_step(tmp_path) == 3
    assert [event[1] for event in recorder.events] == [1, 2, 3]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps >= 1 and keep >= 0, got 0 and 2"):
        StepCheckpoint(every_n_steps=0)
