"""Ranks of the trainer that share one engine, and what they tell one another.

With tensor parallelism an engine takes the GPUs of `tp_size` consecutive ranks. The first of them
leads: it owns the engine. All ranks of a group call the same in the same order; what one of them
raises, all raise, so that none waits for a rank that has given up. Every operation begins with one
and the same kind of collective, in which each rank says where it is: ranks that are out of step are
told so, all of them. A rank that has ended is noticed by its closed connection.

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


@dataclass(frozen=True, slots=True)
class _Message:
    """What a rank tells the others of an operation it is in."""

    operation: str
    number: int
    """Of the operation on this rank, from 1."""
    outcome: _Outcome[bytes]
    """Its value pickled by itself: only ranks that are in step read it."""


class EngineGroup:
    """The ranks that share an engine, seen from one of them; alone where an engine has one rank.

    Every operation has a name, by which ranks notice that they are in different ones. They raise
    EngineError then, and in every operation that follows: none can know what of its work the others
    still wait for.

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
        self._num_operations = 0
        self._out_of_step: str | None = None

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

    def gather(self, name: str, work: Callable[[], T]) -> list[T]:
        """Have every rank do `work`: the results of all, on all. Raises what any of them raised."""
        outcomes = self._exchange(name, work)
        self._raise_any(outcomes)
        return [cast(T, outcome.value) for outcome in outcomes]

    def agree(self, name: str, work: Callable[[], T]) -> T:
        """Have every rank do `work`: its own result each. Raises what any of them raised."""
        own: list[T] = []
        self.gather(name, lambda: own.append(work()))
        return own[0]

    def lead(self, name: str, work: Callable[[], T]) -> T:
        """Have the leader do `work`: its result on all ranks. Raises what it raised."""
        return cast(T, self.gather(name, work if self.is_leader else lambda: None)[0])

    def deal(self, name: str, work: Callable[[], Sequence[T]]) -> T:
        """Have the leader do `work`: of its results, one a rank, each its own. Raises what it
        raised."""
        own: list[T] = []
        pickled: list[bytes] = []  # the leader's

        def deal_out() -> None:
            shares = work()
            if self._process_group is not None:
                pickled.extend(map(_pickled, shares))
            own.append(shares[0])

        self.gather(name, deal_out if self.is_leader else lambda: None)
        if self._process_group is not None:
            received: list[Any] = [None]
            with self._waiting():
                dist.scatter_object_list(
                    received, pickled, src=self._ranks[0], group=self._process_group
                )
            if not self.is_leader:
                own.append(pickle.loads(received[0]))
        return own[0]

    def check_devices(self, device: torch.device) -> None:
        """Raise ValueError unless the ranks are on one machine, with GPUs in a row: SGLang takes
        as many from the leader's on."""
        if self.size == 1:
            return
        index = 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
        machine = (socket.gethostname(), _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "")
        places = self.gather("devices", lambda: (machine, index))
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

    def _exchange(self, name: str, work: Callable[[], T]) -> list[_Outcome[T]]:
        """The outcomes of all ranks' work; this one's as it is, not a copy."""
        if self._out_of_step is not None:
            raise EngineError(self._out_of_step)
        self._num_operations += 1
        number = self._num_operations
        own = _outcome(work)
        if self._process_group is None:
            return [own]
        packed = _packed(own)
        if own.error is None and packed.error is not None:
            own = _Outcome(None, packed.error)
        messages: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(
                messages, _Message(name, number, packed), group=self._process_group
            )
        self._check_in_step(messages)
        return [
            own if place == self._place else _unpacked(message.outcome)
            for place, message in enumerate(messages)
        ]

    def _check_in_step(self, messages: Sequence[_Message]) -> None:
        """Raise EngineError unless all ranks are in the same operation."""
        if len({(one.operation, one.number) for one in messages}) == 1:
            return
        places = ", ".join(
            f"rank {rank} in {one.operation!r} (its operation {one.number})"
            for rank, one in zip(self._ranks, messages, strict=True)
        )
        self._out_of_step = (
            f"ranks {list(self._ranks)} of the trainer share an engine and must ask the same of it "
            f"in the same order, but they are out of step: {places}. Call the engine's methods on "
            f"all of them, and start it anew"
        )
        raise EngineError(self._out_of_step)

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


def _packed(outcome: _Outcome[Any]) -> _Outcome[bytes]:
    """One that can be sent: a value that cannot be pickled becomes an error, and errors that cannot
    become RuntimeErrors that quote them."""
    if outcome.error is None:
        return _outcome(lambda: _pickled(outcome.value))
    try:
        pickle.loads(pickle.dumps(outcome.error))
    except Exception:
        return _Outcome(None, RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}"))
    return _Outcome(None, outcome.error)


def _unpacked(outcome: _Outcome[bytes]) -> _Outcome[Any]:
    if outcome.value is None:
        return _Outcome(None, outcome.error)
    return _Outcome(pickle.loads(outcome.value))


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"a {type(value).__name__} cannot be sent to the other ranks that share the engine: "
            f"expected something that can be pickled, got {type(error).__name__}: {error}"
        ) from error
