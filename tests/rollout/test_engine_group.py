"""Ranks that share an engine, as real processes: what they tell one another, and errors."""

import os
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastrl.rollout.engine_group import EngineGroup
from tests.rollout.ranks import raised, run_ranks


class UnpicklableError(RuntimeError):
    """Cannot be made again from its message alone."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail(error: BaseException) -> object:
    raise error


def talk() -> dict[str, object]:
    group = EngineGroup.join(2, timeout_s=60)
    rank = dist.get_rank()

    def only_on(place: int, error: Exception):
        return lambda: fail(error) if group.place == place else rank

    return {
        "place": (group.size, group.place, group.is_leader),
        "gathered": group.gather("work", lambda: rank),
        "agreed": group.agree("work", lambda: rank),
        "led": group.lead("work", lambda: f"by {rank}"),
        "led to nothing": group.lead("work", lambda: None),
        "dealt": group.deal("work", lambda: ["first", "second"]),
        "leader fails": raised(lambda: group.lead("work", lambda: fail(ValueError(f"at {rank}")))),
        "other fails": raised(lambda: group.gather("work", only_on(1, KeyError("key")))),
        "other disagrees": raised(lambda: group.agree("work", only_on(1, KeyError("key")))),
        "both fail": raised(lambda: group.agree("work", lambda: fail(ValueError(f"at {rank}")))),
        "odd error": raised(
            lambda: group.lead("work", lambda: fail(UnpicklableError("one", "two")))
        ),
        "after errors": group.gather("work", lambda: rank),
    }


def test_ranks_learn_what_others_have_and_what_they_raised(tmp_path: Path) -> None:
    first, second = run_ranks(talk, tmp_path)
    assert [first["place"], second["place"]] == [(2, 0, True), (2, 1, False)]
    assert first["gathered"] == second["gathered"] == [0, 1]
    assert [first["agreed"], second["agreed"]] == [0, 1]
    assert first["led"] == second["led"] == "by 0"
    assert first["led to nothing"] is second["led to nothing"] is None
    assert [first["dealt"], second["dealt"]] == ["first", "second"]
    note = "on rank {}, which shares this rank's engine"
    assert first["leader fails"] == ("ValueError", "ValueError: at 0\n")
    assert second["leader fails"] == ("ValueError", f"ValueError: at 0\n{note.format(0)}\n")
    for case in ("other fails", "other disagrees"):
        assert first[case] == ("KeyError", f"KeyError: 'key'\n{note.format(1)}\n")
        assert second[case] == ("KeyError", "KeyError: 'key'\n")
    assert "at 0" in first["both fail"][1]
    assert "at 1" in second["both fail"][1]
    assert second["odd error"][0] == "RuntimeError"
    assert "UnpicklableError: one two" in second["odd error"][1]
    assert first["after errors"] == second["after errors"] == [0, 1]


KINDS = ("gather", "agree", "lead", "deal")


def begin(group: EngineGroup, kind: str, name: str) -> object:
    """An operation of this kind, whose work deal takes as well."""
    return getattr(group, kind)(name, lambda: ["first", "second"])


def fall_out_of_step(kinds: tuple[str, str]) -> list[tuple[str, str]]:
    """What this rank hears in its kind of operation, and then in one that both call."""
    group = EngineGroup.join(2, timeout_s=10)
    group.gather("before", lambda: None)
    kind, name = kinds[group.place], ("load_drafter", "generate")[group.place]
    return [
        raised(lambda: begin(group, kind, name)),
        raised(lambda: group.gather("after", lambda: None)),
    ]


def fall_behind() -> tuple[str, str]:
    group = EngineGroup.join(2, timeout_s=10)
    if group.place == 1:
        with pytest.raises(KeyboardInterrupt):
            group.gather("generate", lambda: fail(KeyboardInterrupt()))
    return raised(lambda: group.gather("generate", lambda: None))


def fall_out_of_step_in_all_ways() -> list[tuple[str, str]]:
    return [
        *(heard for kinds in product(KINDS, repeat=2) for heard in fall_out_of_step(kinds)),
        fall_behind(),
    ]


def test_ranks_that_are_out_of_step_are_told_where_each_is(tmp_path: Path) -> None:
    first, second = run_ranks(fall_out_of_step_in_all_ways, tmp_path)
    assert first == second
    assert len(first) == 2 * len(KINDS) ** 2 + 1
    assert {kind for kind, _ in first} == {"EngineError"}
    *of_kinds, (_, behind) = first
    for _, message in of_kinds:
        assert (
            "rank 0 in 'load_drafter' (its operation 2), rank 1 in 'generate' (its operation 2)"
        ) in message
    assert (
        "rank 0 in 'generate' (its operation 1), rank 1 in 'generate' (its operation 2)"
    ) in behind


def pass_what_cannot_be_sent() -> dict[str, object]:
    group = EngineGroup.join(2, timeout_s=10)
    of_leader = [threading.Lock(), 0] if group.is_leader else [0, 0]
    return {
        "gather": raised(lambda: group.gather("work", lambda: of_leader[0])),
        "lead": raised(lambda: group.lead("work", lambda: of_leader[0])),
        "deal": raised(lambda: group.deal("work", lambda: of_leader)),
        "of the other": raised(lambda: group.deal("work", lambda: of_leader[::-1])),
        "kept": str(group.agree("work", lambda: of_leader[0])),
        "after": group.deal("work", lambda: ["first", "second"]),
    }


def test_a_value_that_cannot_be_sent_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(pass_what_cannot_be_sent, tmp_path)
    for case in ("gather", "lead", "deal", "of the other"):
        for kind, message in (first[case], second[case]):
            assert kind == "TypeError"
            assert "a lock cannot be sent to the other ranks that share the engine" in message
        assert "on rank 0" not in first[case][1]
        assert "on rank 0, which shares this rank's engine" in second[case][1]
    assert "lock" in first["kept"]
    assert [first["after"], second["after"]] == ["first", "second"]


def pair_up() -> tuple[list[int], int]:
    group = EngineGroup.join(2, timeout_s=60)
    return group.gather("work", dist.get_rank), group.lead("work", dist.get_rank)


def test_groups_are_of_consecutive_ranks_and_do_not_hear_one_another(tmp_path: Path) -> None:
    assert run_ranks(pair_up, tmp_path, num_ranks=4) == [([0, 1], 0)] * 2 + [([2, 3], 2)] * 2


def wait_for_one_that_ends() -> tuple[str, str, float] | None:
    group = EngineGroup.join(2, timeout_s=60)
    group.gather("work", lambda: None)
    if not group.is_leader:
        started = time.monotonic()
        return *raised(lambda: group.lead("work", lambda: None)), time.monotonic() - started
    Path(os.environ["RESULT"]).write_bytes(b"\x80\x04N.")  # a pickled None, as the rank returns
    os._exit(0)


def test_a_rank_that_has_ended_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESULT", str(tmp_path / "result0"))
    _, (kind, message, seconds) = run_ranks(wait_for_one_that_ends, tmp_path)
    assert kind == "EngineError"
    assert "ranks [0, 1] of the trainer share an engine; one of them has ended" in message
    assert seconds < 30  # not the time limit of 60


def check_gpus() -> tuple[object, ...]:
    group = EngineGroup.join(2, timeout_s=60)
    group.check_devices(torch.device("cpu"))
    group.check_devices(torch.device("cuda", 4 + group.place))
    return raised(lambda: group.check_devices(torch.device("cuda", 0)))


def test_ranks_whose_gpus_are_not_in_a_row_are_refused(tmp_path: Path) -> None:
    for kind, message in run_ranks(check_gpus, tmp_path):
        assert kind == "ValueError"
        assert "they have cuda:[0, 0]" in message
        assert "CUDA_VISIBLE_DEVICES" in message


def places_alone() -> list[object]:
    alone = EngineGroup.join(1, timeout_s=60)
    return [
        alone.size,
        alone.is_leader,
        alone.gather("work", dist.get_rank),
        alone.lead("work", dist.get_rank),
    ]


def bad_sizes() -> str:
    return raised(lambda: EngineGroup.join(3, timeout_s=60))[1]


def test_one_rank_an_engine_is_a_group_by_itself(tmp_path: Path) -> None:
    first, second = run_ranks(places_alone, tmp_path)
    assert first == [1, True, [0], 0]
    assert second == [1, True, [1], 1]


def test_ranks_that_do_not_divide_into_groups_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(bad_sizes, tmp_path):
        assert "2 ranks of the trainer cannot share engines of tp_size 3" in message


def test_a_trainer_of_one_process_is_alone_whatever_its_engine_takes() -> None:
    group = EngineGroup.join(4, timeout_s=1)
    assert (group.size, group.is_leader) == (1, True)
    assert group.deal("work", lambda: ["own"]) == "own"
    with pytest.raises(KeyError, match="key"):
        group.gather("work", lambda: fail(KeyError("key")))
