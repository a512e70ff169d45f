"""What drafter features are a function of, as short texts: two runs with equal ones share a cache.

Leaves out the engine, the machine and library versions, which change the rounding of numbers (and
so, rarely, a sampled token).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.types import Prompt, SamplingParams


def feature_identity(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    sampling: SamplingParams | None,
    max_tokens: int,
    num_samples: int,
    layers: Sequence[int],
    tokens_per_forward: int,
    prompts_per_shard: int,
    precision: str,
    kept_as: str,
    seed: int,
) -> dict[str, str]:
    """By name, for the message that says what differs.

    Args:
        target: every weight counts.
        tokenizer: its vocabulary, rules and chat template.
        prompts: of each split, in the order of the shards.
        sampling: None where responses are given: they count then.
        max_tokens: longest response.
        num_samples: responses a prompt.
        layers: whose inputs are kept besides the last hidden states.
        tokens_per_forward: which sequences share a forward.
        prompts_per_shard: and a shard.
        precision: of the target's forward, Lightning's name.
        kept_as: dtype of the hidden states.
        seed: of the tokens sampled.
    """
    asked = [
        (split, prompt.prompt_id, prompt.tokens, prompt.answer if sampling is None else "")
        for split, of_split in prompts.items()
        for prompt in of_split
    ]
    how = "given" if sampling is None else json.dumps(dataclasses.asdict(sampling), sort_keys=True)
    return {
        "target": _target_digest(target),
        "tokenizer": _digest([_tokenizer_text(tokenizer).encode()]),
        "prompts": _digest(repr(entry).encode() for entry in asked),
        "sampling": f"{how}, {num_samples} of {max_tokens} tokens, seed {seed}",
        "shard size": f"{prompts_per_shard} prompts, {tokens_per_forward} tokens a forward",
        "precision": f"{precision}, kept as {kept_as}",
        "layers": str(list(layers)),
    }


def _target_digest(target: PreTrainedModel) -> str:
    """Over configuration, names and bytes of all parameters."""

    def parts() -> Iterable[bytes | memoryview]:
        config = target.config.to_dict()
        config.pop("_name_or_path", None)
        yield json.dumps(config, sort_keys=True, default=str).encode()
        for name, parameter in target.named_parameters():
            yield f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode()
            flat = parameter.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data

    return _digest(parts())


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return json.dumps([vocabulary, rules, tokenizer.chat_template], default=str)


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
