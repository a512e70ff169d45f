"""Every YAML in configs/ is parsed, and its policy, data and callbacks are made, without a run.

One that names no model is laid over another: `quickstart_off` over `quickstart`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrl.callbacks import DrafterTraining
from fastrl.callbacks.feature_buffer import BufferSettings
from fastrl.cli import FastRLCLI, main
from fastrl.datamodules import RolloutDataModule
from fastrl.modules import PolicyModule
from fastrl.rollout.drafters.loss import LossSettings

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MOST_KEYS = 99


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])


def layers(path: Path) -> list[str]:
    """The command line's `-c` options for a config: its own, after its base's if it is laid over
    one."""
    if "model" in yaml.safe_load(path.read_text()):
        return ["-c", str(path)]
    return [*layers(path.with_stem(path.stem.rpartition("_")[0])), "-c", str(path)]


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, places in a list being names too."""
    items = {dict: lambda: config.items(), list: lambda: enumerate(config)}
    if type(config) not in items or not config:
        return {prefix: config}
    return {
        name: value
        for key, child in items[type(config)]()
        for name, value in leaves(child, f"{prefix}.{key}".lstrip(".")).items()
    }


def expanded(layers_: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What `--print_config` shows."""
    with pytest.raises(SystemExit):
        main(["fit", *layers_, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


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
    cli = FastRLCLI(layers(path), run=False)
    assert isinstance(cli.model, PolicyModule)
    assert isinstance(cli.datamodule, RolloutDataModule)
    configured = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks") or []
    made = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {callback["class_path"].rsplit(".", 1)[1] for callback in configured} <= made
    assert {"RolloutMetrics", "RunSummary"} <= made


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("frozen", {"trainer.callbacks.0.init_args.steps_per_batch": 0}),
        ("off", {"data.init_args.engine.init_args.drafter_path": None}),
    ],
)
def test_a_control_differs_from_the_quickstart_in_what_it_is_to_control(
    name: str, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder of the run aside; without speculation there are no callbacks of it either."""
    base = leaves(expanded(layers(ROOT / "configs/quickstart.yaml"), capsys))
    control = leaves(expanded(layers(ROOT / f"configs/quickstart_{name}.yaml"), capsys))
    differing = {key: value for key, value in control.items() if base.get(key, ...) != value}
    expected = changed | {"trainer.default_root_dir": f"runs/quickstart_{name}"}
    if name == "off":
        expected["trainer.callbacks"] = None
    assert differing == expected
    only_in_base = {key for key in base if key not in control}
    assert only_in_base == {
        key for key in base if name == "off" and key.startswith("trainer.callbacks.")
    }


def test_the_buffers_and_the_losss_settings_are_read_from_yaml(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n    - class_path: fastrl.callbacks.DrafterTraining\n"
        "      init_args:\n"
        "        buffer: {max_tokens: 4096, recency_half_life: .inf}\n"
        "        loss: {num_depths: 4}\n"
    )
    cli = FastRLCLI(["-c", "configs/quickstart.yaml", "-c", str(overlay)], run=False)
    (training,) = (c for c in cli.trainer.callbacks if isinstance(c, DrafterTraining))
    settings = training.buffer.settings
    assert settings == BufferSettings(max_tokens=4096, recency_half_life=math.inf)
    assert training.loss == LossSettings(num_depths=4)


def test_the_quickstart_has_under_100_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert count_keys(expanded(["-c", "configs/quickstart.yaml"], capsys)) <= MOST_KEYS
