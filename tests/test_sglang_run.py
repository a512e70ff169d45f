"""The quickstart in miniature over real SGLang on the CPU: each kind of drafter is co-trained,
published to the running engine, checked there, and its drafts are accepted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from tests.rollout.sglang_options import sglang_options
from tests.sglang_cpu import environment

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).parents[1]
NUM_STEPS = 4


@pytest.fixture(autouse=True)
def with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's processes find its stand-in kernels."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])
    torch.set_num_threads(1)


def eagle(config: PreTrainedConfig) -> EagleDrafter:
    """Of random weights."""
    return EagleDrafter.for_target(config, seed=0)


def trimmed_eagle(config: PreTrainedConfig) -> EagleDrafter:
    """That drafts seven of eight tokens."""
    drafter = EagleDrafter.for_target(config, seed=0)
    drafter.trim_vocabulary([token for token in range(config.vocab_size) if token % 8 != 7])
    return drafter


def eagle3(config: PreTrainedConfig) -> Eagle3Drafter:
    """Of random weights."""
    return Eagle3Drafter.for_target(config, seed=0)


def overlay(folder: Path, bandit: dict[str, Any]) -> dict[str, Any]:
    """Laid over the quickstart's configuration."""
    engine = sglang_options(str(folder / "drafter"), max_batch_size=16)
    return {
        "data": {
            "init_args": {
                "num_steps": NUM_STEPS,
                "prompts_per_step": 4,
                "group_size": 4,
                "sampling": {"max_tokens": 64},
                "prompts": {"init_args": {"num_held_out": 0}},
                "engine": {
                    "class_path": "fastrl.rollout.sglang_engine.SGLangEngine",
                    "init_args": engine,
                },
            }
        },
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "callbacks": [
                {
                    "class_path": "fastrl.callbacks.DrafterTraining",
                    "init_args": {
                        "learning_rate": 6.0e-3,
                        "steps_per_batch": 24,
                        "publish_every_n_steps": 1,
                    },
                },
                {
                    "class_path": "fastrl.callbacks.WeightHealth",
                    "init_args": {"on_drafter_failure": "fall_back"},  # random, at first
                },
                {"class_path": "fastrl.callbacks.StrategyAdaptation", "init_args": bandit},
            ],
        },
    }


@pytest.mark.parametrize("new_drafter", [eagle, trimmed_eagle, eagle3])
def test_a_drafter_is_co_trained_with_sglang(
    tmp_path: Path, new_drafter: Callable[[PreTrainedConfig], EagleDrafter]
) -> None:
    from fastrl.cli import FastRLCLI
    from tests.test_quickstart import BatchRecorder  # needs Lightning

    config = AutoConfig.from_pretrained(ROOT / "models/quickstart/policy")
    new_drafter(config).save_pretrained(tmp_path / "drafter")
    bandit = {
        "bandit": {
            "class_path": "fastrl.rollout.bandit.Predefined",
            "init_args": {"schedule": {1: "3_1_4"}},
        }
    }
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay(tmp_path, bandit)))
    recorder = BatchRecorder()

    class RecordingCLI(FastRLCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(recorder)
            return trainer

    RecordingCLI(["fit", "--config=configs/quickstart.yaml", f"--config={path}"])
    for version, batch in enumerate(recorder.batches):
        assert batch.policy_version_B.unique().tolist() == [version]  # lag 0
    lengths = [batch.stats.accept_length for batch in recorder.batches]
    assert lengths[0] < 1.2
    assert lengths[-1] > 1.3
    assert not recorder.batches[-1].stats.drafter_failures
