"""What a model is, in a few values of its configuration: which weights can belong to it.

Leaves out the weights themselves, whose names and shapes are checked where they are loaded
(weights.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rms_norm_eps",
)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Hugging Face configuration that says what the weights mean; plain values."""
    return {key: config[key] for key in _KEYS if config.get(key) is not None}


def architecture_of_folder(folder: str | Path | None) -> dict[str, Any] | None:
    """Of a checkpoint folder's config.json; None without one, which is refused where it is used."""
    if folder is None or not (file := Path(folder) / "config.json").is_file():
        return None
    return architecture(json.loads(file.read_text(encoding="utf-8")))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """`hidden_size 32 instead of 64, …` for what both name; empty if they agree."""
    return ", ".join(
        f"{key} {theirs[key]} instead of {ours[key]}"
        for key in _KEYS
        if key in theirs and key in ours and theirs[key] != ours[key]
    )
