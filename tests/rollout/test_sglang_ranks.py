"""Real SGLang on the CPU under a trainer of two processes, whose policy FSDP2 shards.

The processes are started as by torchrun, with its variables set: an engine that took itself for a
rank of the trainer's would wait for it, and fail. Tensor parallelism is SGLang's own, over gloo.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.rollout.sglang_process import living_members
from fastrl.types import Prompt, Rollout, SamplingParams
from tests.rollout.ranks import raised, run_ranks
from tests.rollout.sglang_options import sglang_options
from tests.rollout.test_sharded_publication import sharded
from tests.rollout.tiny_models import make_prompts

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12)


def prompts_of(rank: int) -> list[Prompt]:
    """Different ones, but for the one that both have; the second rank has one more."""
    first, second, third, fourth = make_prompts(4)
    return [[first, second], [third, second, fourth]][rank]


def responses(engine: SGLangEngine, rank: int) -> list[list[Rollout]]:
    return [
        engine.generate(prompts_of(rank), GREEDY),
        engine.generate(prompts_of(rank), SAMPLED, num_samples=2, seed=7, rl_step=3),
    ]


def tokens(calls: list[list[Rollout]]) -> list[list[tuple[int, int, tuple[int, ...]]]]:
    return [[(r.prompt.prompt_id, r.sample_index, r.tokens) for r in call] for call in calls]


@pytest.fixture
def expected(sglang_by_strategy, target_model) -> list[Any]:
    """What each rank is to get: of one engine, for each rank's prompts alone."""
    engine = sglang_by_strategy("off")
    engine.load_policy(target_model.named_parameters(), version=0)
    return [tokens(responses(engine, rank)) for rank in range(2)]


# -- an engine each -------------------------------------------------------------------------------


def serve_apart(folder: str, drafter: str) -> dict[str, Any]:
    """Both engines start at the same time."""
    engine = SGLangEngine(**sglang_options(drafter))
    engine.start(folder)
    engine.load_policy(sharded(folder, "fsdp2").named_parameters(), version=4)
    process = engine.process
    environment = Path(f"/proc/{process.group}/environ").read_text().split("\0")
    result = {
        "tokens": tokens(responses(engine, dist.get_rank())),
        "version": engine.policy_version,
        "checksums": engine.weight_checksums(),
        "group": process.group,
        "environment": {line.partition("=")[0] for line in environment},
    }
    dist.barrier()  # the trainer's own process group is as it was
    engine.close()
    return result | {"left": living_members(process.group)}


def test_ranks_with_an_engine_each_are_served_their_own(
    folders, tmp_path, expected, sglang_by_strategy
) -> None:
    ranks = run_ranks(serve_apart, tmp_path, *map(str, folders))
    checksums = sglang_by_strategy("off").weight_checksums()
    for rank, result in enumerate(ranks):
        assert result["tokens"] == expected[rank]
        assert result["version"] == 4
        assert result["checksums"] == checksums
        assert result["left"] == []
        launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        launchers |= {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}
        assert not launchers & result["environment"]
    assert ranks[0]["group"] != ranks[1]["group"]


# -- one engine for both --------------------------------------------------------------------------


def serve_together(folder: str, drafter: str) -> dict[str, Any]:
    rank = dist.get_rank()
    engine = SGLangEngine(**sglang_options(drafter, tp_size=2, strategy="3_4_8"))
    engine.start(folder)
    policy = sharded(folder, "fsdp2")
    engine.load_policy(policy.named_parameters(), version=4)
    calls = responses(engine, rank)
    result: dict[str, Any] = {
        "tokens": tokens(calls),
        "versions": {rollout.policy_version for call in calls for rollout in call},
        "num_rollouts": engine.stats().num_rollouts,
        "before": engine.weight_checksums(),
    }
    trained = dict(EagleDrafter.for_target(policy.config, seed=5).named_weights())
    engine.load_drafter(trained.items(), version=1)
    result["after"] = engine.weight_checksums()
    result["again"] = tokens(responses(engine, rank))
    result["alone"] = tokens([engine.generate(prompts_of(0) if rank == 0 else [], GREEDY)])
    if rank == 1:
        trained["fc.bias"] = trained["fc.bias"] + 1
    result["drafters"] = raised(lambda: engine.load_drafter(trained.items(), version=2))
    (prompt, *_) = prompts_of(rank)
    if rank == 1:
        prompt = replace(prompt, tokens=())
    result["prompt"] = raised(lambda: engine.generate([prompt], GREEDY))
    result["tokens after errors"] = tokens(responses(engine, rank))
    group = engine.process.group
    dist.barrier()
    if rank == 1:
        os.kill(group, signal.SIGKILL)
    result["killed"] = raised(lambda: responses(engine, rank))
    result["ended"] = (engine.process, living_members(group))
    engine.close()
    return result


def test_ranks_that_share_an_engine_are_served_their_own(
    folders, tmp_path, expected, monkeypatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # one core a rank of SGLang
    ranks = run_ranks(serve_together, tmp_path, *map(str, folders))
    for rank, result in enumerate(ranks):
        greedy, _ = expected[rank]
        assert result["tokens"][0] == result["again"][0] == greedy
        assert result["tokens after errors"][0] == greedy
        assert result["versions"] == {4}
        assert result["num_rollouts"] == 2 * len(prompts_of(rank))
        assert len(result["before"]) == 2  # ranks of SGLang
        for before, after in zip(result["before"], result["after"], strict=True):
            changed = {name for name in before if before[name] != after[name]}
            assert "draft.model.fc.weight" in changed
            assert all(name.startswith("draft.") for name in changed)
            assert not any("embed_tokens" in name or "lm_head" in name for name in changed)
        assert result["drafters"][0] == "ValueError"
        assert "['fc.bias'] are not the same on all 2" in result["drafters"][1]
        assert result["prompt"][0] == "ValueError"
        assert "has 0 tokens" in result["prompt"][1]
        assert result["killed"][0] == "EngineError"
        assert "killed by SIGKILL" in result["killed"][1]
        assert result["ended"] == (None, [])
    first, second = ranks
    assert first["before"] == second["before"]
    assert first["alone"] == [expected[0][0]]
    assert second["alone"] == [[]]
    # Both asked for this prompt, and what speculation samples of it is the same for both.
    shared = [
        {one for one in result["tokens"][1] if one[0] == make_prompts(2)[1].prompt_id}
        for result in ranks
    ]
    assert shared[0] == shared[1]
    assert len(shared[0]) == 2
    assert "on rank 1, which shares this rank's engine" in first["prompt"][1]
    assert "on rank 0, which shares this rank's engine" in second["killed"][1]


def sample_together(folder: str, drafter: str) -> list[Any]:
    engine = SGLangEngine(**sglang_options(drafter, tp_size=2))
    engine.start(folder)
    engine.load_policy(sharded(folder, "fsdp2").named_parameters(), version=0)
    result = tokens(responses(engine, dist.get_rank()))
    engine.close()
    return result


def test_tokens_do_not_depend_on_how_ranks_share_engines(
    folders, tmp_path, expected, monkeypatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    assert run_ranks(sample_together, tmp_path, *map(str, folders)) == expected
