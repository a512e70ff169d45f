"""The engine's process group without an engine in it: SGLang is not needed."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.rollout.sglang_process import EngineError, EngineProcess, living_members


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Started as under torchrun; waits for its first message."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("KEPT", "yes")
    process = EngineProcess(tmp_path / "engine.log")
    yield process
    process.end()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_it_has_a_group_of_its_own_and_nothing_of_the_launcher(process):
    assert living_members(process.group) == [process.group]
    assert os.getpgid(process.group) == process.group != os.getpgid(0)
    environment = Path(f"/proc/{process.group}/environ").read_text().split("\0")
    names = {line.partition("=")[0] for line in environment}
    assert "KEPT" in names
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & names


def test_an_unknown_request_is_an_error_that_ends_it(process):
    with pytest.raises(EngineError, match="failed at 'no_such_thing'"):
        process.call("no_such_thing", timeout_s=60)
    assert living_members(process.group) == []
    assert process.has_failed


def test_what_it_cannot_unpickle_is_refused_and_it_goes_on(process, tmp_path, monkeypatch):
    (tmp_path / "ours_alone.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("ours_alone").Thing()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot unpickle what 'start' .*ours_alone"):
            process.call("start", timeout_s=60, server_args=thing)
    assert living_members(process.group) == [process.group]
    assert "Traceback" in process.log_path.read_text()


def test_an_answer_that_cannot_be_sent_leaves_its_reason(process):
    """The child raises where it expects nothing to: its log still tells."""
    os.kill(process.group, signal.SIGSTOP)
    process._connection.send_bytes(b"")  # unread, and its refusal finds nobody
    process._connection.close()
    os.kill(process.group, signal.SIGCONT)
    assert wait_until(lambda: living_members(process.group) == [])
    assert "BrokenPipeError" in process.log_path.read_text()


def test_silence_ends_at_the_time_limit(process):
    os.kill(process.group, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineError, match="did not answer 'start' within 1 s"):
        process.call("start", timeout_s=1, server_args={})
    assert time.monotonic() - started < 5
    assert living_members(process.group) == []


def test_death_is_named_by_its_signal(process):
    os.kill(process.group, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"died during 'start' \(killed by SIGKILL\)"):
        process.call("start", timeout_s=60, server_args={})


def test_the_end_of_the_log_is_quoted(process):
    process.log_path.write_text("".join(f"line {number}\n" for number in range(100)))
    os.kill(process.group, signal.SIGKILL)
    with pytest.raises(EngineError, match="line 99") as error:
        process.call("start", timeout_s=60, server_args={})
    assert "line 80" in str(error.value)
    assert "line 50" not in str(error.value)


def test_a_process_that_it_needs_is_missed(tmp_path, monkeypatch):
    """`sleep` stands for a scheduler, whose end its parent does not look at."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import subprocess; subprocess.Popen(['sleep', '60'])\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    process = EngineProcess(tmp_path / "engine.log")
    assert wait_until(lambda: len(living_members(process.group)) == 2)
    (needed,) = set(living_members(process.group)) - {process.group}
    command_line = Path(f"/proc/{needed}/cmdline")  # its parent's, until it has become `sleep`
    assert wait_until(lambda: command_line.read_bytes().startswith(b"sleep"))
    process.watch([needed])
    os.kill(process.group, signal.SIGSTOP)  # it will not answer
    os.kill(needed, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"its process {needed} \(sleep 60\) is gone"):
        process.call("start", timeout_s=60)
    assert time.monotonic() - started < 5
    assert living_members(process.group) == []


def test_ending_takes_grandchildren_along_and_can_be_repeated(tmp_path, monkeypatch):
    """`sleep` stands for a scheduler that does not notice anything."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import subprocess; subprocess.Popen(['sleep', '60'])\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    process = EngineProcess(tmp_path / "engine.log")
    assert wait_until(lambda: len(living_members(process.group)) == 2)
    process.end()
    assert living_members(process.group) == []
    process.end()
    assert not process.has_failed


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_when_the_trainer_is_killed(tmp_path, how):
    script = (
        "import sys, time; from pathlib import Path; "
        "from fastrl.rollout.sglang_process import EngineProcess; "
        "print(EngineProcess(Path(sys.argv[1])).group, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    group = int(trainer.stdout.readline())
    assert living_members(group) == [group]
    trainer.send_signal(how)
    trainer.communicate()
    assert wait_until(lambda: living_members(group) == [])
