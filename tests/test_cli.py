"""The command line: help for every option, errors that name the value, exits, round trips."""

from __future__ import annotations

import dataclasses
import inspect
import json
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from jsonargparse import ArgumentParser

import fastrl.callbacks
import fastrl.datamodules
import fastrl.modules
import fastrl.rollout.bandit
import fastrl.rollout.torch_engine
from fastrl.cli import FastRLCLI, main

CONFIGURABLE = [
    value
    for package in (
        fastrl.modules,
        fastrl.datamodules,
        fastrl.callbacks,
        fastrl.rollout.torch_engine,
        fastrl.rollout.bandit,
    )
    for name, value in vars(package).items()
    if inspect.isclass(value)
    and value.__module__.startswith("fastrl.")
    and not name.startswith("_")
    and not inspect.isabstract(value)
    and not dataclasses.is_dataclass(value)
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of the fakes, in its own folder."""
    path = tmp_path / "fake.yaml"
    content = {
        "trainer": {"default_root_dir": str(tmp_path), "accelerator": "cpu", "logger": False},
        "model": {"class_path": "tests.fake_run.FakePolicy", "init_args": {"model_path": "tiny"}},
        "data": {"class_path": "tests.fake_run.FakeRollouts", "init_args": {"num_steps": 3}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(autouse=True)
def command_line_is_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LightningCLI warns when pytest's own arguments are there; Lightning's Ctrl-C mutes SIGINT."""
    monkeypatch.setattr(sys, "argv", ["fastrl"])
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def exit_code(args: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    return exit_.value.code


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert exit_code([*args, "--print_config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("configurable", CONFIGURABLE, ids=lambda cls: cls.__name__)
def test_every_option_has_help_text(configurable: type) -> None:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser()
    parser.add_class_arguments(configurable, "it", fail_untyped=False)
    silent = [action.dest for action in parser._actions if not (action.help or "").strip()]
    assert silent == []


def test_help_reaches_the_classes_that_a_config_names() -> None:
    names = {cls.__name__ for cls in CONFIGURABLE}
    assert {"GRPO", "Reinforce", "RolloutDataModule", "TorchEngine", "DrafterTraining"} <= names
    assert {"StrategyAdaptation", "BucketedEpsilonGreedy", "ReasoningGymPrompts"} <= names


def test_subcommands_and_their_options_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    output = capsys.readouterr().out
    for subcommand in ("fit", "validate", "test", "predict"):
        assert f"    {subcommand}" in output
    assert exit_code(["fit", "--model.help", "GRPO"]) == 0
    output = capsys.readouterr().out
    assert "--model.optimizer.lr" in output
    assert "Peak learning rate" in output


def test_python_m_fastrl_is_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrl", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fastrl", run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fastrl ")


def test_a_printed_config_prints_itself(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = printed_config(["fit", "-c", str(config), "--trainer.max_epochs=3"], capsys)
    assert yaml.safe_load(once)["trainer"]["max_epochs"] == 3
    again = tmp_path / "again.yaml"
    again.write_text(once)
    assert printed_config(["fit", "-c", str(again)], capsys) == once


def test_a_saved_config_is_in_the_run_folder(config: Path, tmp_path: Path) -> None:
    main(["fit", "-c", str(config)])
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["data"]["init_args"]["num_steps"] == 3


def test_the_datamodule_gets_the_policys_model_path(config: Path) -> None:
    cli = FastRLCLI(["-c", str(config), "--model.init_args.model_path=elsewhere"], run=False)
    assert cli.datamodule.model_path == "elsewhere"


def test_a_policy_and_a_drafter_each_want_data_of_their_own(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_drafters = tmp_path / "of_drafters.yaml"
    policy = str(Path(__file__).parents[1] / "models" / "quickstart" / "policy")
    prompts = {"class_path": "ReasoningGymPrompts", "init_args": {"task": "chain_sum"}}
    features = {
        "class_path": "fastrl.datamodules.FeatureDataModule",
        "init_args": {"num_steps": 1, "prompts": prompts},
    }
    of_drafters.write_text(yaml.safe_dump({"data": features}))
    assert exit_code(["fit", "-c", str(config), "-c", str(of_drafters)]) == 2
    assert "set data.class_path to fastrl.datamodules.RolloutDataModule" in capsys.readouterr().err
    drafter = {
        "class_path": "fastrl.modules.DrafterModule",
        "init_args": {"model_path": policy, "output": str(tmp_path / "drafter")},
    }
    of_drafters.write_text(yaml.safe_dump({"model": drafter}))
    assert exit_code(["fit", "-c", str(config), "-c", str(of_drafters)]) == 2
    assert "set data.class_path to fastrl.datamodules.FeatureDataModule" in capsys.readouterr().err


def test_strategies_need_no_quotes(config: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    bandit = "fastrl.rollout.bandit.BucketedEpsilonGreedy"
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "trainer: {callbacks: [{class_path: fastrl.callbacks.StrategyAdaptation, init_args: "
        f"{{bandit: {{class_path: {bandit}, init_args: {{strategies: [4_2_8, 8_4_48]}}}}}}}}]}}\n"
    )
    cli = FastRLCLI(["-c", str(config), "-c", str(extra)], run=False)
    (adaptation,) = [
        callback
        for callback in cli.trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, fastrl.callbacks.StrategyAdaptation)
    ]
    assert set(map(str, adaptation.bandit.arms)) == {"off", "4_2_8", "8_4_48"}


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("--model.init_args.learning_rat=1", "learning_rat"),
        ("--data.init_args.num_step=1", "num_step"),
        ("--trainer.max_epoch=1", "max_epoch"),
        ("--trainer.gradient_clip_val=1", "gradient_clip_val"),
        ("--engin=1", "engin"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(
    key: str, named: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["fit", "-c", str(config), key]) == 2
    message = capsys.readouterr().err.split("error:")[-1]
    assert named in message


def test_an_unknown_key_in_a_file_is_an_error(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "\nenginee: {depth: 1}\n")
    assert exit_code(["fit", "-c", str(config)]) == 2
    assert "enginee" in capsys.readouterr().err.split("error:")[-1]


def test_a_refused_value_ends_with_the_classs_own_message(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "-c", str(config), "--model.init_args.model_path=refused"]
    assert exit_code(args) == 2
    message, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert message == "error: model_path: 'refused' is refused; give another"
    assert "JSONARGPARSE_DEBUG" in hint
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="'refused' is refused"):
        main(args)


def test_a_run_shows_steps_and_summary_without_any_configuration_of_them(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "-c", str(config)])
    output = capsys.readouterr().out
    assert "RL step 3/3" in output
    assert "3 RL steps" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["reward_first"], summary["reward_last"]) == (0, 3)


def test_the_progress_bar_can_be_turned_off(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "-c", str(config), "--trainer.enable_progress_bar=false"])
    assert "RL step 3/3" not in capsys.readouterr().out


def test_text_samples_are_on_and_ones_own_take_their_place(config: Path) -> None:
    def intervals(*options: str) -> list[int]:
        callbacks = FastRLCLI(["-c", str(config), *options], run=False).trainer.callbacks  # type: ignore[attr-defined]
        return [c.every_n_steps for c in callbacks if isinstance(c, fastrl.callbacks.TextSamples)]

    assert intervals() == [10]
    own = "--trainer.callbacks+=fastrl.callbacks.TextSamples"
    assert intervals(own, "--trainer.callbacks.every_n_steps=3") == [3]


def test_predict_writes_a_line_a_response(config: Path, tmp_path: Path) -> None:
    main(["predict", "-c", str(config)])
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "1 + 1", "response": f"= {batch_idx}", "reward": 0.5} for batch_idx in range(2)
    ]


def test_an_interrupt_closes_the_run_and_exits_with_130(config: Path, tmp_path: Path) -> None:
    assert exit_code(["fit", "-c", str(config), "--model.init_args.interrupt_at=3"]) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["num_steps"]) == ("interrupted", 2)


def test_a_failing_run_keeps_its_traceback(config: Path) -> None:
    with pytest.raises(ValueError, match="this step fails"):
        main(["fit", "-c", str(config), "--model.init_args.fail_at=2"])


def test_numbers_that_are_not_finite_end_a_run_with_one_message_and_status_1(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> None:
        raise FloatingPointError("RL step 0: loss nan, first w")

    monkeypatch.setattr("tests.fake_run.FakePolicy.training_step", explode)
    assert exit_code(["fit", "-c", str(config)]) == 1
    error = capsys.readouterr().err
    assert "error: RL step 0: loss nan, first w" in error
    assert "Traceback" not in error
