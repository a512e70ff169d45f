"""Every YAML in configs/ is parsed, and its module, data and callbacks are made, without a run.

One that names no class of model is laid over another: `quickstart_off` over `quickstart`. One for
GPUs is made on a CPU, and one whose model has to be downloaded is made for the quickstart's.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrl.callbacks import DrafterTraining, StrategyAdaptation
from fastrl.callbacks.feature_buffer import BufferSettings
from fastrl.cli import FastRLCLI, main
from fastrl.datamodules import ExactMatchReward, FeatureDataModule, RolloutDataModule
from fastrl.modules import DrafterModule, PolicyModule
from fastrl.rollout.bandit import Bandit
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.types import DraftStrategy, Prompt, StepStats

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MOST_KEYS = 99
DOWNLOADED = {"grpo_qwen2_5_7b": "Qwen/Qwen2.5-7B", "grpo_qwen2_5_32b": "Qwen/Qwen2.5-32B"}
"""Models that somebody has to fetch first, by configuration."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])


def layers(path: Path) -> list[str]:
    """The command line's `-c` options for a config: its own, after its base's if it is laid over
    one."""
    if "class_path" in yaml.safe_load(path.read_text()).get("model", {}):
        return ["-c", str(path)]
    return [*layers(path.with_stem(path.stem.rpartition("_")[0])), "-c", str(path)]


def on_this_machine(path: Path) -> list[str]:
    """Options in place of what it lacks: GPUs, and models of gigabytes."""
    trainers = [yaml.safe_load(Path(layer).read_text())["trainer"] for layer in layers(path)[1::2]]
    options = []
    if any(trainer.get("accelerator") == "gpu" for trainer in trainers):
        options += ["--trainer.accelerator=cpu"]
    if path.stem in DOWNLOADED:
        options += ["--model.init_args.model_path=models/quickstart/policy"]
    return options


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
    cli = FastRLCLI([*layers(path), *on_this_machine(path)], run=False)
    is_drafter = path.stem.startswith("warmup_")
    assert isinstance(cli.model, DrafterModule if is_drafter else PolicyModule)
    assert isinstance(cli.datamodule, FeatureDataModule if is_drafter else RolloutDataModule)
    configured = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks") or []
    made = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {callback["class_path"].rsplit(".", 1)[1] for callback in configured} <= made
    assert {"RandomState", "StepCheckpoint"} <= made
    assert ({"RolloutMetrics", "RunSummary"} <= made) is not is_drafter


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_shown_in_full_and_can_be_read_again(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = expanded(layers(path), capsys)
    again = tmp_path / path.name
    with pytest.raises(SystemExit):
        main(["fit", *layers(path), "--print_config"])
    again.write_text(capsys.readouterr().out)
    assert leaves(expanded(["-c", str(again)], capsys)) == leaves(shown)


@pytest.mark.parametrize("stem", DOWNLOADED)
def test_a_model_that_is_not_there_is_asked_for(
    stem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "-c", f"configs/{stem}.yaml", "--trainer.accelerator=cpu"])
    assert exit_.value.code == 2
    name = DOWNLOADED[stem]
    assert f"`hf download {name} --local-dir {name}`" in capsys.readouterr().err


def test_a_drafter_that_is_not_there_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "fit",
                *("-c", "configs/grpo_sglang.yaml", "--trainer.accelerator=cpu"),
                "--model.init_args.model_path=models/quickstart/policy",
                f"--data.init_args.engine.init_args.drafter_path={tmp_path / 'drafter'}",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
    assert exit_.value.code == 2
    assert "make_drafter.py" in capsys.readouterr().err


