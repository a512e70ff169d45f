"""The EAGLE drafter: one decoder layer over (embedding of token t+1, target hidden state t).

Its output at t approximates the target's hidden state of token t+1; the target's LM head turns
that into the distribution of token t+2. Embedding and LM head are the target's, frozen and never
part of the drafter. The same forward trains (packed, segment-masked) and serves (cached,
tree-masked).

Source: EAGLE (Li et al., ICML 2024, arXiv 2401.15077), in the weight layout of SafeAILab/EAGLE
that SGLang loads (`LlamaForCausalLMEagle`): `fc` and one Llama layer whose input norm is left out.
Leaves out EAGLE-3, files (checkpoints.py) and training; the loss is
fastrl/rollout/drafters/loss.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fastrl.rollout.attention import CACHED_ATTENTION
from fastrl.rollout.drafters.checkpoints import (
    ARCHITECTURE,
    read_checkpoint,
    without_shared,
    write_checkpoint,
)
from fastrl.rollout.weights import check_fits


class EagleDrafter(nn.Module):
    """One-layer drafter over a target's features.

    Args:
        config: Llama-style, of one hidden layer; hidden size and vocabulary are the target's.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        config._attn_implementation = CACHED_ATTENTION
        self.config = config
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=True)
        layer = LlamaDecoderLayer(config, layer_idx=0)
        layer.input_layernorm = nn.Identity()  # type: ignore[assignment]
        self.layers = nn.ModuleList([layer])
        self.rotary_emb = LlamaRotaryEmbedding(config)

    @classmethod
    def for_target(cls, target: PretrainedConfig, *, seed: int) -> EagleDrafter:
        """A randomly initialized drafter of a target's dimensions."""
        target = target.get_text_config()
        config = LlamaConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None)
            or target.hidden_size // target.num_attention_heads,
            rms_norm_eps=target.rms_norm_eps,
            max_position_embeddings=target.max_position_embeddings,
            rope_parameters=dict(target.rope_parameters),
            architectures=[ARCHITECTURE],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drafter = cls(config)
            for parameter in drafter.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=target.initializer_range)
            nn.init.zeros_(drafter.fc.bias)
        return drafter

    def forward(
        self,
        embeddings_BTD: Tensor,
        hidden_BTD: Tensor,
        position_ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        **attention_kwargs: Any,
    ) -> Tensor:
        """Predicted hidden states of the next token, [B, T, D].

        Args:
            embeddings_BTD: target embeddings of tokens t+1.
            hidden_BTD: target (or, deeper in a tree, predicted) hidden states of tokens t.
            position_ids_BT: t, counted from the sequence's (or packed segment's) start.
            attention_mask: [B, 1, T, T] bool, True where a query may see; None with `kv_view`.
            attention_kwargs: `kv_view` when serving from a cache.
        """
        inputs = self.fc(torch.cat((embeddings_BTD, hidden_BTD), dim=-1))
        position_embeddings = self.rotary_emb(inputs, position_ids=position_ids_BT)
        return self.layers[0](  # type: ignore[no-any-return]
            inputs,
            attention_mask=attention_mask,
            position_ids=position_ids_BT,
            position_embeddings=position_embeddings,
            **attention_kwargs,
        )

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable tensors by checkpoint name: what is trained, published and saved."""
        yield from self.named_parameters()

    def check_target(self, target: PretrainedConfig, source: str) -> None:
        """Raise ValueError naming each dimension in which the drafter does not fit the target."""
        target = target.get_text_config()
        for name in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(self.config, name), getattr(target, name)
            if ours != theirs:
                raise ValueError(
                    f"drafter {source} has {name} {ours}, but the policy's is {theirs}: a drafter "
                    f"serves only the target it was made for; give the drafter of this policy, or "
                    f"make one with EagleDrafter.for_target"
                )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in the layout SGLang loads."""
        write_checkpoint(folder, self.config, self.named_weights())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, target: PretrainedConfig | None = None
    ) -> EagleDrafter:
        """Load a checkpoint (checkpoints.py: of which layouts); with `target`, check that it fits.

        Weights are float32, whatever the file's dtype.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            ValueError: another kind of drafter, other dimensions, or missing or unknown weights.
        """
        checkpoint = read_checkpoint(folder)
        drafter = cls(checkpoint.config)
        if target is not None:
            drafter.check_target(target, str(folder))
        drafter.load_weights(checkpoint.weights.items(), source=str(folder))
        return drafter

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Copy weights in place; every trainable tensor must be given, nothing unknown may be.

        Copies of the target's embedding and LM head are skipped (published checkpoints carry them).
        Raises ValueError naming missing, unknown and misshapen tensors.
        """
        own = dict(self.named_weights())
        given = dict(without_shared(named_tensors))
        check_fits(given, own, what=f"drafter weights of {source}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
