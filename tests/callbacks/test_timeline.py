"""The trace read back, the picture's colours, and a run of two processes, one of which waits."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.callbacks import Timeline
from fastrl.callbacks.timeline_picture import picture
from fastrl.callbacks.timeline_spans import RankStep
from fastrl.callbacks.timeline_trace import append_step, read, span_of
from fastrl.callbacks.timeline_trace import events as trace_events
from fastrl.types import EngineStats, RolloutBatch, Span
from tests.callbacks.test_timeline_spans import rank, span
from tests.fake_run import FakePolicy, FakeRollouts, make_batch

ORANGE = (255, 127, 14)


class TimedPolicy(FakePolicy):
    """Its update takes a while."""

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        started = time.perf_counter()
        time.sleep(0.02)
        super().training_step(batch, batch_idx)
        seconds = time.perf_counter() - started
        self._spans = (Span(name="update", start_s=started, seconds=seconds),)


class TimedRollouts(FakeRollouts):
    """Rank 1 generates for longer than rank 0, which then waits."""

    training: Training

    def make(self) -> RolloutBatch:
        assert self.trainer is not None
        started = time.perf_counter()
        seconds = 0.1 + 0.3 * self.trainer.global_rank
        spans = (
            Span(name="prefill", start_s=started, seconds=0.05),
            Span(name="4_2_8", start_s=started + 0.05, seconds=seconds - 0.05),
        )
        time.sleep(seconds)
        rollout = Span(name="rollout", start_s=started, seconds=time.perf_counter() - started)
        waits = self.trainer.world_size > 1 and self.trainer.is_global_zero
        if waits and self.trainer.training:
            # While it waits: when the step before is not complete yet.
            self.training.spans += (Span(name="drafter", start_s=rollout.end_s, seconds=0.15),)
        self.trainer.strategy.barrier()  # as the update would wait
        batch = make_batch(EngineStats(spans=spans))
        rl_step = self.trainer.lightning_module.rl_step
        return dataclasses.replace(batch, spans=(rollout,), rl_step=rl_step)


class Training(Callback):
    """What it did in half of the time that rank 0 waits."""

    spans: tuple[Span, ...] = ()

    def take_spans(self) -> tuple[Span, ...]:
        spans, self.spans = self.spans, ()
        return spans


def fit(folder: Path, num_steps: int, *, devices: int = 1, **options: Any) -> None:
    data, training = TimedRollouts("tiny", num_steps=num_steps), Training()
    data.training = training
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=1,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder),
        callbacks=[Timeline(**options), training],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(TimedPolicy("tiny"), datamodule=data)


def trace_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("timeline.json")
    return [event for event in read(path) if event["ph"] == "X"]


def test_every_step_is_in_the_trace_with_all_that_took_time(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    events = trace_of(tmp_path)
    assert {event["args"]["rl_step"] for event in events} == {1, 2, 3}
    second = [event for event in events if event["args"]["rl_step"] == 2]
    assert [event["name"] for event in second] == ["rollout", "update", "prefill", "4_2_8"]
    assert {event["name"]: event["cat"] for event in second} == {
        "rollout": "loop",
        "update": "loop",
        "prefill": "engine",
        "4_2_8": "engine",
    }
    assert abs(second[0]["ts"] / 1e6 - time.time()) < 60


def test_steps_in_between_are_left_out(tmp_path: Path) -> None:
    fit(tmp_path, 5, every_n_steps=2)
    assert {event["args"]["rl_step"] for event in trace_of(tmp_path)} == {1, 3, 5}


def test_two_ranks_are_side_by_side_and_what_they_waited_is_logged(tmp_path: Path) -> None:
    fit(tmp_path, 2, devices=2)
    events = trace_of(tmp_path)
    assert {event["pid"] for event in events} == {0, 1}
    ends = {
        event["pid"]: span_of(event).end_s
        for event in events
        if event["name"] == "4_2_8" and event["args"]["rl_step"] == 2
    }
    assert 0.2 < ends[1] - ends[0] < 3
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    scalars = EventAccumulator(str(log)).Reload()
    before, after = (
        [event.value for event in scalars.Scalars(f"idle/share_{name}")]
        for name in ("before", "after")
    )
    assert len(before) == 2
    assert all(0.1 < share < 0.5 for share in before)
    assert all(low < high for low, high in zip(after, before, strict=True))
    for rl_step in (1, 2):
        own = {
            event["name"]: span_of(event)
            for event in events
            if event["pid"] == 0 and event["args"]["rl_step"] == rl_step
        }
        assert own["rollout"].end_s - 1e-3 < own["drafter"].start_s < own["update"].start_s
    assert scalars.Images("timeline")


def test_a_trace_is_what_perfetto_reads_and_survives_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "timeline.json"
    ranks = [rank(11), rank(5, ((6, 8),), clock=3)]
    append_step(path, ranks, 1)
    append_step(path, ranks, 2)
    text = path.read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert {event["ph"] for event in events} == {"M", "X"}
    assert sum(event["ph"] == "M" for event in events) == 2 * (1 + 3)
    drafter = next(event for event in events if event["name"] == "drafter")
    assert (drafter["ts"], drafter["dur"], drafter["pid"]) == (6e6, 2e6, 1)
    waiting = [event for event in events if event["name"] == "waiting"]
    assert [(event["ts"], event["dur"]) for event in waiting[:2]] == [(5e6, 1e6), (8e6, 3e6)]
    path.write_text(text[:-20])
    assert len(read(path)) == len(events) - 1


@pytest.mark.parametrize("num_bytes_left", [1, 40, -1, -20])
def test_a_resumed_run_goes_on_behind_a_line_that_was_not_finished(
    tmp_path: Path, num_bytes_left: int
) -> None:
    """Killed while it wrote, in the first line, in a later one, or before a line's end."""
    path = tmp_path / "timeline.json"
    append_step(path, [rank(11)], 1)
    path.write_bytes(path.read_bytes()[:num_bytes_left])
    whole = [event for event in read(path) if event["ph"] == "X"][: 0 if num_bytes_left > 0 else 99]
    append_step(path, [rank(11)], 2)
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert events == read(path)
    steps = [event["args"]["rl_step"] for event in events if event["ph"] == "X"]
    assert steps.count(1) in (len(whole), len(whole) - 1)
    assert steps.count(2) == len(list(trace_events([rank(11)], 2)))


def share_of(image_HWC: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float(np.mean(np.abs(image_HWC.astype(int) - colour).sum(-1) < 10))


def test_the_picture_shows_training_where_there_was_some() -> None:
    trained = picture([rank(11), rank(5, ((5, 11),))], 3)
    untrained = picture([rank(11), rank(5)], 3)
    assert trained.dtype == np.uint8
    assert trained.shape[2] == 3
    assert share_of(trained, ORANGE) > 0.01
    assert share_of(untrained, ORANGE) == 0


@pytest.mark.parametrize("num_ranks", [1, 130])
def test_any_number_of_ranks_is_drawn(num_ranks: int) -> None:
    image_HWC = picture([rank(5 + number / 30, ((9, 10),)) for number in range(num_ranks)], 1)
    assert image_HWC.shape[0] < 5000


def test_what_some_other_callback_did_is_drawn_too() -> None:
    other = RankStep(
        clock_offset_s=0,
        phases=rank(5).phases,
        engine=rank(5).engine,
        drafter=(span("evaluation", 12, 19),),
    )
    assert picture([other], 1).size


def test_every_step_at_least() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        Timeline(every_n_steps=0)
