"""GRPO on two real processes, sharded by FSDP2 or whole on each (DDP), against one process.

Each rank has some of the groups. What the two of them make of theirs is what one process computes
over all groups, whichever way token losses are averaged and however unlike the ranks' shares are:
losses, gradients, their norm, the weights after several updates and what is logged must agree up to
the order of sums.

AdamW divides a gradient by its size, so what it makes of one that is nearly 0 is a matter of that
order: weights are compared tightly after updates by SGD.
"""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig

from fastrl.modules import GRPO, OptimizerSettings, PolicyModule, Reinforce
from fastrl.modules.loading import load_causal_lm
from fastrl.modules.optimization import clip_gradients
from fastrl.modules.sharding import check_strategy
from fastrl.modules.sharding_settings import ShardingSettings
from fastrl.types import RolloutBatch, SamplingParams
from tests.modules.conftest import fit_batches, padded_batch
from tests.rollout.ranks import raised, run_ranks

POLICY = str(Path(__file__).parents[2] / "models" / "quickstart" / "policy")
NUM_STEPS = 2


MAX_NORM = 0.5
RECOMPUTED = ShardingSettings(activation_checkpointing=True)


class Recording(PolicyModule):
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


class RecordingGRPO(Recording, GRPO):
    pass


class RecordingReinforce(Recording, Reinforce):
    pass


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


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
    groups: list[int], folder: str, options: dict[str, Any], **trainer: Any
) -> dict[str, Any]:
    """Weights, and what was logged, after some RL steps of several updates each."""
    given = {"aggregation": "sequence-mean", **options}
    algorithm = RecordingReinforce if given.pop("algorithm", "") == "Reinforce" else RecordingGRPO
    module = algorithm(
        POLICY, optimizer=OptimizerSettings(lr=1e-3, max_grad_norm=MAX_NORM), **given
    )
    batches = [batch_of(groups, version) for version in range(NUM_STEPS)]
    logged = fit_batches(module, Path(folder), batches, **trainer).logged_metrics
    return {
        "weights": {name: whole(one) for name, one in module.policy.named_parameters()},
        "gradients": module.gradients,
        "num_sharded": sum(isinstance(one, DTensor) for one in module.policy.parameters()),
        "logged": {name: float(value) for name, value in logged.items() if "time/" not in name},
    }


def strategy_of(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


def train_on_ranks(
    folder: str,
    options: dict[str, Any],
    groups_by_rank: tuple[list[int], ...],
    strategy: str,
    precision: str = "32-true",
) -> dict[str, Any]:
    logging.disable()
    return train(
        groups_by_rank[dist.get_rank()],
        str(Path(folder) / str(dist.get_rank())),
        options,
        strategy=strategy_of(strategy),
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
        precision=precision,
    )


HALVES = ([0, 1], [2, 3])
UNLIKE = ([0], [1, 2, 3])
SGD = {"sgd_lr": 0.1}
MANY = SGD | {"micro_batch_tokens": 40}


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize(
    ("options", "groups_by_rank", "atol"),
    [
        ({}, HALVES, 5e-5),  # AdamW, whose steps are of 1e-3
        (SGD | {"num_epochs": 2, "kl_coef": 0.1}, HALVES, 1e-6),
        (MANY | {"entropy_coef": 0.01}, HALVES, 1e-6),  # 2 micro-batches on one rank, 3 on another
        (SGD | {"aggregation": "token-mean"}, UNLIKE, 1e-6),
        (SGD | {"aggregation": "sequence-mean"}, UNLIKE, 1e-6),
        (SGD | {"aggregation": "constant", "kl_coef": 0.1}, UNLIKE, 1e-6),
        (SGD | {"algorithm": "Reinforce", "aggregation": "token-mean"}, UNLIKE, 1e-6),
        (SGD | {"aggregation": "token-mean", "sharding": RECOMPUTED}, HALVES, 1e-6),
    ],
    ids=[
        "AdamW",
        "epochs and a reference",
        "micro-batches",
        "token-mean of unlike ranks",
        "sequence-mean of unlike ranks",
        "constant of unlike ranks",
        "a baseline over the batch",
        "recomputed activations",
    ],
)
def test_updates_on_two_ranks_are_those_of_one(
    tmp_path: Path,
    strategy: str,
    options: dict[str, Any],
    groups_by_rank: tuple[list[int], ...],
    atol: float,
) -> None:
    plain = {name: value for name, value in options.items() if name != "sharding"}
    expected = train([0, 1, 2, 3], str(tmp_path / "whole"), plain, devices=1)
    initial = load_causal_lm(POLICY).state_dict()
    ranks = run_ranks(
        train_on_ranks, tmp_path / "ranks", str(tmp_path), options, groups_by_rank, strategy
    )
    for rank in ranks:
        assert rank["num_sharded"] == (len(expected["weights"]) if strategy == "fsdp" else 0)
        assert rank["logged"] == pytest.approx(expected["logged"], rel=1e-4, abs=2e-6)
        for own, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            assert max(float(tensor.abs().max()) for tensor in wanted.values()) > 0.01
            for name, tensor in wanted.items():
                torch.testing.assert_close(own[name], tensor, atol=3e-6, rtol=0, msg=name)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, atol=atol, rtol=0, msg=name)
        changes = [(one - initial[name]).abs().max() for name, one in rank["weights"].items()]
        assert max(changes) > 3e-4


