"""Scores responses in worker processes, each response under its own time limit.

A score that hangs, raises, kills its worker or is no finite number becomes 0 with a named failure,
and costs no other response its score. Workers start from a fork server, never from this process
(whose torch threads a fork would break), ignore Ctrl-C, and end with this process however it ends.

pebble's pool (https://pebble.readthedocs.io) schedules, watches the time and replaces workers.
Leaves out what a reward is worth; see base.py.
"""

from __future__ import annotations

import fcntl
import logging
import math
import multiprocessing
import numbers
import os
import pickle
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from fastrl.datamodules.rewards.base import BatchRewardFunction, RewardFunction
from fastrl.types import Prompt, RewardResult

_log = logging.getLogger(__name__)

_MAX_POOL_STARTS = 3
_LARGEST_SCORE = torch.finfo(torch.float32).max
"""A batch holds its rewards in float32."""


class RewardPool:
    """Worker processes for one reward function; they start on first use, or with `start`.

    Args:
        reward: scores responses; must be picklable.
        num_workers: worker processes.
        timeout_s: time limit of one response, or of one call of a BatchRewardFunction.
    """

    def __init__(self, reward: RewardFunction, *, num_workers: int, timeout_s: float) -> None:
        if num_workers < 1:
            raise ValueError(f"reward_workers must be >= 1, got {num_workers}")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"reward_timeout_s must be a positive number, got {timeout_s}")
        self._reward = reward
        self._pickled_reward = _pickle(reward)
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._pool: ProcessPool | None = None

    def prepare(self) -> None:
        """Start the fork server and its imports, seconds of work, without waiting for them."""
        # Imported once there instead of in each worker, the replacement of a killed one included.
        forkserver.set_forkserver_preload(["__main__", __name__, type(self._reward).__module__])
        # What is blocked here stays blocked there, and in the workers, while they still import. The
        # resource tracker comes first, because starting it unblocks.
        resource_tracker.ensure_running()
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def start(self) -> None:
        """Start the workers unless they are running, without waiting for their imports."""
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self.prepare()
            self._pool = ProcessPool(
                max_workers=self._num_workers,
                initializer=_install_reward,
                initargs=(self._pickled_reward,),
                context=multiprocessing.get_context("forkserver"),
            )
            if not self._pool.active:  # Asking is what starts it.
                raise self._no_workers()

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[RewardResult]:
        """Reward of each response to the prompt beside it.

        Raises:
            ValueError: a BatchRewardFunction gave another number of rewards than it was given
                responses.
            RuntimeError: no worker can be started.
        """
        assert len(texts) == len(prompts), f"{len(texts)} texts, {len(prompts)} prompts"
        if isinstance(self._reward, BatchRewardFunction):
            results = self._score_together(texts, prompts)
        else:
            results = self._score_each(texts, prompts)
        self._report(results)
        return results

    def close(self) -> None:
        """End the workers, whatever they are doing; safe to call twice, and `start` works again."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _score_each(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[RewardResult]:
        results: dict[int, RewardResult] = {}
        for _ in range(_MAX_POOL_STARTS):
            missing = [index for index in range(len(texts)) if index not in results]
            futures = [self._schedule(_score_one, texts[i], prompts[i]) for i in missing]
            for index, future in zip(missing, futures, strict=True):
                if (result := self._outcome(future)) is not None:
                    results[index] = result
            if len(results) == len(texts):
                return [results[index] for index in range(len(texts))]
        raise self._no_workers()

    def _score_together(
        self, texts: Sequence[str], prompts: Sequence[Prompt]
    ) -> list[RewardResult]:
        for _ in range(_MAX_POOL_STARTS):
            future = self._schedule(_score_batch, list(texts), list(prompts))
            outcome: RewardResult | list[RewardResult] | None = self._outcome(future)
            if isinstance(outcome, RewardResult):
                return [outcome] * len(texts)
            if outcome is not None:
                if len(outcome) != len(texts):
                    raise ValueError(
                        f"{type(self._reward).__name__}.score_batch returned {len(outcome)} "
                        f"rewards for {len(texts)} responses; it must return one each, in order"
                    )
                return outcome
        raise self._no_workers()

    def _schedule(self, function: Any, *args: Any) -> ProcessFuture[Any]:
        self.start()
        assert self._pool is not None
        return self._pool.schedule(function, args=args, timeout=self._timeout_s)

    def _outcome(self, future: ProcessFuture[Any]) -> Any:
        """What the worker returned, a failure that names why it did not, or None if the pool
        broke."""
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, BrokenProcessPool | CancelledError):
            return None
        if isinstance(error, TimeoutError):
            failure = f"timeout after {self._timeout_s} s"
        elif isinstance(error, ProcessExpired):
            failure = f"worker process died with exit code {error.exitcode}"
        else:
            failure = _describe(error)
        return RewardResult(score=0.0, failure=failure)

    def _report(self, results: Sequence[RewardResult]) -> None:
        failures = Counter(result.failure for result in results if result.failure is not None)
        if failures:
            named = "; ".join(
                f"{failure} ({count} x)" for failure, count in failures.most_common(5)
            )
            _log.warning(
                "%d of %d rewards of %s failed and count as 0: %s",
                failures.total(),
                len(results),
                type(self._reward).__name__,
                named,
            )

    def _no_workers(self) -> RuntimeError:
        return RuntimeError(
            f"reward workers for {type(self._reward).__name__} could not be kept running after "
            f"{_MAX_POOL_STARTS} starts; the workers' errors are above. The reward must be "
            f"importable in a fresh process: define it in a module, not in a notebook or under `if "
            f"__name__`"
        )


def _pickle(reward: RewardFunction) -> bytes:
    """The reward as workers receive it; ValueError naming it if it cannot travel."""
    try:
        pickled = pickle.dumps(reward)
        pickle.loads(pickled)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"reward {type(reward).__name__} cannot be pickled, but rewards run in worker "
            f"processes: {error}; define its class in a module, and keep lambdas, locks and open "
            f"files out of its attributes"
        ) from error
    return pickled


# What follows runs in the workers.

_worker_reward: RewardFunction


def _install_reward(pickled_reward: bytes) -> None:
    global _worker_reward
    _end_with_parent()
    _worker_reward = pickle.loads(pickled_reward)


def _end_with_parent() -> None:
    """Have the kernel end this worker when the parent is gone, even one hung with the GIL held.

    The sentinel is a pipe of which the parent holds the other end; SIGIO, by default deadly on
    Linux, tells of its closing. (Elsewhere an idle worker still ends when its queue closes.)
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a reward worker is started by its pool"
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)


def _score_one(text: str, prompt: Prompt) -> RewardResult:
    try:
        value = _worker_reward.score(text, prompt)
    except (
        Exception
    ) as error:  # Any error of the user's code: named in the result, counted, logged.
        return RewardResult(score=0.0, failure=_describe(error))
    return _checked(value)


def _score_batch(texts: list[str], prompts: list[Prompt]) -> RewardResult | list[RewardResult]:
    """A result each, or one failure for all."""
    assert isinstance(_worker_reward, BatchRewardFunction)
    try:
        values = list(_worker_reward.score_batch(texts, prompts))
    except Exception as error:  # As above.
        return RewardResult(score=0.0, failure=_describe(error))
    return [_checked(value) for value in values]


def _checked(value: object) -> RewardResult:
    if not isinstance(value, numbers.Real):
        return RewardResult(score=0.0, failure=f"returned {type(value).__name__}, expected a float")
    score = float(value)
    if not abs(score) <= _LARGEST_SCORE:  # NaN is not, either
        return RewardResult(score=0.0, failure=f"returned {score}")
    return RewardResult(score=score)


def _describe(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}"
