"""Tiny random checkpoints of the supported families, and drafters for them, written to a folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.types import Prompt

VOCAB_SIZE = 40
EOS = 1

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
}


def make_target(
    folder: Path, family: str = "llama", seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model of a family, saved with its tokenizer; decisive enough for varied rollouts."""
    config_class, model_class, settings = FAMILIES[family]
    config = config_class(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": EOS,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            **settings,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token=f"w{EOS}", pad_token="w0"
    ).save_pretrained(folder)
    return model


def make_drafter(folder: Path, target: PreTrainedModel, seed: int = 0) -> EagleDrafter:
    """A random drafter of the target, saved."""
    drafter = EagleDrafter.for_target(target.config, seed=seed)
    drafter.save_pretrained(folder)
    return drafter


def make_eagle3_drafter(folder: Path, target: PreTrainedModel) -> None:
    """A random EAGLE-3 drafter of the target, in the layout that SGLang loads."""
    config = target.config
    size, inner, vocab_size = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = size // heads
    shapes = {
        "fc.weight": (size, 3 * size),
        "norm.weight": (size,),
        "lm_head.weight": (vocab_size, size),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "midlayer.self_attn.q_proj.weight": (heads * head_dim, 2 * size),
        "midlayer.self_attn.k_proj.weight": (kv_heads * head_dim, 2 * size),
        "midlayer.self_attn.v_proj.weight": (kv_heads * head_dim, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    weights["d2t"] = torch.zeros(vocab_size, dtype=torch.int64)
    weights["t2d"] = torch.ones(vocab_size, dtype=torch.bool)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    settings = config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": vocab_size,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))


def make_prompts(count: int, seed: int = 0, shortest: int = 2) -> list[Prompt]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for number in range(count):
        length = shortest + 3 * number % 11
        tokens = torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
        prompts.append(Prompt(prompt_id=number, tokens=tuple(tokens), text="", answer=""))
    return prompts
