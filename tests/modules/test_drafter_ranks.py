"""Warm-up on two real processes: averaged gradients, one drafter, and exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import AutoConfig

from fastrl.rollout.drafters.packing import PackedFeatures
from fastrl.rollout.drafters.training import row_loss
from fastrl.rollout.drafters.vocabulary import frequent_tokens
from tests.rollout.ranks import run_ranks
from tests.warmup_runs import POLICY, make_data, make_module, make_trainer


class Rows(Callback):
    """Keeps the rows of a rank, the gradients of its first step, and a checkpoint of the second."""

    def __init__(self) -> None:
        self.rows: list[PackedFeatures] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append(batch)
        if module.rl_step == 1:
            named = module.drafter.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named}
        if module.rl_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "kept.ckpt")


def warm_up(folder: str, ckpt_path: str | None) -> dict[str, Any]:
    """On one rank of two: four steps, or those after the checkpoint."""
    torch.set_num_threads(1)
    root, rows = Path(folder), Rows()
    module = make_module(root)
    trainer = make_trainer(
        root, [rows], strategy="ddp", devices=2, has_checkpoints=False, val_check_interval=4
    )
    trainer.fit(
        module,
        datamodule=make_data(root, num_steps=4, cache_folder=str(root / "cache")),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return {
        "rows": rows.rows,
        "gradients": rows.gradients,
        "weights": {name: w.detach() for name, w in module.drafter.named_weights()},
        "held_out": {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith("warmup/held_out")
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_data(folder)  # writes the responses before both ranks read them
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(warm_up, folder / "whole", str(folder), None)


def test_gradients_are_means_over_the_ranks_rows(whole: list[dict[str, Any]], folder: Path) -> None:
    module = make_module(folder)
    module.configure_model()
    for rank in whole:
        loss = row_loss(module.drafter, module.target, rank["rows"][0], module.loss_settings).loss
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(module.drafter.parameters(), 1.0)
    for name, parameter in module.drafter.named_parameters():
        for rank in whole:
            torch.testing.assert_close(
                rank["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
            )


def test_ranks_train_on_different_rows_and_end_with_one_drafter(
    whole: list[dict[str, Any]],
) -> None:
    first, second = whole
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert one.hidden_BTD.shape != other.hidden_BTD.shape or not torch.equal(
            one.hidden_BTD, other.hidden_BTD
        )
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert first["held_out"] == second["held_out"]


def test_held_out_figures_are_over_all_ranks_prompts(
    whole: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    module = make_module(tmp_path, drafter_path=str(folder / "drafter"))
    (metrics,) = make_trainer(tmp_path, has_checkpoints=False).validate(
        module, datamodule=make_data(tmp_path)
    )
    metrics.pop("step")
    assert "warmup/held_out_accept_length_top1" in metrics
    assert whole[0]["held_out"] == pytest.approx(metrics, rel=1e-5)


def test_a_resumed_run_of_two_ranks_ends_with_the_same_weights_to_the_bit(
    whole: list[dict[str, Any]], folder: Path
) -> None:
    resumed = run_ranks(warm_up, folder / "resumed", str(folder), str(folder / "kept.ckpt"))
    for rank, again in zip(whole, resumed, strict=True):
        assert len(again["rows"]) == 2
        for row, expected in zip(again["rows"], rank["rows"][2:], strict=True):
            assert torch.equal(row.next_tokens_BT, expected.next_tokens_BT)
        for name, weight in rank["weights"].items():
            assert torch.equal(weight, again["weights"][name]), name


def test_a_checkpoint_of_two_ranks_is_refused_on_one(
    whole: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, has_checkpoints=False)
    with pytest.raises(ValueError, match="a run on 2 ranks, this one has 1"):
        trainer.fit(
            make_module(tmp_path),
            datamodule=make_data(tmp_path),
            ckpt_path=str(folder / "kept.ckpt"),
            weights_only=True,
        )


def vocabulary_of(folder: str) -> dict[str, Any]:
    """On one rank of two, after a step."""
    torch.set_num_threads(1)
    root = Path(folder)
    module = make_module(
        root,
        output=str(root / "trimmed"),
        drafter_path=None,
        kind="eagle3",
        draft_vocab_size=20,
    )
    trainer = make_trainer(root, strategy="ddp", devices=2, has_checkpoints=False)
    data = make_data(root, num_steps=1)
    trainer.fit(module, datamodule=data)
    own = [data._maker.given(prompt) for prompt in data._prompts["train"]]
    return {
        "tokens": [one.tokens_T[one.num_prompt_tokens :].tolist() for one in own],
        "token_map": module.drafter.token_map_F.tolist(),
        "weights": {name: w.detach() for name, w in module.drafter.named_weights()},
    }


def test_ranks_choose_one_draft_vocabulary_by_all_their_responses(folder: Path) -> None:
    first, second = run_ranks(vocabulary_of, folder / "vocabulary", str(folder))
    config = AutoConfig.from_pretrained(POLICY)
    expected = frequent_tokens(
        first["tokens"] + second["tokens"],
        vocab_size=config.vocab_size,
        size=20,
        always=[config.eos_token_id],
    )
    assert first["token_map"] == second["token_map"] == list(expected.token_ids)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
