"""Which ranks of the trainer still generate: a board that all of them write on and read.

In a data-parallel rollout the ranks that finish early wait for the longest response. Each rank
writes here when it begins a rollout, has finished it, and has come back from its idle time; ranks
that have finished read how many have. Nobody is stopped by what a single rank writes, its own end
least of all: idle time ends when the count of finished ranks is that of all ranks.

    begin ──▶ generate ──▶ finished ──▶ idle time, handed to a hook ──▶ all finished ──▶ done

The board is a few keys in the process group's store: no collective, no thread, no service. A count
is one round trip, whatever the number of ranks; keys of a rollout are deleted when all ranks have
finished the next. All ranks take the same rollouts in the same order.

A rank that waits for others beyond a time limit raises, and so does one whose peer has failed or,
on the same machine, ended; the errors name the ranks and what they last wrote. Leaves out what is
done with idle time, and which ranks share an engine (engine_group.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from fastrl.rollout.process_identity import ProcessIdentity, has_ended, own_identity

_Phase = Literal["finished", "done"]
"""What ranks wait for: that all have generated, and that all are back from their idle time."""
_PASSED: dict[_Phase, tuple[str, ...]] = {
    "finished": ("idle", "in idle work", "done"),
    "done": ("done",),
}
"""What a rank has written last that is as far."""
_FAILED = -(1 << 40)
"""Added to a count by a rank that fails: it is negative from then on."""
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 0.0005, 0.02
_LOOK_EVERY_S = 1.0
"""Between looks at whether the processes of this machine's ranks run."""
_LINGER_S = 2.0
"""That a failed rank 0 stays: its process may keep the store, in which others read why."""


