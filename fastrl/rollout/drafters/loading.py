"""Drafter checkpoints of any kind, told apart by their architecture."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter


def is_eagle3(folder: str | Path) -> bool:
    """Whether a checkpoint, by its configuration, is an EAGLE-3 drafter."""
    config = Path(folder) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("architectures") == [
        Eagle3Drafter.ARCHITECTURE
    ]


def load_drafter(folder: str | Path, target: PretrainedConfig | None = None) -> EagleDrafter:
    """Load a checkpoint; with `target`, check that it fits.

    Raises as `EagleDrafter.from_pretrained` does.
    """
    kind = Eagle3Drafter if is_eagle3(folder) else EagleDrafter
    return kind.from_pretrained(folder, target)
