"""Drafter checkpoints of any kind, told apart by architecture and weights (checkpoints.py)."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from fastrl.rollout.drafters.checkpoints import is_eagle3_checkpoint
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter


def is_eagle3(folder: str | Path) -> bool:
    """Whether a checkpoint is an EAGLE-3 drafter."""
    return is_eagle3_checkpoint(folder)


def load_drafter(folder: str | Path, target: PretrainedConfig | None = None) -> EagleDrafter:
    """Load a checkpoint; with `target`, check that it fits.

    Raises as `EagleDrafter.from_pretrained` does.
    """
    kind = Eagle3Drafter if is_eagle3(folder) else EagleDrafter
    return kind.from_pretrained(folder, target)