class RankError(RuntimeError):
    """Another rank of the trainer has failed, has ended, or did not come this far in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleWindow:
    """Time that a rank has no use for: it has finished its rollouts, and others have not."""

    should_stop: Callable[[], bool]
    """Ask after every micro-step; once true, return at once."""
    num_idle_ranks: Callable[[], int]
    """That have finished, this one among them; it never falls."""


IdleHook = Callable[[IdleWindow], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleTime:
    """Of one rank in one rollout."""

    seconds: float
    """From its own end until all ranks go on."""
    overrun_s: float
    """From the last rank's end to when this rank was back, by the clocks of both: at most the
    micro-step that it was in. 0 for the last rank."""


class RankBoard:
    """The board as one rank sees it.

    Args:
        store: of keys of this board's own, shared by the ranks.
        rank: of this process.
        num_ranks: that take part, all of them in every rollout.
        timeout_s: longest wait for another rank in seconds, its whole rollout included.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._rollout = 0  # from 1
        self._waits_since = 0.0
        self._looked_at = 0.0
        self._has_failed = False
        self._identity = own_identity()
        self._neighbours: dict[int, ProcessIdentity] | None = None  # other ranks of this machine
        self._write("started")

    @classmethod
    def join(cls, timeout_s: float) -> RankBoard:
        """The board of all ranks of the default process group, a new one each time: all call this
        together. A process without a group has one for itself."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(dist.HashStore(), 0, 1, timeout_s)  # type: ignore[attr-defined]
        rank = dist.get_rank()
        # A connection of its own: that of the group is busy while a communicator is set up.
        store: Store = _get_default_store().clone()  # type: ignore[attr-defined]
        number = store.add(f"fastrl/rank_board/joined_by_{rank}", 1)
        board = PrefixStore(f"fastrl/rank_board/{number}", store)
        return cls(board, rank, dist.get_world_size(), timeout_s)

    # -- a rollout --------------------------------------------------------------------------------

    def begin(self) -> None:
        """This rank begins its next rollout."""
        self._rollout += 1
        self._waits_since = self._looked_at = time.monotonic()
        with self._asking():
            self._write("generating")

    def pass_idle_time(self, hook: IdleHook | None) -> IdleTime:
        """This rank has finished: hand what time is left to the hook, and return with all ranks.

        Raises:
            RankError: another rank has failed, has ended, or is not back within the time limit.
        """
        finished = time.perf_counter()
        is_last = self._finish()
        if not is_last:
            if hook is not None and self.others_generate():
                with self._asking():
                    self._write("in idle work")
                hook(
                    IdleWindow(
                        should_stop=lambda: not self.others_generate(),
                        num_idle_ranks=lambda: self._count("finished"),
                    )
                )
            self._wait_for("finished")
        overrun_s = 0.0 if is_last else self._seconds_since_the_end()
        with self._asking():
            self._arrive("done")
            self._write("done")
        self._wait_for("done")
        return IdleTime(seconds=time.perf_counter() - finished, overrun_s=overrun_s)

    def others_generate(self) -> bool:
        """Whether any rank has not finished this rollout. One round trip to the store.

        Raises:
            RankError: as `pass_idle_time`.
        """
        return self._count("finished") < self._num_ranks

    def explain(self, error: BaseException) -> None:
        """Add to an error what is known of ranks that have failed or ended: one raised by a
        collective, in the update say, comes of that and names nobody."""
        own = f"failed with {type(error).__name__}: {str(error)[:1000]}"
        try:
            notes = self._notes()
        except dist.DistError:
            error.add_note(
                f"rank {self._rank} cannot reach the process group's store: rank 0 keeps it (or "
                f"torchrun's agent), and has ended; what it printed tells why; resume with "
                f"--ckpt_path last"
            )
            return
        gone = [
            f"rank {rank} {note.what}"
            if note.is_failed
            else f"rank {rank} has ended: it {_told(note)}"
            for rank, note in notes.items()
            if note.what != own and (note.is_failed or has_ended(note.process, self._identity))
        ]
        if gone:
            error.add_note(
                f"{'; '.join(gone)}. What that rank printed tells why; resume with --ckpt_path last"
            )

    def fail(self, error: BaseException) -> None:
        """Have the ranks that wait for this one, now or in the next rollout, raise at once."""
        if self._has_failed:
            return
        self._has_failed = True
        with suppress(dist.DistError):  # without a store they raise by themselves
            self._write(f"failed with {type(error).__name__}: {str(error)[:1000]}")
            for rollout in (self._rollout, self._rollout + 1):
                for phase in _PASSED:
                    self._store.add(self._key(phase, rollout), _FAILED)
        if self._rank == 0 and self._num_ranks > 1:
            time.sleep(_LINGER_S)

    def _finish(self) -> bool:
        """This rank has finished generating; whether it is the last."""
        with self._asking():
            is_last = self._arrive("finished") == self._num_ranks
            if is_last:
                self._store.set(self._key("ended_at"), repr(time.time()))
            self._write("idle")
            if is_last:
                # Nobody reads the keys before: all ranks have finished a later rollout.
                for name in (*_PASSED, "ended_at"):
                    self._store.delete_key(self._key(name, self._rollout - 1))
        return is_last

    # -- counting and waiting ---------------------------------------------------------------------

    def _arrive(self, phase: _Phase) -> int:
        """Count this rank; the number that have arrived."""
        self._waits_since = self._looked_at = time.monotonic()
        return self._checked(self._store.add(self._key(phase), 1))

    def _count(self, phase: _Phase) -> int:
        """Ranks that have arrived; raises RankError where it is in vain to wait for the others."""
        with self._asking():
            count = self._checked(self._store.add(self._key(phase), 0))
            if count == self._num_ranks:
                return count
            now = time.monotonic()
            if now - self._looked_at > _LOOK_EVERY_S:
                self._looked_at = now
                self._look_at_neighbours(phase)
            if now - self._waits_since > self._timeout_s:
                others = (rank for rank in range(self._num_ranks) if rank != self._rank)
                missing = [rank for rank in others if self._is_missing(rank, phase)]
                self._raise_missing(
                    missing,
                    f"did not come this far within the {self._timeout_s:g} s of "
                    f"data.rank_timeout_s (raise it if responses just take that long)",
                )
        return count

    def _wait_for(self, phase: _Phase) -> None:
        """Until all ranks have arrived; between counts it sleeps a hundredth of the time waited."""
        started = time.monotonic()
        while self._count(phase) < self._num_ranks:
            waited = time.monotonic() - started
            time.sleep(min(max(waited / 100, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))

    def _seconds_since_the_end(self) -> float:
        with self._asking():
            return max(time.time() - float(self._store.get(self._key("ended_at"))), 0.0)

    def _key(self, name: str, rollout: int | None = None) -> str:
        return f"{self._rollout if rollout is None else rollout}/{name}"

    # -- what ranks last wrote --------------------------------------------------------------------

    def _write(self, what: str) -> None:
        written = {
            "rollout": self._rollout,
            "what": what,
            "at": time.time(),
            "process": self._identity,
        }
        self._store.set(f"rank{self._rank}", json.dumps(written))

    def _read(self, rank: int) -> _Note | None:
        key = f"rank{rank}"
        if not self._store.check([key]):
            return None
        written = json.loads(self._store.get(key))
        return _Note(**written | {"process": ProcessIdentity(*written["process"])})

    def _notes(self) -> dict[int, _Note]:
        """Of the other ranks that have written any."""
        ranks = (rank for rank in range(self._num_ranks) if rank != self._rank)
        return {rank: note for rank in ranks if (note := self._read(rank)) is not None}

    def _checked(self, count: int) -> int:
        """Raise RankError for a count that a failed rank has made negative."""
        if count >= 0:
            return count
        failed = [f"rank {rank} {n.what}" for rank, n in self._notes().items() if n.is_failed]
        raise self._given_up(
            f"rank {self._rank} gives up rollout {self._rollout}: {'; '.join(failed)}. What that "
            f"rank printed tells why; resume with --ckpt_path last"
        )

    def _given_up(self, message: str) -> RankError:
        """What this rank raises; those that wait for it are told."""
        error = RankError(message)
        self.fail(error)
        return error

    def _look_at_neighbours(self, phase: _Phase) -> None:
        """Raise RankError if the process of a rank that is waited for has ended."""
        if self._neighbours is None:
            notes = self._notes()
            if len(notes) < self._num_ranks - 1:
                return  # until all have joined
            self._neighbours = {
                rank: note.process
                for rank, note in notes.items()
                if note.process.place == self._identity.place
            }
        gone = [rank for rank, one in self._neighbours.items() if has_ended(one, self._identity)]
        if missing := [rank for rank in gone if self._is_missing(rank, phase)]:
            self._raise_missing(missing, "has ended without a word")

    def _is_missing(self, rank: int, phase: _Phase) -> bool:
        note = self._read(rank)
        return note is None or not note.has_passed(self._rollout, phase)

    def _raise_missing(self, missing: Iterable[int], why: str) -> None:
        told = "; ".join(f"rank {rank} {why}: it {_told(self._read(rank))}" for rank in missing)
        waited = time.monotonic() - self._waits_since
        raise self._given_up(
            f"rank {self._rank} has waited {waited:.0f} s in rollout {self._rollout}. {told}. What "
            f"that rank printed tells why; resume with --ckpt_path last"
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Name who is gone when the store is."""
        try:
            yield
        except dist.DistError as error:
            raise RankError(
                f"rank {self._rank} cannot reach the process group's store in rollout "
                f"{self._rollout}: {error}. Rank 0 keeps it (or torchrun's agent), and has ended; "
                f"what it printed tells why; resume with --ckpt_path last"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Note:
    """What a rank last wrote."""

    rollout: int
    what: str
    at: float
    """By its own clock, in seconds since the epoch."""
    process: ProcessIdentity

    @property
    def is_failed(self) -> bool:
        return self.what.startswith("failed")

    def has_passed(self, rollout: int, phase: _Phase) -> bool:
        is_as_far = self.rollout == rollout and self.what in _PASSED[phase]
        return not self.is_failed and (self.rollout > rollout or is_as_far)


def _told(note: _Note | None) -> str:
    if note is None:
        return "never wrote anything"
    ago = timedelta(seconds=round(max(time.time() - note.at, 0)))
    return f"last wrote '{note.what}' in rollout {note.rollout}, {ago} ago by its clock"
