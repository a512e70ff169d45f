"""Real SGLang of two ranks on the CPU with FastRL's plugin: they switch alike, and a trainer's two
processes that share them learn, and are told, the same.

The processes are real, the kernels are stand-ins (tests/sglang_cpu); SGLang's ranks talk over gloo.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch.distributed as dist

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.bandit_base import Bandit
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.rollout.weight_check import WeightCheck
from fastrl.types import Rollout, SamplingParams, StepStats
from tests.rollout.ranks import run_ranks
from tests.rollout.sglang_options import sglang_options
from tests.rollout.test_sglang_adaptation import POOL
from tests.rollout.test_sglang_engine import echoing_drafter
from tests.rollout.test_sglang_health import overwrite, zeroed
from tests.rollout.test_sglang_ranks import prompts_of
from tests.rollout.test_sharded_publication import sharded
from tests.rollout.tiny_models import make_prompts

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
TREES = ["3_1_4", "3_4_8"]


@pytest.fixture(autouse=True)
def _one_core_a_rank(start_sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment that `start_sglang` sets, which trainers' processes inherit."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")


def tokens_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.tokens for rollout in rollouts]


# -- a trainer of one process ---------------------------------------------------------------------


def test_two_ranks_of_sglang_switch_every_batch_and_answer_as_one(
    start_sglang, engine, target_model
) -> None:
    """Rank 0 decides; a rank that ran another strategy would hang, or compute other tokens."""
    shared = start_sglang(tp_size=2, selector=InTurns(("off", *POOL)), max_batch_size=4)
    shared.load_policy(target_model.named_parameters(), version=0)
    drafter = echoing_drafter(target_model)
    shared.load_drafter(drafter.items(), version=0)
    assert shared.compare_policy(target_model.named_parameters()) == []
    assert shared.compare_drafter(drafter.items()) == []
    (name, tensor), *rest = drafter.items()
    (found,) = shared.compare_drafter([(name, tensor + 1), *rest])
    assert found.name == name
    prompts = make_prompts(6)
    expected = tokens_of(engine.generate(prompts, GREEDY))
    assert tokens_of(shared.generate(prompts, GREEDY)) == expected
    stats = shared.stats()
    assert set(stats.steps_by_strategy) == {"off", *POOL}
    assert stats.accepted_by_depth[0] > 20  # else nothing was put to the test
    shared.strategy_selector = bandit = ModelBased(TREES)
    assert tokens_of(shared.generate(prompts, GREEDY)) == expected
    assert bandit.cost_queries(4, 60) == []  # rehearsals ended, on both ranks
    shared.close()


# -- a trainer of two -----------------------------------------------------------------------------


class Recorded:
    """A call, as one rank saw it."""

    def __init__(self, engine: SGLangEngine) -> None:
        rollouts = engine.generate(prompts_of(dist.get_rank()), GREEDY)
        self.tokens = tokens_of(rollouts)
        self.lengths = [rollout.accept_lengths for rollout in rollouts]
        self.num_verify_steps = sum(rollout.num_verify_steps for rollout in rollouts)
        self.stats = engine.stats()


def warned(work: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in caught if one.category is UserWarning]


def new_check() -> WeightCheck:
    """That has seen nothing yet."""
    return WeightCheck(every_n_publications=1, num_canaries=2, canary_tolerance=1e-3)


def adapt_together(folder: str, drafter_folder: str) -> dict[str, Any]:
    """Each rank has a bandit that would choose otherwise than the other's."""
    rank = dist.get_rank()
    engine = SGLangEngine(**sglang_options(drafter_folder, tp_size=2, max_batch_size=8))
    engine.strategy_selector = bandit = ModelBased(TREES, seed=rank)
    engine.start(folder)
    policy = sharded(folder, "fsdp2")
    drafter = echoing_drafter(sharded(folder, "whole"))
    engine.load_policy(policy.named_parameters(), version=0)
    engine.load_drafter(drafter.items(), version=0)
    check = new_check()
    result: dict[str, Any] = {
        "failure": check.drafter_failure(engine, drafter.items),
        "gap": check.check_policy(engine, policy, policy.named_parameters),
    }

    before, bandit.journal = bandit.state_dict(), []  # as StrategyAdaptation does
    result["before"] = before
    result["calls"] = [Recorded(engine), Recorded(engine)]
    result["state"] = bandit.state_dict()
    result["journal"] = bandit.journal
    result["unanswered"] = list(bandit.cost_queries(8, 60))
    result["learned"] = learned_from_all(bandit, before)

    engine.strategy_selector = InTurns(("off", *TREES))
    result["in turns"] = Recorded(engine)

    engine.strategy_selector = bandit
    overwrite(engine, "draft", zeroed(drafter))  # nobody is told
    result["zeroed"] = new_check().drafter_failure(engine, drafter.items)
    result["warned"] = warned(lambda: engine.reject_drafter(result["zeroed"]))
    result["rejected"] = Recorded(engine)
    engine.strategy_selector = FixedStrategy("3_4_8")
    result["rejected, fixed"] = Recorded(engine)
    engine.load_drafter(drafter.items(), version=1)
    result["next"] = Recorded(engine)
    engine.close()
    return result


