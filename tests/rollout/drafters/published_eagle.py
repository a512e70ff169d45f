"""An EAGLE drafter as its definition has it, one token at a time, saved in SafeAILab's layout.

Written from the paper (arXiv 2401.15077) and the names of the published files, without any of
transformers or of FastRL: what an import is held against.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZE, INNER, HEADS, KV_HEADS, VOCAB_SIZE = 16, 24, 4, 2, 11
HEAD_DIM = SIZE // HEADS
SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": SIZE,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 0.02,
    "rope_scaling": None,
    "rope_theta": 77.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def published_weights(*, bias: bool, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Random weights by SafeAILab's names, the copy of the target's embedding included."""
    shapes = {
        "embed_tokens.weight": (VOCAB_SIZE, SIZE),
        "fc.weight": (SIZE, 2 * SIZE),
        **({"fc.bias": (SIZE,)} if bias else {}),
        "layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, SIZE),
        "layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, SIZE),
        "layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, SIZE),
        "layers.0.self_attn.o_proj.weight": (SIZE, HEADS * HEAD_DIM),
        "layers.0.mlp.gate_proj.weight": (INNER, SIZE),
        "layers.0.mlp.up_proj.weight": (INNER, SIZE),
        "layers.0.mlp.down_proj.weight": (SIZE, INNER),
        "layers.0.post_attention_layernorm.weight": (SIZE,),
    }
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(shape, generator=generator) * 0.5).to(dtype)
        for name, shape in shapes.items()
    }


def publish(
    folder: Path, weights: dict[str, Tensor], *, file: str = "pytorch_model.bin", **changes: Any
) -> None:
    """Write a folder; settings changed to None are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not None or k not in changes}
    (folder / "config.json").write_text(json.dumps(settings))


def reference_outputs(
    weights: dict[str, Tensor], embeddings_TD: Tensor, hidden_TD: Tensor
) -> Tensor:
    """Predicted hidden states, [T, D], in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    layer = {
        name.removeprefix("layers.0."): tensor
        for name, tensor in w.items()
        if name.startswith("layers.0.")
    }
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs = []
    for position, (embedding_D, hidden_D) in enumerate(
        zip(embeddings_TD.double(), hidden_TD.double(), strict=True)
    ):
        x_D = w["fc.weight"] @ torch.cat((embedding_D, hidden_D))
        if "fc.bias" in w:
            x_D = x_D + w["fc.bias"]
        queries = _heads(layer["self_attn.q_proj.weight"] @ x_D, position)
        keys.append(_heads(layer["self_attn.k_proj.weight"] @ x_D, position))
        values.append((layer["self_attn.v_proj.weight"] @ x_D).view(-1, HEAD_DIM))
        attended = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            scores = torch.stack([queries[head] @ key[group] for key in keys])
            shares = (scores / math.sqrt(HEAD_DIM)).softmax(0)
            attended.append(
                sum(share * value[group] for share, value in zip(shares, values, strict=True))
            )
        x_D = x_D + layer["self_attn.o_proj.weight"] @ torch.cat(attended)
        scale = (x_D.square().mean() + SETTINGS["rms_norm_eps"]).rsqrt()
        normed_D = x_D * scale * layer["post_attention_layernorm.weight"]
        gate, up = (layer[f"mlp.{name}_proj.weight"] @ normed_D for name in ("gate", "up"))
        outputs.append(x_D + layer["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
    return torch.stack(outputs)


def _heads(flat: Tensor, position: int) -> Tensor:
    """[H, d], each rotated by its position: the halves of a head are pairs of coordinates."""
    half = HEAD_DIM // 2
    rotated = []
    for head in flat.view(-1, HEAD_DIM):
        turned = head.clone()
        for pair in range(half):
            angle = position * SETTINGS["rope_theta"] ** (-2 * pair / HEAD_DIM)
            one, other = head[pair], head[pair + half]
            turned[pair] = one * math.cos(angle) - other * math.sin(angle)
            turned[pair + half] = one * math.sin(angle) + other * math.cos(angle)
        rotated.append(turned)
    return torch.stack(rotated)
