"""A tiny random Llama on disk, hand-made rollout batches, and a datamodule that serves them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.types import RolloutBatch, SamplingParams

VOCAB_SIZE = 24

Row = tuple[Sequence[int], Sequence[int]]  # prompt, response
MakeBatch = Callable[..., RolloutBatch]
Fit = Callable[..., Trainer]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with attention dropout in its configuration, which training must ignore."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=dtype) for row in rows], batch_first=True
    )


def padded_batch(
    rows: Sequence[Row],
    rewards: Sequence[float],
    groups: Sequence[int],
    version: int = 0,
    sampling: SamplingParams | None = None,
    rollout_logprobs: Sequence[Sequence[float]] | None = None,
) -> RolloutBatch:
    """Of (prompt, response) pairs."""
    given = rollout_logprobs or [[-1.0] * len(response) for _, response in rows]
    return RolloutBatch(
        tokens_BT=_pad([[*prompt, *response] for prompt, response in rows], torch.int64),
        attention_mask_BT=_pad([[1] * (len(p) + len(r)) for p, r in rows], torch.bool),
        response_mask_BT=_pad([[0] * len(p) + [1] * len(r) for p, r in rows], torch.bool),
        rollout_logprobs_BT=_pad(
            [[0.0] * len(p) + list(lp) for (p, _), lp in zip(rows, given, strict=True)],
            torch.float32,
        ),
        rewards_B=torch.tensor(rewards, dtype=torch.float32),
        group_B=torch.tensor(groups),
        is_truncated_B=torch.zeros(len(rows), dtype=torch.bool),
        policy_version_B=torch.full((len(rows),), version),
        sampling=sampling or SamplingParams(max_tokens=16),
        rl_step=version,
    )


@pytest.fixture
def make_batch() -> MakeBatch:
    """Builds a RolloutBatch from (prompt, response) pairs."""
    return padded_batch


ROWS: list[Row] = [
    ([1, 2, 3], [4, 5]),
    ([1, 2, 3], [6, 7, 8, 9, 10, 11]),
    ([1, 2, 3], [12]),
    ([13, 14], [15, 16, 17]),
    ([13, 14], [18, 19, 20, 21]),
    ([13, 14], [22, 23, 3, 4, 5]),
]
REWARDS = [1.0, 0.0, 0.25, 0.0, 1.0, 0.5]
GROUPS = [0, 0, 0, 1, 1, 1]


@pytest.fixture
def ragged_batch(make_batch: MakeBatch) -> MakeBatch:
    """Two groups of three rows of different lengths."""

    def make(version: int = 0, sampling: SamplingParams | None = None) -> RolloutBatch:
        return make_batch(ROWS, REWARDS, GROUPS, version, sampling)

    return make


class _Batches(LightningDataModule):
    def __init__(self, train: Sequence[RolloutBatch], held_out: Sequence[RolloutBatch]) -> None:
        super().__init__()
        self._train, self._held_out = train, held_out

    def train_dataloader(self) -> DataLoader[RolloutBatch]:
        return DataLoader(self._train, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[RolloutBatch]:
        return DataLoader(self._held_out, batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader

    def transfer_batch_to_device(
        self, batch: RolloutBatch, device: torch.device, dataloader_idx: int
    ) -> RolloutBatch:
        return batch.to(device)


def fit_batches(
    module: LightningModule,
    folder: Path,
    train: Sequence[RolloutBatch] = (),
    held_out: Sequence[RolloutBatch] = (),
    verb: str = "fit",
    ckpt_path: str | None = None,
    **kwargs: object,
) -> Trainer:
    """Runs `Trainer.fit` (or another verb) over batches; returns the trainer."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "limit_val_batches": len(held_out),
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    trainer = Trainer(**(defaults | kwargs))  # type: ignore[arg-type]
    data = _Batches(train, held_out)
    getattr(trainer, verb)(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """`fit_batches` in a temporary folder."""

    def run(module: LightningModule, *args: Any, **kwargs: Any) -> Trainer:
        return fit_batches(module, tmp_path, *args, **kwargs)

    return run
