"""The board of ranks: who still generates, whoever is first or last, and who is missing.

Ranks are real processes that share a gloo group and its store; "generating" is a sleep.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fastrl.rollout.process_identity import has_ended, own_identity
from fastrl.rollout.rank_board import IdleWindow, RankBoard
from tests.rollout.ranks import raised, run_ranks

MICRO_STEP_S = 0.02


def rollouts_of_one_rank(
    lengths_of_rollouts: Sequence[Sequence[float]], timeout_s: float
) -> dict[str, list]:
    """Sleeps for this rank's length in each rollout, then takes micro-steps while idle."""
    board = RankBoard.join(timeout_s)
    rank = dist.get_rank()
    times: list[tuple[float, float, float]] = []
    steps, counts, idle_times = [], [], []
    for lengths in lengths_of_rollouts:
        taken, seen = [], []

        def train(window: IdleWindow, taken: list = taken, seen: list = seen) -> None:
            while not window.should_stop():
                seen.append(window.num_idle_ranks())
                time.sleep(MICRO_STEP_S)
                taken.append(1)

        board.begin()
        began = time.time()
        time.sleep(lengths[rank])
        ended = time.time()
        idle_times.append(board.pass_idle_time(train))
        times.append((began, ended, time.time()))
        steps.append(len(taken))
        counts.append(seen)
    keys = [key for key in _get_default_store().list_keys() if "rank_board" in key]
    dist.barrier()
    return {"times": times, "steps": steps, "counts": counts, "idle": idle_times, "keys": keys}


FIRST, LAST, TOGETHER = (0.0, 0.5, 0.2, 0.3), (0.6, 0.0, 0.0, 0.0), (0.1, 0.1, 0.1, 0.1)


def check_rollouts(ranks: list[dict], lengths_of_rollouts: Sequence[Sequence[float]]) -> None:
    for number, lengths in enumerate(lengths_of_rollouts):
        longest = max(lengths)
        ends = [rank["times"][number][1] for rank in ranks]
        left = [rank["times"][number][2] for rank in ranks]
        assert min(left) >= max(ends)  # all go on together, none before the longest has ended
        assert max(left) - max(ends) < 0.5
        for rank, length in zip(ranks, lengths, strict=True):
            began, ended, _ = rank["times"][number]
            assert ended - began < length + 0.25  # nobody was delayed while it generated
            if max(ends) - ended > 0.15:
                assert rank["steps"][number] >= 2  # its own end does not stop its own training
            if length == longest and ends.count(max(ends)) == 1 and ended == max(ends):
                assert rank["steps"][number] == 0
            seen = rank["counts"][number]
            assert seen == sorted(seen)
            assert all(1 <= count <= len(ranks) for count in seen)


def test_four_ranks_train_while_others_generate_and_go_on_together(tmp_path: Path) -> None:
    """The first rank ends first, last, with all others; then at random."""
    draws = random.Random(3)
    skews = [[draws.choice((0.0, 0.05, 0.3)) for _ in range(4)] for _ in range(10)]
    lengths = [FIRST, LAST, TOGETHER, *skews]
    ranks = run_ranks(rollouts_of_one_rank, tmp_path, lengths, 60.0, num_ranks=4)
    check_rollouts(ranks, lengths)
    assert ranks[0]["idle"][1].overrun_s == 0.0  # it was the last
    assert all(0 < rank["idle"][1].overrun_s < 0.5 for rank in ranks[1:])
    assert all(rank["idle"][1].seconds > 0.5 for rank in ranks[1:])


def test_keys_of_past_rollouts_do_not_pile_up(tmp_path: Path) -> None:
    """A key a rank, and those of the last two rollouts at most."""
    for rank in run_ranks(rollouts_of_one_rank, tmp_path, [(0.0, 0.0)] * 40, 60.0):
        numbers = {key.rsplit("/", 2)[1] for key in rank["keys"] if key[-1].isalpha()}
        assert {"39", "40"} >= numbers - {"rank_board"}
        assert len(rank["keys"]) <= 2 + 2 + 2 * 3


def test_a_process_alone_never_waits() -> None:
    board = RankBoard.join(1.0)
    for _ in range(3):
        board.begin()
        idle = board.pass_idle_time(lambda _: pytest.fail("there is no idle time"))
        assert idle.overrun_s == 0.0
        assert idle.seconds < 0.5


def boards_one_after_the_other() -> list[bool]:
    """A second board begins anew, and counts nothing of the first."""
    answers = []
    for _ in range(2):
        board = RankBoard.join(60.0)
        board.begin()
        if dist.get_rank() == 0:
            time.sleep(0.3)
        idle = board.pass_idle_time(lambda window: answers.append(window.should_stop()))
        assert idle.seconds < 5
    dist.barrier()
    return answers


