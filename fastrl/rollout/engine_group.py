"""Ranks of the trainer that share one engine, and what they tell one another.

With tensor parallelism an engine takes the GPUs of `tp_size` consecutive ranks. The first of them
leads: it owns the engine. All ranks of a group call the same in the same order; what one of them
raises, all raise, so that none waits for a rank that has given up. A rank that has ended is noticed
by its closed connection.

Messages go over a gloo process group of their own: a rank that waits for rollouts neither blocks
its GPU nor meets the time limit of the trainer's collectives. Leaves out groups across machines.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from fastrl.rollout.sglang_process import EngineError

T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """Of some work on one rank: a value, or what it raised."""

    value: T | None
    """None after an error."""
    error: Exception | None = None


class EngineGroup:
    """The ranks that share an engine, seen from one of them; alone where an engine has one rank.

    Args:
        ranks: of the trainer, in order; the first leads.
        place: of this rank among them.
        process_group: over which they talk; None for a group of one.
    """

    def __init__(
        self, ranks: Sequence[int], place: int, process_group: dist.ProcessGroup | None
    ) -> None:
        self._ranks = tuple(ranks)
        self._place = place
        self._process_group = process_group

    @classmethod
    def join(cls, tp_size: int, *, timeout_s: float) -> EngineGroup:
        """The group of this rank. All ranks of the trainer call this together.

        A trainer of one process is a group by itself, whatever the `tp_size` of its engine.

        Args:
            tp_size: ranks that share an engine.
            timeout_s: longest wait for another rank, its engine's work included.

        Raises:
            ValueError: the trainer's ranks cannot be divided into groups of that size.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls([0], 0, None)
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        if num_ranks % tp_size:
            raise ValueError(
                f"{num_ranks} ranks of the trainer cannot share engines of tp_size {tp_size}: "
                f"expected a multiple; set engine.tp_size, or trainer.devices and trainer.num_nodes"
            )
        if tp_size == 1:
            return cls([rank], 0, None)
        process_group, _ = dist.new_subgroups(  # type: ignore[no-untyped-call]
            tp_size, timeout=timedelta(seconds=timeout_s), backend="gloo"
        )
        assert process_group is not None, "every rank is in one of the groups"
        first = rank - rank % tp_size
        return cls(range(first, first + tp_size), rank - first, process_group)

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self._ranks)

    @property
    def place(self) -> int:
        """Of this rank in the group: its tensor-parallel rank; 0 leads."""
        return self._place

    @property
    def is_leader(self) -> bool:
        """Whether this rank owns the engine."""
        return self._place == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Have every rank do `work`: the results of all, on all. Raises what any of them raised."""
        outcomes = self._exchange(_outcome(work))
        self._raise_any(outcomes)
        return [cast(T, outcome.value) for outcome in outcomes]

    def agree(self, work: Callable[[], T]) -> T:
        """Have every rank do `work`: its own result each. Raises what any of them raised."""
        own = _outcome(work)
        self._raise_any(self._exchange(_Outcome(None, own.error)))
        return cast(T, own.value)

    def lead(self, work: Callable[[], T]) -> T:
        """Have the leader do `work`: its result on all ranks. Raises what it raised."""
        return self.deal(lambda: [work()] * self.size)

    def deal(self, work: Callable[[], Sequence[T]]) -> T:
        """Have the leader do `work`: of its results, one a rank, each its own. Raises what it
        raised."""
        own: _Outcome[T] = _Outcome(None)
        shares: list[_Outcome[T]] | None = None
        if self.is_leader:
            done = _outcome(work)
            shares = [_Outcome(None, done.error)] * self.size
            if done.value is not None:
                shares = [_Outcome(value) for value in done.value]
            own = shares[0]
        if self._process_group is not None:
            received: list[Any] = [None]
            with self._waiting():
                dist.scatter_object_list(
                    received,
                    shares and [_portable(share) for share in shares],
                    src=self._ranks[0],
                    group=self._process_group,
                )
            if not self.is_leader:
                own = received[0]
        self._raise_any([own])
        return cast(T, own.value)

    def check_devices(self, device: torch.device) -> None:
        """Raise ValueError unless the ranks are on one machine, with GPUs in a row: SGLang takes
        as many from the leader's on."""
        if self.size == 1:
            return
        index = 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
        machine = (socket.gethostname(), _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "")
        places = self.gather(lambda: (machine, index))
        if len({machine for machine, _ in places}) > 1:
            raise ValueError(
                f"ranks {list(self._ranks)} share an engine, but are on several machines "
                f"({sorted({name for (name, _), _ in places})}); set engine.tp_size to a divisor "
                f"of the ranks on each"
            )
        indices = [index for _, index in places]
        if device.type == "cuda" and indices != [indices[0] + n for n in range(self.size)]:
            raise ValueError(
                f"ranks {list(self._ranks)} share an engine, which takes GPUs in a row from the "
                f"first's on, but they have cuda:{indices}; let every rank see all GPUs of the "
                f"machine (the same CUDA_VISIBLE_DEVICES), and set engine.device to 'auto'"
            )

    def _exchange(self, own: _Outcome[T]) -> list[_Outcome[T]]:
        """The outcomes of all ranks; this one's as it is, not a copy."""
        if self._process_group is None:
            return [own]
        outcomes: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(outcomes, _portable(own), group=self._process_group)
        outcomes[self._place] = own
        return outcomes

    def _raise_any(self, outcomes: Sequence[_Outcome[T]]) -> None:
        """Raise the error of this rank, or else of the first that has one, with its number."""
        failed = [place for place, outcome in enumerate(outcomes) if outcome.error is not None]
        if not failed:
            return
        place = self._place if self._place in failed else failed[0]
        error = cast(Exception, outcomes[place].error)
        if place != self._place:
            error.add_note(f"on rank {self._ranks[place]}, which shares this rank's engine")
        raise error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo: a closed connection, or its time limit
            raise EngineError(
                f"ranks {list(self._ranks)} of the trainer share an engine; one of them has ended, "
                f"or did not come this far in time: {error}. What it printed tells why"
            ) from error


def _outcome(work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work())
    except Exception as error:
        return _Outcome(None, error)


def _portable(outcome: _Outcome[T]) -> _Outcome[T]:
    """One that can be sent; errors that cannot be pickled become RuntimeErrors that quote them."""
    if outcome.error is None:
        return outcome
    try:
        pickle.loads(pickle.dumps(outcome.error))
    except Exception:
        return _Outcome(None, RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}"))
    return outcome
