"""Keeps the global random number generators in checkpoints, which Lightning does not.

Nothing of FastRL's draws from them while a run is under way: every draw has a seed or a generator
of its own. A subclass, a reward or a library may. Always on: FastRLCLI adds it. Leaves out other
processes, reward workers among them.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RandomState(Callback):
    """The state of Python's, numpy's and torch's generators, CUDA's included."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the checkpoint was written: what ran since was only preparation."""
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts: loading models draws numbers of its own."""
        self._restored = state_dict
