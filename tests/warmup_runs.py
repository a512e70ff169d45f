"""Short drafter warm-ups on the quickstart's policy, with responses that are given: in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from fastrl.callbacks import RandomState, StepCheckpoint
from fastrl.checkpoint_io import AtomicCheckpointIO
from fastrl.datamodules import FeatureDataModule, JsonlPrompts
from fastrl.modules import DrafterModule, OptimizerSettings

MODELS = Path(__file__).parents[1] / "models" / "quickstart"
POLICY = str(MODELS / "policy")


def write_responses(folder: Path, num_prompts: int = 20) -> Path:
    """Sums and what is said of them, of varied lengths, as JSON Lines."""
    path = folder / "responses.jsonl"
    if path.exists():
        return path
    lines = []
    for number in range(num_prompts):
        terms = [number // 10, number % 10, *range(number % 5)]
        question = " + ".join(map(str, terms)) + " ="
        response = "Work: " + " ".join(str(sum(terms[: n + 1])) for n in range(len(terms)))
        lines.append(json.dumps({"prompt": question, "response": response}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_data(folder: Path, **changes: Any) -> FeatureDataModule:
    """Given responses; a quarter of the prompts are held out."""
    if "prompts" not in changes:
        path = str(write_responses(folder))
        changes["prompts"] = JsonlPrompts(path, held_out_fraction=0.25, answer_key="response")
    options: dict[str, Any] = {
        "model_path": POLICY,
        "num_steps": 6,
        "tokens_per_step": 100,
        "prompts_per_shard": 4,
    }
    return FeatureDataModule(**(options | changes))


def make_module(folder: Path, **changes: Any) -> DrafterModule:
    """From the quickstart's drafter."""
    options: dict[str, Any] = {
        "model_path": POLICY,
        "output": str(folder / "drafter"),
        "drafter_path": str(MODELS / "drafter"),
        "optimizer": OptimizerSettings(lr=3e-3, schedule="cosine", warmup_steps=2),
    }
    return DrafterModule(**(options | changes))


def make_trainer(
    folder: Path,
    callbacks: Sequence[Callback] = (),
    *,
    has_checkpoints: bool = True,
    **changes: Any,
) -> Trainer:
    """As the command line makes it, without a bar; with a checkpoint at every step, or none."""
    checkpoints = [RandomState(), StepCheckpoint(every_n_steps=1)] if has_checkpoints else []
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": has_checkpoints,
        "callbacks": [*callbacks, *checkpoints],
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(**(options | changes))
