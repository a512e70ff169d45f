"""Histograms read back from the event file, bin by bin, against counts by hand."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.callbacks.rollout_histograms import RolloutHistograms, histograms, integer_bins
from fastrl.types import FinishReason, Prompt, Rollout, RolloutBatch
from tests.fake_run import FakePolicy, FakeRollouts, make_batch

PROMPT = Prompt(prompt_id=0, tokens=(0,), text="?", answer="")


def rollout(accept_lengths: tuple[int, ...], num_verify_steps: int) -> Rollout:
    length = 1 + sum(accept_lengths)
    return Rollout(
        prompt=PROMPT,
        sample_index=0,
        tokens=(0,) * length,
        logprobs=(0.0,) * length,
        text="",
        finish_reason=FinishReason.STOP,
        policy_version=0,
        accept_lengths=accept_lengths,
        num_verify_steps=num_verify_steps,
    )


def batch_of(*rollouts: Rollout) -> RolloutBatch:
    lengths = tuple(len(one.tokens) for one in rollouts)
    batch = make_batch(
        lengths=lengths,
        rewards=(0.0,) * len(rollouts),
        truncated=(False,) * len(rollouts),
        failures=(None,) * len(rollouts),
    )
    return dataclasses.replace(batch, rollouts=rollouts)


SPECULATING = batch_of(rollout((4, 1, 1), 1), rollout((1, 3), 2), rollout((1,), 0))
PLAIN = batch_of(rollout((1, 1), 0))


class Rollouts(FakeRollouts):
    """The same rollouts at every step."""

    batch = SPECULATING

    def make(self) -> RolloutBatch:
        return self.batch


def fit(logger: TensorBoardLogger | CSVLogger) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=logger,
        callbacks=[RolloutHistograms()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FakePolicy("tiny"), datamodule=Rollouts("tiny", num_steps=2))


def test_the_event_file_holds_every_length_at_its_rl_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    for tag, expected in {
        "rollout/response_lengths": {2: 1, 5: 1, 7: 1},
        "rollout/accept_lengths": {1: 4, 3: 1, 4: 1},
    }.items():
        written = events.Histograms(tag)
        assert [event.step for event in written] == [1, 2]
        value = written[-1].histogram_value
        counts = zip(value.bucket_limit, value.bucket, strict=True)
        assert {limit - 0.5: count for limit, count in counts if count} == expected


def test_accept_lengths_are_those_of_steps_that_speculated() -> None:
    assert set(histograms(PLAIN)) == {"rollout/response_lengths"}
    assert histograms(SPECULATING)["rollout/accept_lengths"] == [4, 1, 1, 1, 3, 1]


@pytest.mark.parametrize("values", [[5], [1, 64], [1, 65], [3, 20_000], [7, 7]])
def test_bins_hold_whole_lengths_from_the_shortest_to_the_longest(values: list[int]) -> None:
    edges = integer_bins(values)
    assert edges[0] == min(values) - 0.5
    assert edges[-1] > max(values)
    assert len({after - before for before, after in pairwise(edges)}) == 1
    assert 1 <= len(edges) - 1 <= 64


def test_another_logger_gets_none_and_is_no_error(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path))
    assert [*tmp_path.rglob("*.tfevents.*")] == []
    assert [*tmp_path.rglob("metrics.csv")] == []
