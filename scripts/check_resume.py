"""Check that a run survives: killed with SIGKILL at random moments and resumed, it ends the same.

One run goes undisturbed; each of the others is killed, between its first RL step and its end, then
sent again with the same command (`--ckpt_path last`) until it is through. Compared bit by bit:
weights, optimizer, schedule, drafter and its buffer (so the tokens) at the end, and what every RL
step logged of rewards, losses and lengths. A process that outlives its killed run counts as an
error. Exits with 1 on a difference. (Equality holds where the drafter's training has a number of
steps, not of seconds, and where arithmetic repeats itself: float32 on a CPU.)

    python scripts/check_resume.py --run_config configs/quickstart.yaml
    python scripts/check_resume.py --run_config configs/quickstart.yaml --runs 3 --kills 2 \\
        --options='["--data.init_args.num_steps=6", "--trainer.val_check_interval=3"]'
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.checkpoint_io import AtomicCheckpointIO

STATES = {
    "policy": ("state_dict",),
    "optimizer": ("optimizer_states", "lr_schedulers"),
    "drafter": ("drafter", "optimizer", "buffer", "published", "version", "generator"),
}
COMPARED_SCALARS = re.compile(
    r"reward/|policy/(?!logprob_gap)|drafter/loss|rollout/(num_tokens|response|truncated)"
)
"""What does not depend on the clock (times, and with them the bandit's choices and what the
rollouts' log-probabilities owe to them by rounding)."""
POLL_S = 0.02
PATIENCE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to run, and how often to kill it."""

    run_config: str
    """YAML of the run."""
    runs: int = 20
    """Runs that are killed."""
    kills: int = 1
    """How often each is killed."""
    options: list[str] = field(default_factory=list)
    """Further options of `fastrl fit`, to make it shorter."""
    folder: str | None = None
    """Where runs are kept; a temporary folder, removed at the end, if none is given."""
    json: str | None = None
    """File for the results."""
    seed: int = 0
    """Of the moments."""


class End(NamedTuple):
    """What a finished run leaves: nested plain values and tensors, by part."""

    states: Mapping[str, Any]
    scalars: Mapping[str, list[tuple[int, float]]]


@dataclass(kw_only=True)
class Result:
    """One killed run."""

    killed_at: list[str] = field(default_factory=list)
    """The last RL step that its log showed, at each kill."""
    different: list[str] = field(default_factory=list)
    """Parts that are not those of the undisturbed run."""
    orphans: int = 0
    """Processes that were left some time after a kill or the end."""


def processes_of_session(session: int) -> list[int]:
    """Living processes of a session, zombies that nobody has waited for left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_orphans(session: int) -> list[int]:
    """Processes of a session that are still there when patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := processes_of_session(session)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


class Run:
    """A training process, in a session of its own, and its log file."""

    def __init__(self, check: Check, folder: Path) -> None:
        self.log = folder / "output.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._start = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-m", "fastrl", "fit", "--config", check.run_config]
        command += [f"--trainer.default_root_dir={folder}", *check.options, "--ckpt_path=last"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def step(self) -> str:
        """The last RL step that it has shown, `3/60`; empty before the first."""
        with self.log.open("rb") as log:
            log.seek(self._start)
            return (re.findall(r"RL step (\d+/\d+)", log.read().decode()) or [""])[-1]

    def wait_for_first_step(self) -> bool:
        """Whether it has come that far before it ended."""
        while not self.step():
            if self.process.poll() is not None:
                return False
            time.sleep(POLL_S)
        return True

    def finish(self) -> None:
        """Wait for a good end."""
        if self.process.wait() != 0:
            sys.exit(f"the run failed with {self.process.returncode}:\n{self.log.read_text()}")

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL to the main process alone, unless it ends before."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL


def read_end(folder: Path) -> End:
    """Final checkpoint and logged scalars of the only run in a folder."""
    (last,) = folder.glob("lightning_logs/version_*/checkpoints/last.ckpt")
    checkpoint = AtomicCheckpointIO().load_checkpoint(last)
    sources = {**checkpoint, **checkpoint["callbacks"].get("DrafterTraining", {})}
    states = {
        part: {name: sources[name] for name in names if name in sources}
        for part, names in STATES.items()
    }
    events = EventAccumulator(str(last.parents[1]), size_guidance={"scalars": 0})
    events.Reload()
    tags = filter(COMPARED_SCALARS.match, events.Tags()["scalars"])
    return End(states, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})


def is_equal(ours: Any, theirs: Any) -> bool:
    """Of nested plain values and tensors, bit by bit."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(is_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, Sequence) and not isinstance(ours, str):
        return len(ours) == len(theirs) and all(map(is_equal, ours, theirs))
    return bool(ours == theirs)


def differences(ours: End, theirs: End) -> list[str]:
    """Names of what is not the same."""
    parts = [part for part in STATES if not is_equal(ours.states[part], theirs.states[part])]
    tags = sorted({*ours.scalars, *theirs.scalars})
    return parts + [tag for tag in tags if ours.scalars.get(tag) != theirs.scalars.get(tag)]


def run_undisturbed(check: Check, folder: Path) -> tuple[End, float]:
    """Its end, and the seconds from its first RL step on."""
    run = Run(check, folder)
    run.wait_for_first_step()
    started = time.monotonic()
    run.finish()
    return read_end(folder), time.monotonic() - started


def run_killed(check: Check, folder: Path, seconds: float, moments: random.Random) -> Result:
    """Kill at moments of the undisturbed run's time, resume, finish."""
    result = Result()
    while len(result.killed_at) < check.kills:
        run = Run(check, folder)
        # The rest of a resumed run is shorter, and so are its moments.
        share = 1 - _share_done(result)
        if not run.wait_for_first_step() or not run.kill_after(moments.uniform(0, seconds * share)):
            break
        result.killed_at.append(run.step())
        result.orphans += len(wait_for_orphans(run.process.pid))
    run = Run(check, folder)
    run.finish()
    result.orphans += len(wait_for_orphans(run.process.pid))
    return result


def _share_done(result: Result) -> float:
    if not result.killed_at:
        return 0.0
    done, total = map(int, result.killed_at[-1].split("/"))
    return done / total


def check_runs(check: Check, folder: Path) -> list[Result]:
    """All runs, a line each."""
    whole, seconds = run_undisturbed(check, folder / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s from its first RL step on; {len(whole.scalars)} scalars")
    results = []
    print(f"{'run':>4}  {'killed at RL step':<24} {'orphans':>7}  different")
    for number in range(check.runs):
        moments = random.Random(f"{check.seed}/{number}")
        its_folder = folder / f"killed_{number}"
        result = run_killed(check, its_folder, seconds, moments)
        result.different = differences(read_end(its_folder), whole)
        results.append(result)
        killed = ", ".join(result.killed_at) or "never: it was through"
        different = ", ".join(result.different) or "nothing"
        print(f"{number:>4}  {killed:<24} {result.orphans:>7}  {different}", flush=True)
    return results


def main() -> None:
    """Run, kill, resume, compare, print a table."""
    check: Check = jsonargparse.auto_cli(Check)
    with tempfile.TemporaryDirectory() as temporary:
        results = check_runs(check, Path(check.folder or temporary))
    if check.json:
        report = {"check": asdict(check), "runs": [asdict(result) for result in results]}
        Path(check.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    num_kills = sum(len(result.killed_at) for result in results)
    if bad := sum(bool(result.different or result.orphans) for result in results):
        sys.exit(f"{bad} of {len(results)} runs differ or left processes behind")
    print(f"{num_kills} kills in {len(results)} runs: every end is that of the undisturbed run")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