@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}, {"reshard_after_forward": False}])
def test_how_shards_are_kept_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    given = SGD | {"kl_coef": 0.1, "sharding": ShardingSettings(**options)}
    expected = train([0, 1], str(tmp_path / "whole"), SGD | {"kl_coef": 0.1}, devices=1)
    for rank in run_ranks(
        train_on_ranks, tmp_path / "ranks", str(tmp_path), given, ([0], [1]), "fsdp"
    ):
        assert rank["logged"] == pytest.approx(expected["logged"], rel=1e-4, abs=2e-6)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, atol=1e-6, rtol=0, msg=name)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_shards_keep_float32_weights_and_compute_in_bfloat16(tmp_path: Path) -> None:
    expected = train([0, 1, 2, 3], str(tmp_path / "whole"), SGD | {"kl_coef": 0.1}, devices=1)
    initial = load_causal_lm(POLICY).state_dict()
    given = SGD | {"kl_coef": 0.1, "sharding": RECOMPUTED}
    ranks = run_ranks(
        train_on_ranks, tmp_path / "ranks", str(tmp_path), given, UNLIKE, "fsdp", "bf16-mixed"
    )
    for rank in ranks:
        assert rank["logged"]["policy/grad_norm"] == pytest.approx(
            expected["logged"]["policy/grad_norm"], rel=0.05
        )
        for own, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            assert {one.dtype for one in own.values()} == {torch.float32}
            assert torch.cosine_similarity(flat(own), flat(wanted), dim=0) > 0.99
        assert {one.dtype for one in rank["weights"].values()} == {torch.float32}
        change = flat(rank["weights"]) - flat(initial)
        expected_change = flat(expected["weights"]) - flat(initial)
        assert torch.cosine_similarity(change, expected_change, dim=0) > 0.99
    assert ranks[0]["logged"] == ranks[1]["logged"]


class UnshardedGRPO(RecordingGRPO):
    def configure_model(self) -> None:
        self.policy = load_causal_lm(POLICY)


def train_unsharded(folder: str) -> tuple[str, str]:
    module = UnshardedGRPO(POLICY)
    return raised(
        lambda: fit_batches(
            module, Path(folder), [batch_of([0], 0)], strategy=strategy_of("fsdp"), devices=1
        )
    )


def test_weights_whose_gradients_would_stay_on_their_rank_are_refused(tmp_path: Path) -> None:
    ((kind, message),) = run_ranks(train_unsharded, tmp_path, str(tmp_path), num_ranks=1)
    assert kind == "ValueError"
    assert "model.embed_tokens.weight is not sharded; apply fully_shard" in message
    with pytest.raises(ValueError, match="DeepSpeedStrategy: a policy is trained under ddp"):
        check_strategy(object.__new__(DeepSpeedStrategy))


def train_unalike(
    folder: str, options_by_rank: list[dict[str, Any]], groups_by_rank: tuple[list[int], ...]
) -> tuple[str, str]:
    options = options_by_rank[dist.get_rank()]
    return raised(lambda: train_on_ranks(folder, options, groups_by_rank, "fsdp"))


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
