"""A real run killed with SIGKILL and resumed ends as the undisturbed one; the check can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check_resume as script  # noqa: E402

SHORT = [
    "--data.init_args.num_steps=6",
    "--trainer.val_check_interval=3",
    "--data.init_args.prompts_per_step=4",
    "--data.init_args.group_size=4",
    "--data.init_args.sampling.max_tokens=64",
    "--data.init_args.prompts.init_args.num_held_out=8",
    "--model.init_args.optimizer.schedule=cosine",
    "--model.init_args.num_mini_batches=2",
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_and_resumed_quickstart_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Two kills of one run; policy, optimizer, schedule, drafter and every step's log are equal."""
    result = subprocess.run(
        [
            *(sys.executable, "scripts/check_resume.py", "--run_config=configs/quickstart.yaml"),
            *("--runs=1", "--kills=2", f"--options={json.dumps(SHORT)}"),
            *(f"--folder={tmp_path / 'runs'}", f"--json={tmp_path / 'result.json'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert run["killed_at"], result.stdout
    assert run["different"] == []
    assert run["orphans"] == 0
    end = script.read_end(tmp_path / "runs" / "killed_0")
    assert [step for step, _ in end.scalars["policy/loss"]] == list(range(1, 7))
    assert [step for step, _ in end.scalars["reward/held_out"]] == [0, 3, 6]
    assert end.states["drafter"]["version"] == 6
    assert end.states["drafter"]["buffer"]["tokens"] is not None


def end_with(
    weight: float = 0.0, loss: float = 0.5, tokens: tuple[int, ...] = (1, 2)
) -> script.End:
    states = {
        "policy": {"state_dict": {"w": torch.tensor([1.0, weight])}},
        "optimizer": {"optimizer_states": [{"state": {0: torch.tensor(0.0)}}]},
        "drafter": {"buffer": {"tokens": torch.tensor(tokens)}},
    }
    return script.End(states, {"policy/loss": [(1, loss)]})


def test_every_difference_is_named() -> None:
    whole = end_with()
    assert script.differences(end_with(), whole) == []
    assert script.differences(end_with(weight=1e-7), whole) == ["policy"]
    assert script.differences(end_with(tokens=(1, 3)), whole) == ["drafter"]
    assert script.differences(end_with(tokens=(1,)), whole) == ["drafter"]
    assert script.differences(end_with(loss=0.25), whole) == ["policy/loss"]
    assert script.differences(script.End(whole.states, {}), whole) == ["policy/loss"]
