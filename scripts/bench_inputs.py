"""What benchmarks run on: a model's weights, or random ones of its shape; prompts; the machine.

A shape is a folder with a configuration alone, or one of `SHAPES`: step times hardly depend on what
the weights are, so they can be measured without a checkpoint.
"""

from __future__ import annotations

import platform
import random
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.sglang_weights import policy_skeleton
from fastrl.types import Prompt

_QWEN2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "max_position_embeddings": 32768,  # SGLang has buffers for the longest context
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        **_QWEN2_5,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen2.5-32b": {
        **_QWEN2_5,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}
"""Shapes that need no folder, by name."""


# -- weights --------------------------------------------------------------------------------------


def load_weights(
    model_path: str, ckpt: str | None, drafter_path: str | None, *, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The target, and the co-trained drafter's weights (none: those of its folder).

    Raises ValueError for a checkpoint of a drafter that reads or drafts something else than the
    folder's, whose weights would fit and mean nothing there.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    drafter: dict[str, Tensor] = {}
    if ckpt is not None:
        checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)
        policy = {
            name.removeprefix("policy."): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith("policy.")
        }
        model.load_state_dict(policy)
        for name, state in checkpoint["callbacks"].items():
            if name.startswith("DrafterTraining"):
                drafter = state["drafter"]
                if drafter_path is not None:
                    load_drafter(drafter_path, model.config).check_reads_the_same(state)
    return model.to(device, dtype).eval(), drafter


def write_shape(shape: str, folder: Path) -> Path:
    """A model folder without weights: the configuration of a shape, and a tokenizer.

    Args:
        shape: one of `SHAPES`, or a folder whose config.json, and tokenizer if it has one, is
            taken.
        folder: to write to.
    """
    given = Path(shape)
    if shape in SHAPES:
        Qwen2Config(**SHAPES[shape]).save_pretrained(folder)
    elif (given / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in given.glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
    else:
        raise FileNotFoundError(
            f"model {shape!r} is no folder with a config.json (looked in {Path.cwd()}), and no "
            f"known shape; known are {', '.join(SHAPES)}"
        )
    if not (folder / "tokenizer.json").is_file():
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        tokenizer: Any = PreTrainedTokenizerFast
        tokenizer(tokenizer_object=words, eos_token="b").save_pretrained(folder)
    return folder


def random_weights(
    config: PretrainedConfig, *, dtype: torch.dtype, device: str, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights by Hugging Face name, made one by one: normal, norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, like in policy_skeleton(config).items():
        weight = torch.zeros(like.shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif not name.endswith("bias"):
            weight.normal_(std=config.initializer_range, generator=generator)
        yield name, weight


# -- prompts --------------------------------------------------------------------------------------


def load_questions(
    model_path: str,
    *,
    task: str,
    task_config: dict[str, int],
    system_prompt: str | None,
    count: int,
) -> list[Prompt]:
    """Held-out questions of a reasoning-gym task."""
    # Not where benchmarks of random prompts run beside SGLang alone.
    from fastrl.datamodules import ReasoningGymPrompts
    from fastrl.datamodules.chat_template import load_tokenizer, tokenize_questions

    source = ReasoningGymPrompts(task, config=task_config, num_train=1, num_held_out=count)
    return tokenize_questions(
        source.load().held_out,
        load_tokenizer(model_path),
        system_prompt=system_prompt,
        max_prompt_tokens=1024,
        split="held-out",
    )


def random_prompts(model_path: str, *, length: int, count: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens, all of one length."""
    rng = random.Random(seed)
    vocab_size = AutoConfig.from_pretrained(model_path).get_text_config().vocab_size
    return [
        Prompt(
            prompt_id=number,
            tokens=tuple(rng.randrange(2, vocab_size) for _ in range(length)),
            text="",
            answer="",
        )
        for number in range(count)
    ]


# -- the machine ----------------------------------------------------------------------------------


def print_machine(device: str, dtype: str) -> None:
    """The machine and the command, for whoever reads the figures."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    print(f"$ python {shlex.join(sys.argv)}")
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