def test_a_second_board_counts_anew(tmp_path: Path) -> None:
    assert run_ranks(boards_one_after_the_other, tmp_path) == [[], [False, False]]


def one_rank_never_ends(timeout_s: float) -> tuple[str, str] | None:
    board = RankBoard.join(timeout_s)
    board.begin()
    if dist.get_rank() == 1:
        time.sleep(timeout_s + 2)
        error = None
    else:
        error = raised(lambda: board.pass_idle_time(idle_work))
    dist.barrier()
    return error


def idle_work(window: IdleWindow) -> None:
    while not window.should_stop():
        time.sleep(MICRO_STEP_S)


def test_a_rank_that_does_not_end_in_time_is_named_with_what_it_last_wrote(tmp_path: Path) -> None:
    first, _, third = run_ranks(one_rank_never_ends, tmp_path, 1.5, num_ranks=3)
    for error in (first, third):
        assert error[0] == "RankError"
        assert "rank 1 did not come this far within the 1.5 s" in error[1]
        assert "last wrote 'generating' in rollout 1" in error[1]
        assert "rank 0 did" not in error[1]


def one_rank_fails(where: str) -> tuple[str, str] | None:
    board = RankBoard.join(60.0)
    board.begin()
    rank = dist.get_rank()
    if where == "after the rollout":
        board.pass_idle_time(None)
        dist.barrier()
        if rank == 1:
            board.fail(FloatingPointError("loss nan"))
            dist.barrier()
            return None
        board.begin()
    started = time.monotonic()
    if rank == 1:
        time.sleep(0.2)
        board.fail(FloatingPointError("loss nan"))
        error = None
    else:
        error = raised(lambda: board.pass_idle_time(idle_work if rank else None))
        assert time.monotonic() - started < 20
    dist.barrier()
    return error


@pytest.mark.parametrize("where", ["in the rollout", "after the rollout"])
def test_a_rank_that_fails_ends_the_others_wait_at_once(tmp_path: Path, where: str) -> None:
    first, _, third = run_ranks(one_rank_fails, tmp_path, where, num_ranks=3)
    for error in (first, third):
        assert error[0] == "RankError"
        assert "rank 1 failed with FloatingPointError: loss nan" in error[1]


def one_rank_is_killed(place: str, victim: int, folder: str) -> None:
    """Every rank writes what it raises; the victim is gone."""
    board = RankBoard.join(30.0)
    rank = dist.get_rank()
    board.begin()
    board.pass_idle_time(None)
    board.begin()
    if place == "generating" and rank == victim:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    def work(window: IdleWindow) -> None:
        while not window.should_stop():
            time.sleep(MICRO_STEP_S)
            if place == "idle work" and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    if place == "idle work" and rank != victim:
        time.sleep(1.0)  # still generating
    kind, message = raised(lambda: board.pass_idle_time(work))
    (Path(folder) / f"raised{rank}").write_text(
        f"{kind} {time.monotonic() - started:.1f}\n{message}"
    )
    os._exit(0)


@pytest.mark.parametrize("place", ["generating", "idle work"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path, place: str, victim: int) -> None:
    """Rank 0 keeps the store in its own process, and takes it along."""
    with pytest.raises(AssertionError, match="exit statuses"):
        run_ranks(one_rank_is_killed, tmp_path, place, victim, str(tmp_path), num_ranks=4)
    for rank in {0, 1, 2, 3} - {victim}:
        first_line, message = (tmp_path / f"raised{rank}").read_text().split("\n", 1)
        kind, seconds = first_line.split()
        assert kind == "RankError"
        assert float(seconds) < 10  # far below the limit: ranks of one machine look for each other
        if victim == 0:
            assert "Rank 0 keeps it" in message
        else:
            what = "generating" if place == "generating" else "in idle work"
            # Whoever looks first says so; the others may read it from that one.
            assert "rank 2 has ended without a word" in message
            assert f"last wrote '{what}' in rollout 2" in message


def test_a_process_is_known_to_have_ended_only_if_it_is_of_this_machine() -> None:
    own = own_identity()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        status = (Path("/proc") / str(child.pid) / "stat").read_text()
        other = own._replace(number=child.pid, began=int(status.rpartition(")")[2].split()[19]))
        assert not has_ended(own, own)
        assert not has_ended(other, own)
        assert has_ended(other._replace(began=other.began - 1), own)  # its number, used again
        child.kill()
        time.sleep(0.2)
        assert has_ended(other, own)  # a zombie
    finally:
        child.kill()
        child.wait()
    assert has_ended(other, own)
    assert not has_ended(other._replace(place="elsewhere"), own)
    assert not has_ended(other, own._replace(place=""))
