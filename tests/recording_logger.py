"""A logger that keeps what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger


class RecordingLogger(CSVLogger):
    """Keeps metrics in the order they came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        """RL step and metrics."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))
