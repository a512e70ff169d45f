"""A real run, with its engine and its reward workers, stopped by signals: nothing is left of it.

Ctrl-C and SIGTERM are clean stops, after which a resumed run goes on; SIGKILL ends the workers too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastrl.checkpoint_io import AtomicCheckpointIO
from tests.rollout.tiny_models import make_target

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from check_resume import processes_of_session, wait_for_orphans  # noqa: E402


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


def run_until_third_step(folder: Path, send: Callable[[int], None]) -> tuple[int, str, list[int]]:
    """Exit status, output, and the processes that are left after `send` got the run's id."""
    command = [sys.executable, "-m", "fastrl", "fit", "-c", str(write_run(folder))]
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
        send(run.pid)
        output += run.stdout.read()
    return run.returncode, output, wait_for_orphans(run.pid)


def to_group(number: signal.Signals) -> Callable[[int], None]:
    return lambda pid: os.killpg(pid, number)


def to_main(number: signal.Signals) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("send", "status"),
    [
        pytest.param(to_group(signal.SIGINT), 130, id="Ctrl-C, as a terminal sends it"),
        pytest.param(to_main(signal.SIGTERM), 143, id="SIGTERM to the process"),
        pytest.param(to_group(signal.SIGTERM), 143, id="SIGTERM to its workers too"),
    ],
)
def test_a_signal_stops_a_run_cleanly_and_leaves_a_checkpoint_and_no_process(
    tmp_path: Path, send: Callable[[int], None], status: int
) -> None:
    returncode, output, left = run_until_third_step(tmp_path, send)
    assert returncode == status, output
    assert "Traceback" not in output
    assert left == []
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["num_steps"] >= 2  # the third may have been shown, but not yet counted
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["rl_step"] == summary["num_steps"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sigkill_of_the_main_process_leaves_no_worker(tmp_path: Path) -> None:
    returncode, _, left = run_until_third_step(tmp_path, to_main(signal.SIGKILL))
    assert returncode == -signal.SIGKILL
    assert left == []
