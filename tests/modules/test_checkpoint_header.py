"""A checkpoint of another run is refused with the reason, before weights are loaded or made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.modules import GRPO, Reinforce
from fastrl.modules.checkpoint_header import FORMAT, KEY

MakeBatch = Callable[..., Any]
Fit = Callable[..., Any]


@pytest.fixture
def checkpoint(model_folder: str, ragged_batch: MakeBatch, fit: Fit, tmp_path: Path) -> str:
    """Of a GRPO run of one RL step."""
    path = str(tmp_path / "grpo.ckpt")
    fit(GRPO(model_folder), [ragged_batch(0)]).save_checkpoint(path)
    return path


def rewrite(path: str, change: Callable[[dict[str, Any]], None]) -> None:
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def test_a_checkpoint_of_another_model_is_refused(
    checkpoint: str, ragged_batch: MakeBatch, fit: Fit, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    module = GRPO(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is of another model") as error:
        fit(module, [ragged_batch(1)], ckpt_path=checkpoint)
    assert "hidden_size 16 instead of 32" in str(error.value)
    assert "num_hidden_layers 2 instead of 3" in str(error.value)
    assert module.rl_step == 0


def test_heads_that_fit_the_same_weights_are_another_model(
    checkpoint: str, model_folder: str, ragged_batch: MakeBatch, fit: Fit
) -> None:
    """Shapes agree, so that loading the weights would not notice."""

    def other_heads(saved: dict[str, Any]) -> None:
        saved[KEY]["policy"]["num_attention_heads"] = 8

    rewrite(checkpoint, other_heads)
    with pytest.raises(ValueError, match="num_attention_heads 8 instead of 4"):
        fit(GRPO(model_folder), [ragged_batch(1)], ckpt_path=checkpoint)


def test_another_algorithm_may_evaluate_but_not_go_on(
    checkpoint: str, model_folder: str, ragged_batch: MakeBatch, fit: Fit
) -> None:
    with pytest.raises(ValueError, match=r"run of fastrl\.modules\.grpo\.GRPO, this one is of"):
        fit(Reinforce(model_folder), [ragged_batch(1)], ckpt_path=checkpoint)
    batch = ragged_batch(1)
    trainer = fit(Reinforce(model_folder), held_out=[batch], verb="validate", ckpt_path=checkpoint)
    assert trainer.callback_metrics["reward/held_out"] == batch.rewards_B.mean()


@pytest.mark.parametrize(
    ("written", "fix"), [(FORMAT + 1, "or a newer one"), (FORMAT - 1, "or start anew")]
)
def test_another_format_is_refused(
    checkpoint: str,
    model_folder: str,
    ragged_batch: MakeBatch,
    fit: Fit,
    written: int,
    fix: str,
) -> None:
    """A newer one, and an older one: parts of the state would be missing or misunderstood."""
    rewrite(checkpoint, lambda saved: saved[KEY].update(format=written))
    module = GRPO(model_folder)
    message = f"has format {written}, this version of FastRL reads {FORMAT}: .*wrote it, {fix}"
    with pytest.raises(ValueError, match=message):
        fit(module, [ragged_batch(1)], ckpt_path=checkpoint)
    assert module.rl_step == 0


def test_a_foreign_file_is_refused(
    checkpoint: str, model_folder: str, ragged_batch: MakeBatch, fit: Fit
) -> None:
    rewrite(checkpoint, lambda saved: saved.pop(KEY))
    with pytest.raises(ValueError, match="no FastRL header"):
        fit(GRPO(model_folder), [ragged_batch(1)], ckpt_path=checkpoint)