def learned_from_all(bandit: Bandit, before: dict[str, Any]) -> dict[str, Any]:
    """What all believe once they have exchanged journals: back to where they were, then every
    entry of every rank."""
    journals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(journals, bandit.journal)
    return replayed(bandit, before, itertools.chain(*journals))


def replayed(bandit: Bandit, before: dict[str, Any], entries: Iterable[Any]) -> dict[str, Any]:
    """State of a bandit that was as before, and learned the entries."""
    bandit.journal = None
    bandit.load_state_dict(before)
    for entry in entries:
        bandit.replay(entry)
    return bandit.state_dict()


def beliefs(state: dict[str, Any]) -> dict[str, Any]:
    """All but this period's figures, and the random generator, which each rank seeded otherwise."""
    return {name: value for name, value in state.items() if name not in ("period", "rng")}


def test_ranks_that_share_an_engine_share_what_a_bandit_learns_there(
    folders, tmp_path, engine
) -> None:
    expected = [tokens_of(engine.generate(prompts_of(rank), GREEDY)) for rank in range(2)]
    first, second = ranks = run_ranks(adapt_together, tmp_path, *map(str, folders))
    for result, tokens in zip(ranks, expected, strict=True):
        calls = [*result["calls"], result["in turns"], result["rejected"], result["next"]]
        for call in (*calls, result["rejected, fixed"]):
            assert call.tokens == tokens
            assert [sum(lengths) for lengths in call.lengths] == [39] * len(tokens)
            assert call.stats.num_rollouts == len(tokens)
            assert call.stats.row_steps == call.num_verify_steps  # its own prompts' alone
        assert set(result["in turns"].stats.steps_by_strategy) == {"off", *TREES}
        assert result["in turns"].stats.accept_length > 1.1  # else nothing was put to the test

        assert result["failure"] is None
        assert result["gap"] < 1e-4
        assert "fc.weight: all zero" in result["zeroed"]
        assert len(result["warned"]) == 1
        assert result["rejected"].stats.drafter_failures == tuple(result["warned"])
        for call in (result["rejected"], result["rejected, fixed"]):
            assert set(call.stats.steps_by_strategy) == {"off"}
        assert result["next"].stats.row_steps > 0
        assert result["unanswered"] == []
    for one, other in zip(first["calls"], second["calls"], strict=True):
        assert one.stats.steps_by_strategy == other.stats.steps_by_strategy
        assert one.stats.offered_by_depth == other.stats.offered_by_depth

    assert first["state"] == second["state"]
    assert second["journal"] == []
    steps = [entry for entry in first["journal"] if isinstance(entry, StepStats)]
    costs = [entry.query for entry in first["journal"] if not isinstance(entry, StepStats)]
    assert len(steps) == sum(call.stats.num_steps for call in first["calls"])
    assert len(costs) == len(set(costs)) == 3 * 3  # three arms at 1, 4 and 8 rows, once
    assert beliefs(first["learned"]) == beliefs(second["learned"])
    once = replayed(ModelBased(TREES), first["before"], first["journal"])
    assert beliefs(first["learned"]) == beliefs(once)


def reject_together(folder: str, drafter_folder: str) -> dict[str, Any]:
    """Stock SGLang: without its drafter it is started anew, by both ranks."""
    engine = SGLangEngine(**sglang_options(drafter_folder, tp_size=2, strategy="3_4_8"))
    engine.start(folder)
    policy = sharded(folder, "fsdp2")
    engine.load_policy(policy.named_parameters(), version=4)
    result: dict[str, Any] = {"before": Recorded(engine)}
    result["warned"] = warned(lambda: engine.reject_drafter("told so"))
    result["version"] = engine.policy_version
    engine.load_policy(policy.named_parameters(), version=4)
    result["after"] = Recorded(engine)
    engine.close()
    return result


def test_ranks_that_share_stock_sglang_go_on_without_a_rejected_drafter(
    folders, tmp_path, engine
) -> None:
    ranks = run_ranks(reject_together, tmp_path, *map(str, folders))
    for rank, result in enumerate(ranks):
        expected = tokens_of(engine.generate(prompts_of(rank), GREEDY))
        assert result["before"].tokens == result["after"].tokens == expected
        assert result["before"].stats.row_steps > 0
        assert result["after"].stats.row_steps == 0
        assert result["version"] == -1
        assert "started anew without speculation" in result["warned"][-1]
