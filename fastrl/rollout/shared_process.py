"""SGLang's process as all ranks of a group see it: the leader's, which they ask together.

What is sent is the leader's, and all get the answer, but for two requests: of a publication each
rank sends the handles of its own copies, one payload for the tensor-parallel rank on its GPU; and
each rank asks for responses to its own prompts, which become one call and are dealt out again. In
that call the leader's strategy selector decides, and what it learned there all ranks are told.

Leaves out how ranks find one another (engine_group.py) and how the process is kept
(sglang_process.py).
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sglang_process import EngineError, EngineProcess, RawResponse, Role
from fastrl.rollout.sglang_steps import SessionReport

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One response to be generated."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    """SGLang's parameters, the seed of its randomness among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedRequests:
    """What all ranks of a group ask for."""

    requests: list[GenerateRequest]
    """What several ask alike is among them once: ranks that are tensor-parallel in the trainer too
    must all train on the same response."""
    places: list[list[int]]
    """By rank: where among them its own are, in its order."""
    options: Mapping[str, Any]
    """Of the whole call."""

    @property
    def longest(self) -> int:
        """Most tokens that one of them, prompt included, may become; 0 of none."""
        return max(
            (len(one.prompt) + int(one.sampling["max_new_tokens"]) for one in self.requests),
            default=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedResponses:
    """What a rank gets of a call."""

    raws: list[RawResponse]
    """To its own requests, in their order."""
    steps_by_num_accepted: Mapping[int, int]
    """As `RawResponse` has it, summed over the responses of all ranks."""
    report: SessionReport | None
    """Of the whole call, under FastRL's plugin. Its journal is the leader's alone: ranks exchange
    journals, and each step is to be learned once."""


class SharedProcess:
    """An engine's process, asked by every rank of its group in the same order.

    Args:
        group: of ranks that share it.
        new_log: makes the file that everything it prints goes to; called on the leader.
    """

    def __init__(self, group: EngineGroup, new_log: Callable[[], Path]) -> None:
        self._group = group
        self._own: EngineProcess | None = None  # the leader's
        self._has_ended = False
        self.has_failed = False
        """Whether it ended by an error, which its log then tells of."""

        def begin() -> tuple[int, Path, bytes]:
            self._own = EngineProcess(new_log())
            key = bytes(multiprocessing.current_process().authkey)
            return self._own.group, self._own.log_path, key

        self.group, self.log_path, key = group.lead("begin SGLang's process", begin)
        # SGLang fetches shared memory from every rank, and proves by the leader's key that it may.
        multiprocessing.current_process().authkey = key

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._has_ended

    @property
    def ranks(self) -> EngineGroup:
        """Those that share it."""
        return self._group

    def watch(self, processes: Iterable[int]) -> None:
        """As `EngineProcess.watch`, on the leader."""
        if self._own is not None:
            self._own.watch(processes)

    def call(self, request: str, timeout_s: float, **arguments: Any) -> Any:
        """As `EngineProcess.call`, with the leader's arguments; all ranks get answer or error."""
        return self._watched(
            lambda: self._group.lead(
                request, lambda: self._leaders.call(request, timeout_s, **arguments)
            )
        )

    def send_bucket(
        self,
        request: Literal["update", "compare", "remember"],
        role: Role,
        next_payloads: Callable[[], list[bytes] | None],
        timeout_s: float,
    ) -> bool:
        """Send a bucket of weights: the payloads of all ranks, in their order.

        Args:
            request: whether it is to be served, or to be held against what is; or is empty.
            role: which model it is of.
            next_payloads: this rank's payloads for SGLang's ranks on its GPUs, kept alive until
                this returns; None after the last bucket.
            timeout_s: for SGLang to take it.

        Returns whether there was one.
        """
        name = f"bucket of the {role} model's weights to {request}"
        payloads = self._watched(lambda: self._group.gather(name, next_payloads))
        given = [payload for own in payloads if own is not None for payload in own]
        if not given:
            return False
        assert None not in payloads, "ranks of a group made different numbers of buckets"
        self.call(request, timeout_s, role=role, payloads=given)
        return True

    def gather_requests(
        self, own_requests: Callable[[], list[GenerateRequest]], options: Mapping[str, Any]
    ) -> SharedRequests:
        """What all ranks ask for.

        Args:
            own_requests: makes this rank's; what it raises on one rank is raised on all.
            options: of the whole call.

        Raises ValueError unless the options are the same on all ranks.
        """
        asked = self._watched(
            lambda: self._group.gather(
                "requests to generate", lambda: (own_requests(), dict(options))
            )
        )
        if any(other != options for _, other in asked):
            raise ValueError(
                f"ranks that share an engine must ask alike, got {[one for _, one in asked]}"
            )
        requests, places = _without_repeats([own for own, _ in asked])
        return SharedRequests(requests=requests, places=places, options=options)

    def generate(
        self, asked: SharedRequests, timeout_s: float, selector: StrategySelector | None
    ) -> SharedResponses:
        """Responses to this rank's requests, generated with those of the other ranks.

        Args:
            asked: by all ranks.
            timeout_s: for all ranks' responses.
            selector: under FastRL's plugin, what chooses each step's strategy, if this rank leads.
        """
        if not asked.requests:
            return SharedResponses(raws=[], steps_by_num_accepted={}, report=None)

        def deal() -> list[SharedResponses]:
            raws: list[RawResponse]
            raws, report = self._leaders.call(
                "generate",
                timeout_s,
                prompts=[request.prompt for request in asked.requests],
                sampling=[request.sampling for request in asked.requests],
                selector=selector,
                **asked.options,
            )
            counts: Counter[int] = Counter()
            for raw in raws:
                counts.update(dict(enumerate(raw.steps_by_num_accepted)))
            without_journal = None if report is None else replace(report, journal=None)
            return [
                SharedResponses(
                    raws=[raws[place] for place in own],
                    steps_by_num_accepted=counts,
                    report=without_journal if number else report,
                )
                for number, own in enumerate(asked.places)
            ]

        return self._watched(lambda: self._group.deal("generate", deal))

    def end(self) -> None:
        """Kill every process of it; waits for no other rank. Safe to call twice."""
        self._has_ended = True
        if self._own is not None:
            self._own.end()

    def discard_log(self) -> None:
        """Delete the log, if it is this rank's."""
        if self._own is not None:
            self.log_path.unlink()

    @property
    def _leaders(self) -> EngineProcess:
        assert self._own is not None, "only the group's leader owns the process"
        return self._own

    def _check_running(self) -> None:
        if self._has_ended:
            raise EngineError("the SGLang engine has ended; start it anew")

    def _watched(self, ask: Callable[[], T]) -> T:
        self._check_running()
        try:
            return ask()
        except EngineError:
            self.has_failed = True
            self.end()
            raise


def _without_repeats(
    asked: Sequence[Sequence[GenerateRequest]],
) -> tuple[list[GenerateRequest], list[list[int]]]:
    """Different requests of all ranks, and where among them each rank's own are."""
    place_of: dict[tuple[tuple[int, ...], str], int] = {}
    requests: list[GenerateRequest] = []
    places: list[list[int]] = []
    for own in asked:
        places.append([])
        for request in own:
            key = (request.prompt, repr(request.sampling))
            place = place_of.setdefault(key, len(requests))
            if place == len(requests):
                requests.append(request)
            places[-1].append(place)
    return requests, places
