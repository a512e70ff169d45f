"""Samples read back from the event file, and seen as TensorBoard shows them; which are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastrl.callbacks.text_samples import TAG, TextSamples, chosen_rows
from fastrl.types import FinishReason, Prompt, RewardResult, Rollout, RolloutBatch
from tests.fake_run import FakePolicy, FakeRollouts, make_batch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (5, 3, 9, 4, 1, 6)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def rollout(row: int, length: int) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=row, tokens=(0,), text=f"*question* <{row}>", answer=""),
        sample_index=0,
        tokens=tuple(range(length)),
        logprobs=(0.0,) * length,
        text=LETTERS[:length],
        finish_reason=FinishReason.STOP,
        policy_version=0,
        accept_lengths=(length - 1,) if length > 1 else (),
        num_verify_steps=length > 1,
    )


class Rollouts(FakeRollouts):
    """Responses of LENGTHS, each of one decode step."""

    tokenizer = make_tokenizer()

    def make(self) -> RolloutBatch:
        count = len(LENGTHS)
        batch = make_batch(
            lengths=LENGTHS,
            rewards=(0.0,) * count,
            truncated=(False,) * count,
            failures=(None,) * count,
        )
        return dataclasses.replace(
            batch,
            rollouts=tuple(rollout(row, length) for row, length in enumerate(LENGTHS)),
            reward_results=tuple(
                RewardResult(score=row / 4, failure="timeout" if row == 2 else None)
                for row in range(count)
            ),
        )


def fit(logger: TensorBoardLogger | CSVLogger, num_steps: int, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=logger,
        callbacks=[TextSamples(**options)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FakePolicy("tiny"), datamodule=Rollouts("tiny", num_steps=num_steps))


def texts(folder: str) -> dict[int, str]:
    """Markdown by step."""
    events = EventAccumulator(folder, size_guidance={"tensors": 0})
    events.Reload()
    return {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors(f"{TAG}/text_summary")
    }


def test_the_event_file_shows_prompts_responses_rewards_and_drafts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(logger, num_steps=1, num_samples=2)
    (text,) = texts(logger.log_dir).values()
    longest, shortest = markdown_to_safe_html(text).split("<hr>")
    assert "<strong>bcdefgh</strong>" in longest
    assert ">a<strong>bcdefgh</strong>i<" in longest
    assert "reward 0.5 (timeout), 9 tokens in 1 decode steps, ended by stop; prompt 2" in longest
    assert "<blockquote>*question* &lt;2&gt;</blockquote>" in longest
    assert "<p>a</p>" in shortest
    assert "reward 1, 1 tokens in 0 decode steps" in shortest


def test_samples_are_shown_every_n_steps_from_the_first_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(logger, num_steps=7, every_n_steps=3)
    assert sorted(texts(logger.log_dir)) == [1, 4, 7]


def test_another_logger_gets_none_and_is_no_error(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path), num_steps=1)
    assert [*tmp_path.rglob("*.tfevents.*")] == []
    assert [*tmp_path.rglob("metrics.csv")] == []


def test_longest_and_shortest_come_first_and_no_row_twice() -> None:
    batch = Rollouts("tiny").make()
    assert chosen_rows(batch, 2) == [2, 4]
    assert chosen_rows(batch, 4) == [2, 4, 0, 1]
    assert chosen_rows(batch, 99) == [2, 4, 0, 1, 3, 5]


@pytest.mark.parametrize(
    "options", [{"every_n_steps": 0}, {"num_samples": 1}, {"max_tokens": 1}], ids=str
)
def test_counts_are_checked(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"TextSamples: {name} must be >= {value + 1}"):
        TextSamples(**options)
