"""GRPO over FSDP2 shards on two real processes, against the same updates unsharded.

Each rank has half of the groups. With the mean over sequences, and as many on each rank, what the
two of them average is what one process computes over all groups: losses, gradients, their norm and
the weights after several updates must agree up to the order of sums.

AdamW divides a gradient by its size, so what it makes of one that is nearly 0 is a matter of that
order: weights are compared tightly after updates by SGD.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig

from fastrl.modules import GRPO, OptimizerSettings
from fastrl.modules.loading import load_causal_lm
from fastrl.modules.optimization import clip_gradients
from fastrl.types import RolloutBatch, SamplingParams
from tests.modules.conftest import fit_batches, padded_batch
from tests.rollout.ranks import raised, run_ranks

POLICY = str(Path(__file__).parents[2] / "models" / "quickstart" / "policy")
NUM_STEPS = 2


class RecordingGRPO(GRPO):
    """Keeps the gradients of every update, whole, and can take its steps by SGD."""

    def __init__(self, *args: Any, sgd_lr: float | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sgd_lr = sgd_lr

    def configure_optimizers(self) -> Any:
        if self.sgd_lr is None:
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=self.sgd_lr)
        return [optimizer], [LambdaLR(optimizer, lambda _: 1.0)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, optimizer: object) -> None:
        named = self.policy.named_parameters()
        self.gradients.append({name: whole(one.grad) for name, one in named})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class ShardedGRPO(RecordingGRPO):
    """Its policy over all ranks: each layer, and what is left in the root."""

    def configure_model(self) -> None:
        if self._is_configured:
            return
        super().configure_model()
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in self.policy.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.policy, mesh=mesh)


def batch_of(groups: list[int], version: int) -> RolloutBatch:
    """Random rollouts, the same for a group wherever it is; groups differ in their lengths."""
    vocab_size = AutoConfig.from_pretrained(POLICY).vocab_size
    rows, rewards = [], []
    for group in groups:
        generator = torch.Generator().manual_seed(100 * version + group)
        prompt = torch.randint(vocab_size, (3,), generator=generator).tolist()
        for row in range(3):
            length = 2 + 3 * group + row
            rows.append(
                (prompt, torch.randint(vocab_size, (length,), generator=generator).tolist())
            )
        rewards += torch.rand(3, generator=generator).tolist()
    return padded_batch(
        rows,
        rewards,
        [number for number in range(len(groups)) for _ in range(3)],
        version,
        SamplingParams(max_tokens=16),
    )


def train(
    module_class: Callable[..., RecordingGRPO],
    groups: list[int],
    folder: str,
    options: dict[str, Any],
    **trainer: Any,
) -> dict[str, Any]:
    """Weights, and what was logged, after some RL steps of several updates each."""
    module = module_class(
        POLICY,
        optimizer=OptimizerSettings(lr=1e-3, max_grad_norm=0.5),
        aggregation="sequence-mean",
        **options,
    )
    batches = [batch_of(groups, version) for version in range(NUM_STEPS)]
    logged = fit_batches(module, Path(folder), batches, **trainer).logged_metrics
    return {
        "weights": {name: whole(one) for name, one in module.policy.named_parameters()},
        "gradients": module.gradients,
        "num_sharded": sum(isinstance(one, DTensor) for one in module.policy.parameters()),
        "is_sharded": isinstance(module.policy, FSDPModule),
        "grad_norm": float(logged["policy/grad_norm"]),
        "loss": float(logged["policy/loss"]),
    }


def train_sharded(
    folder: str, options: dict[str, Any], groups_by_rank: tuple[list[int], ...] = ([0, 1], [2, 3])
) -> dict[str, Any]:
    logging.disable()
    groups = groups_by_rank[dist.get_rank()]
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    own = str(Path(folder) / str(dist.get_rank()))
    return train(
        ShardedGRPO,
        groups,
        own,
        options,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
    )


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        ({}, 5e-5),  # AdamW, whose steps are of 1e-3
        ({"sgd_lr": 0.1, "num_epochs": 2, "kl_coef": 0.1}, 1e-6),
        ({"sgd_lr": 0.1, "micro_batch_tokens": 40, "entropy_coef": 0.01}, 1e-6),
    ],
    ids=["AdamW", "epochs and a reference", "micro-batches, 2 on one rank and 3 on the other"],
)
def test_updates_of_shards_are_those_of_whole_weights(
    tmp_path: Path, options: dict[str, Any], atol: float
) -> None:
    expected = train(RecordingGRPO, [0, 1, 2, 3], str(tmp_path / "whole"), options, devices=1)
    initial = load_causal_lm(POLICY).state_dict()
    ranks = run_ranks(train_sharded, tmp_path / "ranks", str(tmp_path), options)
    for rank in ranks:
        assert rank["is_sharded"]
        assert rank["num_sharded"] == len(expected["weights"])
        assert rank["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for own, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            assert max(float(tensor.abs().max()) for tensor in wanted.values()) > 0.05
            for name, tensor in wanted.items():
                torch.testing.assert_close(own[name], tensor, atol=3e-6, rtol=0, msg=name)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, atol=atol, rtol=0, msg=name)
        changes = [(one - initial[name]).abs().max() for name, one in rank["weights"].items()]
        assert max(changes) > 1e-3
    losses = [rank["loss"] for rank in ranks]
    assert sum(losses) / 2 == pytest.approx(expected["loss"], rel=1e-4, abs=1e-7)


def train_unalike(
    folder: str, options_by_rank: list[dict[str, Any]], groups_by_rank: tuple[list[int], ...]
) -> tuple[str, str]:
    options = options_by_rank[dist.get_rank()]
    return raised(lambda: train_sharded(folder, options, groups_by_rank))


SMALL = {"micro_batch_tokens": 1}  # a micro-batch for each row


@pytest.mark.parametrize(
    ("options_by_rank", "groups_by_rank", "expected"),
    [
        ([SMALL, SMALL], ([0], [1, 2]), "into 6 micro-batches, and all must make as many, but the"),
        ([{}, {"num_mini_batches": 2}], ([0], [1]), "into [1, 2] mini-batches (by rank)"),
        ([{"num_mini_batches": 4}] * 2, ([0], [1, 2]), "num_mini_batches must be <= the rows"),
    ],
    ids=["fewer rows than micro-batches", "other mini-batches", "fewer rows than mini-batches"],
)
def test_what_one_rank_cannot_train_on_is_an_error_on_all(
    tmp_path: Path,
    options_by_rank: list[dict[str, Any]],
    groups_by_rank: tuple[list[int], ...],
    expected: str,
) -> None:
    ranks = run_ranks(
        train_unalike, tmp_path / "ranks", str(tmp_path), options_by_rank, groups_by_rank
    )
    for kind, message in ranks:
        assert kind == "ValueError"
        assert expected in message


def clip_sharded(losses: list[float], scale: float) -> tuple[tuple[str, str], bool]:
    """What is raised over this rank's loss, and whether gradients are as they were then."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    fully_shard(module)
    module(torch.ones(1, 4)).sum().backward()
    gradient = module.weight.grad
    assert isinstance(gradient, DTensor)
    if dist.get_rank() == 1:
        gradient.to_local().mul_(scale)
    before = gradient.to_local().clone()
    loss = torch.tensor(losses[dist.get_rank()])
    error = raised(lambda: clip_gradients(module, 0.5, loss=loss, rl_step=7))
    return error, torch.equal(gradient.to_local(), before)


@pytest.mark.parametrize(
    ("losses", "scale", "expected"),
    [
        ([0.5, math.inf], 1.0, "RL step 7: loss 0.5, inf, gradient norm 4.47"),
        ([0.5, 0.25], math.inf, "RL step 7: loss 0.5, 0.25, gradient norm inf; non-finite grad"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_on_one_rank_stops_all_before_they_step(
    tmp_path: Path, losses: list[float], scale: float, expected: str
) -> None:
    (first, *_), _ = ranks = run_ranks(clip_sharded, tmp_path, losses, scale)
    assert first[0] == "FloatingPointError"
    assert expected in first[1]
    assert ranks == [(first, True)] * 2
