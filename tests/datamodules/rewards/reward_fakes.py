"""Rewards that misbehave as the response tells them to. Importable by worker processes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from fastrl.datamodules.rewards import BatchRewardFunction, RewardFunction
from fastrl.types import Prompt


class TwoArgumentError(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class ObedientReward(RewardFunction):
    """Scores the length of a response, unless the response names a way to fail."""

    def score(self, text: str, prompt: Prompt) -> Any:
        match text:
            case "hang":
                time.sleep(1000)
            case "hang, deaf to SIGTERM":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            case "hang with the GIL":
                re.match(r"(a+)+b", "a" * 60)
            case "raise":
                raise KeyError("boom")
            case "raise what does not unpickle":
                raise TwoArgumentError("boom", "twice")
            case "sys.exit":
                sys.exit("enough")
            case "os._exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "nan":
                return float("nan")
            case "inf":
                return float("-inf")
            case "None":
                return None
            case "str":
                return "1.0"
            case "pid":
                return os.getpid()
        return len(text)


class LockedReward(RewardFunction):
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def score(self, text: str, prompt: Prompt) -> float:
        return 0.0


class RefusingReward(RewardFunction):
    """Unpickles in the process that made it only."""

    def __init__(self) -> None:
        self.home = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["home"] != os.getpid():
            raise RuntimeError("not at home")
        self.__dict__.update(state)

    def score(self, text: str, prompt: Prompt) -> float:
        return 0.0


class RankReward(BatchRewardFunction):
    """Scores a response by its rank among all of them by length; fails on demand."""

    def score_batch(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        if "short" in texts:
            return [0.0] * (len(texts) - 1)
        if "raise" in texts:
            raise ValueError("boom")
        ranks = {text: float(rank) for rank, text in enumerate(sorted(texts, key=len))}
        return [float("nan") if text == "nan" else ranks[text] for text in texts]
