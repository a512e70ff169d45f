"""Reward workers: every way to fail is named, counted, and costs nobody else the score."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrl.datamodules.rewards import RewardFunction, RewardPool
from fastrl.types import Prompt, RewardResult
from tests.datamodules.rewards.reward_fakes import (
    LockedReward,
    ObedientReward,
    RankReward,
    RefusingReward,
)

PROMPT = Prompt(prompt_id=0, tokens=(1,), text="?", answer="!")


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    pool = RewardPool(ObedientReward(), num_workers=2, timeout_s=0.5)
    yield pool
    pool.close()


def score(pool: RewardPool, *texts: str) -> list[RewardResult]:
    return pool.score(texts, [PROMPT] * len(texts))


def test_scores_come_back_in_the_order_of_the_responses(pool: RewardPool) -> None:
    texts = ["x" * (n * 7 % 50) for n in range(128)]
    assert score(pool, *texts) == [RewardResult(score=float(len(text))) for text in texts]


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("hang", "timeout after 0.5 s"),
        ("raise", "raised KeyError: 'boom'"),
        ("raise what does not unpickle", "raised TwoArgumentError: boom twice"),
        ("sys.exit", "raised SystemExit: enough"),
        ("os._exit", "worker process died with exit code 3"),
        ("segfault", f"worker process died with exit code {-signal.SIGSEGV}"),
        ("nan", "returned nan"),
        ("inf", "returned -inf"),
        ("None", "returned NoneType, expected a float"),
        ("str", "returned str, expected a float"),
    ],
)
def test_a_failed_score_is_zero_and_named_and_the_others_keep_theirs(
    pool: RewardPool, text: str, failure: str
) -> None:
    results = score(pool, "a", "bb", text, "dddd", "eeeee", "ffffff")
    assert results[2] == RewardResult(score=0.0, failure=failure)
    others = results[:2] + results[3:]
    assert others == [RewardResult(score=float(n)) for n in (1, 2, 4, 5, 6)]


def test_more_failures_than_workers_are_each_attributed_to_their_own_response(
    pool: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = score(pool, "hang", "a", "os._exit", "hang", "bb", "os._exit", "raise", "ccc")
    died, late = "worker process died with exit code 3", "timeout after 0.5 s"
    assert [result.failure for result in results] == [
        late, None, died, late, None, died, "raised KeyError: 'boom'", None,
    ]  # fmt: skip
    assert "5 of 8 rewards of ObedientReward failed" in caplog.text
    assert f"{late} (2 x)" in caplog.text


def test_scoring_goes_on_after_an_idle_worker_was_killed_from_outside(pool: RewardPool) -> None:
    pids = {int(result.score) for result in score(pool, *["pid"] * 50)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [result.score for result in score(pool, "a", "bb", "ccc")] == [1, 2, 3]


def test_close_ends_the_workers_even_hung_ones_and_the_pool_can_start_again() -> None:
    pool = RewardPool(ObedientReward(), num_workers=2, timeout_s=1000)
    pids = {int(result.score) for result in score(pool, *["pid"] * 50)}
    for _ in range(2):
        pool._schedule(_hang)
    pool.close()
    assert pids
    assert not any(is_alive(pid) for pid in pids)
    pool.close()
    assert score(pool, "abc") == [RewardResult(score=3.0)]
    pool.close()


def _hang() -> None:
    time.sleep(1000)


def blocks_sigint(pid: int) -> bool:
    """Whether the process was born with SIGINT blocked, so that not even its imports are hit."""
    (mask,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def is_alive(pid: int) -> bool:
    """Running, that is neither gone nor a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ORPHAN_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.datamodules.rewards.reward_fakes import ObedientReward
from fastrl.datamodules.rewards import RewardPool
from fastrl.types import Prompt

if __name__ == "__main__":
    prompt = Prompt(prompt_id=0, tokens=(1,), text="?", answer="!")
    pool = RewardPool(ObedientReward(), num_workers=2, timeout_s=1000)
    for result in pool.score(["pid"] * 50, [prompt] * 50):
        print(int(result.score), flush=True)
    print("ready", flush=True)
    pool.score(["hang", "hang with the GIL"], [prompt] * 2)
"""


def test_hung_workers_end_with_their_parent_even_one_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHAN_SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parents[3])],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = {int(line) for line in iter(parent.stdout.readline, "ready\n")}
        time.sleep(0.3)  # Lets the workers begin to hang.
        parent.kill()
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    assert not any(map(is_alive, pids))


def test_ctrl_c_does_not_reach_the_workers(pool: RewardPool) -> None:
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    pids = {int(result.score) for result in score(pool, *["pid"] * 50)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert [result.failure for result in score(pool, *["a"] * 50)] == [None] * 50
    assert all(map(is_alive, pids))
    assert all(blocks_sigint(pid) for pid in pids)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == blocked_before


def test_a_reward_that_cannot_be_pickled_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="reward LockedReward cannot be pickled"):
        RewardPool(LockedReward(), num_workers=1, timeout_s=1)


def test_a_class_no_worker_can_import_is_refused_at_construction() -> None:
    class Local(RewardFunction):
        def score(self, text: str, prompt: Prompt) -> float:
            return 0.0

    with pytest.raises(ValueError, match="reward Local cannot be pickled"):
        RewardPool(Local(), num_workers=1, timeout_s=1)


def test_workers_that_cannot_load_the_reward_raise_instead_of_hanging() -> None:
    pool = RewardPool(RefusingReward(), num_workers=1, timeout_s=1)
    with pytest.raises(RuntimeError, match="RefusingReward could not be kept running"):
        score(pool, "a")
    pool.close()


@pytest.mark.parametrize(
    ("num_workers", "timeout_s", "message"),
    [
        (0, 1.0, "reward_workers must be >= 1, got 0"),
        (1, 0.0, "reward_timeout_s must be a positive number, got 0.0"),
        (1, float("inf"), "reward_timeout_s must be a positive number, got inf"),
    ],
)
def test_bad_settings_are_named(num_workers: int, timeout_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(ObedientReward(), num_workers=num_workers, timeout_s=timeout_s)


@pytest.fixture
def batch_pool() -> Iterator[RewardPool]:
    pool = RewardPool(RankReward(), num_workers=1, timeout_s=5)
    yield pool
    pool.close()


def test_a_batch_reward_sees_all_responses_and_only_its_bad_entries_fail(
    batch_pool: RewardPool,
) -> None:
    assert score(batch_pool, "cccc", "a", "nan", "bb") == [
        RewardResult(score=3.0),
        RewardResult(score=0.0),
        RewardResult(score=0.0, failure="returned nan"),
        RewardResult(score=1.0),
    ]


def test_a_batch_reward_that_raises_fails_for_every_response(batch_pool: RewardPool) -> None:
    expected = RewardResult(score=0.0, failure="raised ValueError: boom")
    assert score(batch_pool, "a", "raise") == [expected, expected]


def test_a_batch_reward_of_wrong_length_is_an_error_naming_both(batch_pool: RewardPool) -> None:
    with pytest.raises(ValueError, match=r"RankReward\.score_batch returned 2 rewards for 3 resp"):
        score(batch_pool, "a", "bb", "short")
