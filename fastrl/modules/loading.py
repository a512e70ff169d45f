"""Loads the Hugging Face model under training: float32, no dropout, every weight given.

Leaves out downloads: a model is a local folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastrl.model_files import download_hint
from fastrl.rollout.weights import changes_after_head


def check_model_folder(model_path: str) -> None:
    """Raise FileNotFoundError unless `model_path` is a folder with a model's configuration."""
    if not (Path(model_path) / "config.json").is_file():
        problem = "has no config.json" if Path(model_path).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"model_path: folder {model_path!r} {problem} (looked in {Path.cwd()}); expected a "
            f"Hugging Face checkpoint folder with config.json, *.safetensors and tokenizer files. "
            f"Give its path, or download the model into a folder first{download_hint(model_path)}; "
            f"models are never fetched from the network"
        )


def load_causal_lm(model_path: str) -> PreTrainedModel:
    """The model of a checkpoint folder, in float32.

    Dropout is set to 0: the distribution that is trained must be the one that rollouts sampled
    from.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: weights missing from the checkpoint, or an architecture that rescales its
            logits.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_path,
        config=_training_config(model_path),
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model_path: checkpoint {model_path!r} lacks {len(missing)} weights, first "
            f"{missing[0]!r}; they would be random. Does config.json belong to these weights?"
        )
    return model  # type: ignore[no-any-return]


def empty_causal_lm(model_path: str) -> PreTrainedModel:
    """The same model without its weights, which are on no device (meta)."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(
            _training_config(model_path), dtype=torch.float32, attn_implementation="sdpa"
        )
    return cast(PreTrainedModel, model.eval())


def _training_config(model_path: str) -> PretrainedConfig:
    check_model_folder(model_path)
    config: PretrainedConfig = AutoConfig.from_pretrained(model_path, local_files_only=True)
    _check_plain_head(config, model_path)
    _disable_dropout(config)
    return config


def _disable_dropout(config: PretrainedConfig) -> None:
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _check_plain_head(config: PretrainedConfig, model_path: str) -> None:
    values = config.to_dict()
    if changed := changes_after_head(values):
        raise ValueError(
            f"model_path: {model_path!r} ({config.model_type}) sets {changed}, which changes "
            f"logits after the LM head; such architectures are not supported, use one of the "
            f"Llama, Qwen or Mistral families"
        )
