"""The EAGLE drafter: one decoder layer over (embedding of token t+1, target hidden state t).

Its output at t approximates the target's hidden state of token t+1; the target's LM head turns
that into the distribution of token t+2. Embedding and LM head are the target's, frozen and never
part of the drafter. The same forward trains (packed, segment-masked) and serves (cached,
tree-masked).

It may draft fewer tokens than the target has (vocabulary.py): then its LM head is the target's rows
for these.

Source: EAGLE (Li et al., ICML 2024, arXiv 2401.15077), in the weight layout of SafeAILab/EAGLE
that SGLang loads (`LlamaForCausalLMEagle`): `fc` and one Llama layer whose input norm is left out.
Leaves out EAGLE-3 (eagle3.py), files (checkpoints.py) and training; the loss is
fastrl/rollout/drafters/loss.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

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
from fastrl.rollout.drafters.vocabulary import (
    CONFIG_KEY,
    check_same_vocabulary,
    checked_token_map,
    read_token_map,
    write_token_map,
)
from fastrl.rollout.weights import check_fits


class EagleDrafter(nn.Module):
    """One-layer drafter over a target's features.

    Args:
        config: Llama-style, of one hidden layer; hidden size and vocabulary are the target's.
    """

    ARCHITECTURE: ClassVar[str] = ARCHITECTURE
    PREDICTS_HIDDEN: ClassVar[bool] = True
    """Whether its output is to resemble the target's hidden state."""
    feature_layers: tuple[int, ...] = ()
    """The target's layers whose inputs it reads, side by side after the last hidden state in the
    target's states; none: that alone."""

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
        self.token_map_F: Tensor | None
        self.register_buffer("token_map_F", None, persistent=False)

    def trim_vocabulary(self, token_ids: Sequence[int] | Tensor, source: str = "a drafter") -> None:
        """Draft these tokens alone, ascending ids of the target's; ValueError for others."""
        token_map_F = checked_token_map(token_ids, self.config.vocab_size, source)
        self.token_map_F = token_map_F.to(self.fc.weight.device)
        setattr(self.config, CONFIG_KEY, len(token_map_F))

    def reassign_vocabulary(self, token_ids: Sequence[int] | Tensor, source: str) -> None:
        """Draft other tokens, as many; weights stay as they are. Of a drafter that is new."""
        assert self.num_drafted == len(token_ids), (
            f"{len(token_ids)} tokens for a vocabulary of {self.num_drafted}"
        )
        self.trim_vocabulary(token_ids, source)

    def start_head(self, lm_head_VD: Tensor, norm_D: Tensor) -> None:
        """Begin with the target's LM head and final norm, where they are not shared anyway."""

    @classmethod
    def for_target(
        cls, target: PretrainedConfig, *, seed: int, token_ids: Sequence[int] | None = None
    ) -> EagleDrafter:
        """A randomly initialized drafter of a target's dimensions.

        Args:
            target: its configuration.
            seed: of the weights.
            token_ids: the draft vocabulary; None for all tokens.
        """
        target = target.get_text_config()
        drafter = cls._random(cls._config_for(target), seed, target.initializer_range)
        nn.init.zeros_(drafter.fc.bias)
        if token_ids is not None:
            drafter.trim_vocabulary(token_ids, "a new drafter")
        return drafter

    @classmethod
    def _config_for(cls, target: PretrainedConfig) -> LlamaConfig:
        return LlamaConfig(
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
            architectures=[cls.ARCHITECTURE],
        )

    @classmethod
    def _random(cls, config: LlamaConfig, seed: int, deviation: float) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drafter = cls(config)
            for parameter in drafter.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=deviation)
        return drafter

    @property
    def state_size(self) -> int:
        """Width S of the target's states that it reads: the last hidden state, then the inputs of
        `feature_layers`."""
        return int(self.config.hidden_size) * (1 + len(self.feature_layers))

    @property
    def num_drafted(self) -> int:
        """Tokens that it can draft."""
        token_map_F = self.token_map_F
        return int(self.config.vocab_size) if token_map_F is None else len(token_map_F)

    def _checked(self, states: Tensor) -> Tensor:
        if states.shape[-1] != self.state_size:
            raise ValueError(
                f"a drafter that reads layers {list(self.feature_layers)} takes states of "
                f"{self.state_size} numbers, got {states.shape[-1]}"
            )
        return states

    def start(self, states: Tensor) -> Tensor:
        """What a draft begins with: [*, D] of the target's states [*, S]."""
        return self._checked(states)

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the LM head reads, of the drafter's output."""
        return hidden

    def draft_head(self, lm_head_VD: Tensor) -> Tensor:
        """The LM head that drafts, [F, D]; F counts the draft vocabulary.

        Args:
            lm_head_VD: the target's.
        """
        return lm_head_VD if self.token_map_F is None else lm_head_VD[self.token_map_F]

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

    def own_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Those of a checkpoint that are the drafter's own, by its names."""
        return without_shared(named_tensors)

    def what_it_reads(self) -> dict[str, Any]:
        """Vocabulary and layers: what its weights mean, for a checkpoint."""
        return {"token_map": self.token_map_F, "feature_layers": list(self.feature_layers)}

    def check_reads_the_same(self, resumed: Mapping[str, Any]) -> None:
        """Raise ValueError unless a resumed run's drafter had the same vocabulary and layers."""
        check_same_vocabulary(self.token_map_F, resumed.get("token_map"))
        layers = list(resumed.get("feature_layers", ()))
        if layers != list(self.feature_layers):
            raise ValueError(
                f"the drafter reads the target's layers {list(self.feature_layers)}, the resumed "
                f"run's {layers}: resume with the drafter that the run began with"
            )

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

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().contiguous().cpu() for name, tensor in self.named_weights()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in the layout SGLang loads."""
        write_checkpoint(folder, self.config, self._checkpoint_tensors(), self.ARCHITECTURE)
        if self.token_map_F is not None and self.PREDICTS_HIDDEN:
            write_token_map(Path(folder), self.token_map_F)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PretrainedConfig | None = None) -> Self:
        """Load a checkpoint of this kind (checkpoints.py: of which layouts); with `target`, check
        that it fits. Of any kind: loading.py.

        Weights are float32, whatever the file's dtype.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            ValueError: another kind of drafter, other dimensions, missing or unknown weights, or
                another draft vocabulary than the configuration's.
        """
        checkpoint = read_checkpoint(folder)
        drafter = cls(checkpoint.config)
        if target is not None:
            drafter.check_target(target, str(folder))
        drafter.load_weights(checkpoint.weights.items(), source=str(folder))
        size = checkpoint.config.to_dict().get(CONFIG_KEY)
        token_map_F = read_token_map(Path(folder), checkpoint.config.vocab_size, size)
        if token_map_F is not None:
            drafter.trim_vocabulary(token_map_F, source=str(folder))
        return drafter

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Copy weights in place; every trainable tensor must be given, nothing unknown may be.

        Copies of the target's embedding and LM head are skipped (published checkpoints carry them).
        Raises ValueError naming missing, unknown and misshapen tensors.
        """
        own = dict(self.named_weights())
        given = dict(self.own_weights(named_tensors))
        check_fits(given, own, what=f"drafter weights of {source}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