def options(stem: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of policy, data and engine, as a configuration gives them."""
    config = yaml.safe_load((ROOT / "configs" / f"{stem}.yaml").read_text())
    data = config["data"]["init_args"]
    return config["model"]["init_args"], data, data["engine"]["init_args"]


@pytest.mark.parametrize("stem", DOWNLOADED)
def test_the_originals_settings_are_kept(stem: str) -> None:
    """64 prompts x 8 responses of up to 32k tokens, and so on: grpo_7B.sh."""
    model, data, engine = options(stem)
    assert (data["prompts_per_step"], data["group_size"]) == (64, 8)
    assert data["sampling"] == {"temperature": 0.9, "max_tokens": 32 * 1024}
    assert model["optimizer"]["lr"] == 1e-6
    assert (model["kl_coef"], model["kl_estimator"]) == (0.001, "k3")
    assert engine["tp_size"] == 4
    longest = data["max_prompt_tokens"] + data["sampling"]["max_tokens"]
    assert model["micro_batch_tokens"] == longest
    assert engine["server_args"]["context_length"] >= longest + 48  # nodes of the largest tree


@pytest.mark.parametrize("stem", DOWNLOADED)
def test_the_originals_batches_limit_speculation(stem: str) -> None:
    """Its groups of trees, and beyond its threshold of 32 live requests nothing but `off`."""
    path = ROOT / "configs" / f"{stem}.yaml"
    cli = FastRLCLI([*layers(path), *on_this_machine(path)], run=False)
    (adaptation,) = (c for c in cli.trainer.callbacks if isinstance(c, StrategyAdaptation))
    for batch_size, expected in (
        *((1, {"8_4_48", "8_4_32", "8_4_16", "8_4_9"}), (4, {"8_4_32", "8_4_16", "8_4_9"})),
        *((20, {"8_4_16", "8_4_9"}), (32, {"8_4_9"}), (33, set()), (512, set())),
    ):
        tried = {str(tried_at(adaptation.bandit, batch_size)) for _ in range(60)}
        assert tried == expected | {"off"}, batch_size


def tried_at(bandit: Bandit, batch_size: int) -> DraftStrategy:
    """The strategy of one more step, in which all cost the same."""
    strategy = bandit.select(batch_size, 100)
    accepted = (1,) * batch_size
    step = StepStats(
        strategy=strategy,
        batch_size=batch_size,
        context_tokens=100,
        accept_lengths=accepted,
        seconds=0.01,
    )
    bandit.record(step)
    return strategy


def test_the_answer_pattern_of_mathematics_takes_the_last_box() -> None:
    _, data, _ = options("grpo_qwen2_5_7b")
    reward = ExactMatchReward(**data["reward"]["init_args"])
    prompt = Prompt(prompt_id=0, tokens=(1,), text="", answer=r"\frac{1}{2}")
    assert reward.score(r"so \boxed{3}, no, $\boxed{\frac{1}{2}}$.", prompt) == 1
    assert reward.score(r"\boxed{\frac{1}{2}} or rather \boxed{3}", prompt) == 0


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


def test_the_control_of_sglangs_run_has_neither_drafter_nor_bandit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same health checks, and all else is the same too."""
    base = expanded(layers(ROOT / "configs/grpo_sglang.yaml"), capsys)
    control = expanded(layers(ROOT / "configs/grpo_sglang_off.yaml"), capsys)
    training, health, adaptation = base["trainer"].pop("callbacks")
    (kept,) = control["trainer"].pop("callbacks")
    assert training["class_path"].endswith("DrafterTraining")
    assert adaptation["class_path"].endswith("StrategyAdaptation")
    # What it is to do when a drafter fails is of no effect without one.
    assert kept["init_args"].pop("on_drafter_failure") == "raise"
    assert health["init_args"].pop("on_drafter_failure") == "fall_back"
    assert kept == health
    base, control = leaves(base), leaves(control)
    assert {key: value for key, value in control.items() if base[key] != value} == {
        "data.init_args.engine.init_args.drafter_path": None,
        "trainer.default_root_dir": "runs/grpo_sglang_off",
    }
    assert base.keys() == control.keys()


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
