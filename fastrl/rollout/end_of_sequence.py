"""Which tokens end a model's responses: both engines ask here, so that they agree."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


def eos_token_ids(
    model_path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """End-of-sequence tokens of the generation configuration (or the model's) and the tokenizer."""
    configured = config.to_dict().get("eos_token_id")
    if (Path(model_path) / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(model_path).eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return tuple(sorted(ids - {None}))
