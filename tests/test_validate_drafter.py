"""`fastrl validate` of a drafter, on the command line and with the shipped warm-up's YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.cli import main
from fastrl.rollout.drafters.held_out import KS, MAX_DEPTH

ROOT = Path(__file__).parents[1]
QUICKSTART = "--model.init_args.drafter_path=models/quickstart/drafter"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "options"), [("eagle", [QUICKSTART]), ("eagle3", [])])
def test_validate_logs_held_out_figures_of_a_drafter_and_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, options: list[str]
) -> None:
    values = validated(tmp_path / "run", kind, options)
    assert "warmup/held_out_accept_length_top1" in capsys.readouterr().out
    assert not (tmp_path / "run" / "drafter").exists()
    accuracy = {
        k: [values[f"warmup/held_out_top{k}_accuracy_depth_{d + 1}"] for d in range(MAX_DEPTH)]
        for k in KS
    }
    assert all(0 <= a <= b <= 1 for a, b in zip(accuracy[1], accuracy[8], strict=True))
    lengths = [values[f"warmup/held_out_accept_length_top{k}"] for k in KS]
    assert 1 <= lengths[0] < lengths[1] < lengths[2] < lengths[3] <= 1 + MAX_DEPTH
    assert values["warmup/held_out_accept_length_task_chain_sum"] == lengths[0]
    ranges = {name for name in values if "_place_" in name}
    assert {f"warmup/held_out_accept_length_place_{one}" for one in ("1-15", "16-63")} == ranges


def test_validate_is_of_the_drafter_in_drafter_path(tmp_path: Path) -> None:
    """Else of a new one, whose guesses are chance."""
    length = "warmup/held_out_accept_length_top1"
    new, quickstart = (
        validated(tmp_path / name, "eagle", options)[length]
        for name, options in {"new": [], "quickstart": [QUICKSTART]}.items()
    )
    assert new < 1.06 < quickstart


def validated(folder: Path, kind: str, options: list[str]) -> dict[str, float]:
    """What the command logs."""
    main(
        [
            "validate",
            f"--config=configs/warmup_{kind}.yaml",
            f"--trainer.default_root_dir={folder}",
            f"--model.init_args.output={folder / 'drafter'}",
            f"--data.init_args.cache_folder={folder / 'features'}",
            "--data.init_args.sampling.max_tokens=48",
            "--data.init_args.prompts.init_args.num_train=8",
            "--data.init_args.prompts.init_args.num_held_out=6",
            *options,
        ]
    )
    (events_file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(events_file))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
