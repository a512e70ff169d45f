"""Ctrl-C during a real run, with its engine and its reward workers: a clean stop, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.rollout.tiny_models import make_target

ROOT = Path(__file__).parents[1]
PATIENCE_S = 20.0


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


def write_run(folder: Path) -> Path:
    """A run too long to finish, of a random model on made-up questions."""
    make_target(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    questions = ({"prompt": f"w{n} w{n + 1}", "answer": f"w{n}"} for n in range(2, 22))
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    settings = {
        "prompts": {
            "class_path": "fastrl.datamodules.JsonlPrompts",
            "init_args": {"path": str(folder / "questions.jsonl"), "held_out_fraction": 0.2},
        },
        "reward": {"class_path": "fastrl.datamodules.ExactMatchReward"},
        "engine": {"class_path": "fastrl.rollout.torch_engine.TorchEngine"},
        "num_steps": 1_000_000,
        "prompts_per_step": 2,
        "group_size": 2,
        "sampling": {"max_tokens": 8},
    }
    config = {
        "trainer": {"default_root_dir": str(folder), "logger": False, "accelerator": "cpu"},
        "model": {
            "class_path": "fastrl.modules.GRPO",
            "init_args": {"model_path": str(folder / "model")},
        },
        "data": {"class_path": "fastrl.datamodules.RolloutDataModule", "init_args": settings},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_stops_a_run_cleanly_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastrl", "fit", "-c", str(write_run(tmp_path))]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        output = ""
        for line in run.stdout:
            output += line
            if line.startswith("RL step 3/"):
                break
        assert len(processes_of_session(run.pid)) > 1, output
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        output += run.stdout.read()
    assert run.returncode == 130, output
    assert "Traceback" not in output
    deadline = time.monotonic() + PATIENCE_S
    while (left := processes_of_session(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the fork server ends when it sees that its parent has
    assert left == []
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["num_steps"] >= 2  # the third may have been shown, but not yet counted
