"""Every YAML in configs/ is parsed, and its policy, data and callbacks are made, without a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrl.cli import FastRLCLI, main
from fastrl.datamodules import RolloutDataModule
from fastrl.modules import PolicyModule

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MOST_KEYS = 99


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])


def count_keys(config: Any) -> int:
    """Leaves of a configuration: scalars, nulls, empty ones, and lists of scalars, one each."""
    if isinstance(config, dict) and config:
        return sum(map(count_keys, config.values()))
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        return sum(map(count_keys, config))
    return 1


def test_keys_are_counted_as_leaves() -> None:
    config = {"a": 1, "b": {"c": None, "d": [1, 2]}, "e": [{"f": 1, "g": {}}, {"h": []}]}
    assert count_keys(config) == 6


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_parsed_and_instantiated(path: Path) -> None:
    cli = FastRLCLI(["-c", str(path)], run=False)
    assert isinstance(cli.model, PolicyModule)
    assert isinstance(cli.datamodule, RolloutDataModule)
    configured = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks") or []
    made = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {callback["class_path"].rsplit(".", 1)[1] for callback in configured} <= made
    assert {"RolloutMetrics", "RunSummary"} <= made


def test_the_quickstart_has_under_100_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "configs/quickstart.yaml", "--print_config"])
    assert count_keys(yaml.safe_load(capsys.readouterr().out)) <= MOST_KEYS
