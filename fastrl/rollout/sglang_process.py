"""The process group in which SGLang lives, as seen from the trainer.

SGLang kills its own parent with SIGKILL when a scheduler of it fails, so the `sglang.Engine` is not
started here but in a child (sglang_host.py) that leads a process group of its own. This file starts
the child, sends it one message at a time, each with a time limit, and ends the whole group when
anything goes wrong: an engine that does not start, dies or hangs becomes an `EngineError` that
quotes its log. SGLang does not see one of its processes die while it waits for an answer of it, so
that is looked after here. When the trainer is killed, the child sees it and ends its group by
itself.

Leaves out what the messages mean, and imports nothing of SGLang: the trainer stays free of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastrl.rollout.sglang_steps import RequestSteps

Role = Literal["target", "draft"]
"""Which of an engine's two models."""

_LOG_LINES = 25
_END_TIMEOUT_S = 30.0
_LOOK_INTERVAL_S = 1.0
_LAUNCHER_VARIABLES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",  # 1 under torchrun
    }
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ROLE_", "PET_", "PL_")


class Outcome(Enum):
    """What became of a request, in the child's words."""

    ANSWERED = "answered"
    FAILED = "failed"
    """It raised: the engine's state is unknown."""
    UNREAD = "unread"
    """It could not be unpickled: the engine is as it was."""


class EngineError(RuntimeError):
    """SGLang did not start, died, hung, or refused a request; its processes have been ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartedEngine:
    """What an engine says of itself once it can serve."""

    sglang_version: str
    pool_tokens: int
    """Tokens that the KV cache can hold."""
    processes: tuple[int, ...]
    """Ids of those that it needs: schedulers and detokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawResponse:
    """One response as SGLang gives it, before it becomes a `Rollout`."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the tokens, under the distribution that was sampled."""
    finish_type: str
    """`stop` or `length`; `abort` for a request that SGLang gave up."""
    finish_detail: str
    """What stopped it (a token, a string), or why it was given up."""
    num_cached_tokens: int
    """Prompt tokens whose keys and values were in the cache."""
    steps_by_num_accepted: tuple[int, ...]
    """[n]: verification steps that accepted n draft tokens; empty without speculation."""
    hidden_TD: NDArray[np.float32] | None
    """One row for each token of the prompt and the response but the last, where asked for."""
    steps: RequestSteps | None = None
    """Its decode steps in order, where FastRL's plugin counts them."""


class EngineProcess:
    """An engine's process group, and the connection to its leader.

    Args:
        log_path: file that everything it prints goes to.
        environment: variables to give it; those of the trainer's launcher are left out.
    """

    def __init__(self, log_path: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._log_path = log_path
        ours, theirs = multiprocessing.Pipe()
        with log_path.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fastrl.rollout.sglang_host",
                    f"--connection={theirs.fileno()}",
                    f"--trainer={os.getpid()}",
                ],
                env=_scrubbed(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own; Ctrl-C is the trainer's alone
            )
        self._connection: Connection[Any, Any] = ours
        self._needed: dict[int, str] = {}
        self._has_ended = False
        self.has_failed = False
        """Whether it ended by an error, which its log then tells of."""
        # The schedulers fetch shared memory from this process, and prove by this key that they may.
        self._connection.send(bytes(multiprocessing.current_process().authkey))

    @property
    def has_ended(self) -> bool:
        """Whether all its processes are gone."""
        return self._has_ended

    @property
    def group(self) -> int:
        """Id of the process group, which is that of its leader."""
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The file that everything it prints goes to."""
        return self._log_path

    def watch(self, processes: Iterable[int]) -> None:
        """From now on the engine has died when one of these processes of its group has."""
        self._needed = {pid: _title(pid) for pid in processes}

    def call(self, request: str, timeout_s: float, **arguments: Any) -> Any:
        """Have the child run one of its `serve_…` functions, and return what that returns.

        Raises:
            EngineError: it raises, dies, loses a process that it needs, or has not answered after
                `timeout_s` seconds; the group is ended before.
            ValueError: the arguments cannot be unpickled there; it serves on.
        """
        if self._has_ended:
            raise EngineError(f"{request!r}: the SGLang engine has ended; start it anew")
        try:
            self._connection.send((request, arguments))
            self._wait_for_answer(request, timeout_s)
            outcome, answer = self._connection.recv()
        except (EOFError, OSError):
            self._fail(f"died during {request!r} ({self._exit_status()})")
        if outcome is Outcome.UNREAD:
            raise ValueError(
                f"the SGLang engine's process cannot unpickle what {request!r} was given: "
                f"{answer}. Classes of a strategy selector must be found there by import: define "
                f"them in a module on the PYTHONPATH, not in the script that is run. The engine "
                f"goes on"
            )
        if outcome is Outcome.FAILED:
            self._fail(f"failed at {request!r}: {answer}")
        return answer

    def _wait_for_answer(self, request: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (seconds := deadline - time.monotonic()) > 0:
            if self._connection.poll(min(seconds, _LOOK_INTERVAL_S)):
                return
            living = living_members(self.group)
            lost = [f"{pid} ({title})" for pid, title in self._needed.items() if pid not in living]
            if lost and not self._connection.poll():
                self._fail(f"died during {request!r}: its process {', '.join(lost)} is gone")
        self._fail(f"did not answer {request!r} within {timeout_s:.0f} s")

    def end(self) -> None:
        """Kill every process of the group, and wait until they are gone; safe to call twice."""
        if self._has_ended:
            return
        self._connection.close()
        deadline = time.monotonic() + _END_TIMEOUT_S
        while members := living_members(self.group):
            try:
                os.killpg(self.group, signal.SIGKILL)
            except ProcessLookupError:
                break
            if time.monotonic() > deadline:
                raise EngineError(
                    f"processes {members} of SGLang are still there {_END_TIMEOUT_S:.0f} s after "
                    f"SIGKILL; they hang in the kernel, and may hold the GPU's memory"
                )
            time.sleep(0.02)
        self._process.wait()
        self._has_ended = True

    def _fail(self, what: str) -> NoReturn:
        self.has_failed = True
        self.end()
        raise EngineError(
            f"the SGLang engine {what}. Its processes have been ended. Its log is "
            f"{self._log_path}, which ends:\n{_last_lines(self._log_path)}"
        )

    def _exit_status(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its connection broke, but it was still running"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"


def living_members(group: int) -> list[int]:
    """Ids of a process group's processes; the dead ones that nobody has collected left out."""
    members = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = file.read_text().partition(" (")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        state, _, its_group = rest.rpartition(") ")[2].split()[:3]
        if int(its_group) == group and state not in "ZX":
            members.append(int(pid))
    return sorted(members)


def _title(pid: int) -> str:
    """What a process is called: SGLang's name themselves by what they do."""
    command = Path(f"/proc/{pid}/cmdline")
    try:
        return command.read_text("utf-8", errors="replace").replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "already ended"


def _scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make SGLang take itself for a rank of the trainer's process group."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def _last_lines(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:]) or "    (nothing)"
