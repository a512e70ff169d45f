"""Drafter checkpoints of any kind, told apart by their architecture."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter


def load_drafter(folder: str | Path, target: PretrainedConfig | None = None) -> EagleDrafter:
    """Load a checkpoint; with `target`, check that it fits.

    Raises as `EagleDrafter.from_pretrained` does.
    """
    config = Path(folder) / "config.json"
    architectures = (
        json.loads(config.read_text()).get("architectures") if config.is_file() else None
    )
    is_eagle3 = architectures == [Eagle3Drafter.ARCHITECTURE]
    return (Eagle3Drafter if is_eagle3 else EagleDrafter).from_pretrained(folder, target)
