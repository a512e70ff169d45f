"""The EAGLE-3 drafter: one decoder layer over embeddings and features of several target layers.

It starts from the hidden states that three of the target's layers, low, middle and high, are given
(`feature_layers`), joined by a linear map, and from then on reads its own output: that need not
resemble any hidden state of the target, so its loss has no such part, and it is trained along
chains as it drafts ("training-time test"; the loss's `num_depths`). It has an LM head of its own,
over a vocabulary of its own, in general of fewer tokens.

    residual = hidden
    inputs   = concat(input_layernorm(embedding of token t+1), hidden_norm(hidden t))
    output   = one Llama layer's attention and MLP over them, added to the residual
    logits of token t+2 = lm_head(norm(output))

Source: EAGLE-3 (Li et al., 2025, arXiv 2503.01840), in the layout that SGLang and SpecForge share
(`LlamaForCausalLMEagle3`): `midlayer`, `fc`, `norm`, `lm_head`, `d2t` and `t2d`. Leaves out its
variants with normalized features, several layers, and the loss. Shape legend: fastrl/types.py; F
tokens of the draft vocabulary, S width of the target's states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from fastrl.rollout.drafters.checkpoints import read_settings, read_tensors
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.vocabulary import checked_token_map

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
"""In `eagle_config`, by SGLang's name: layers whose output is read, counted from 0."""
_FEWEST_LAYERS = 7
"""Of a target in which EAGLE-3's choice of layers are three."""
_VARIANTS = ("fc_norm", "use_aux_norm", "norm_before_fc", "norm_output")


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """Layers whose inputs are read: EAGLE-3's low, middle and high; fewer of a shallow target."""
    if num_layers < 2:
        raise ValueError(
            f"EAGLE-3 reads what inner layers are given, and a target of {num_layers} layer has "
            f"none; use an EAGLE drafter"
        )
    if num_layers >= _FEWEST_LAYERS:
        return 2, num_layers // 2, num_layers - 3
    return tuple(sorted({1, num_layers // 2, num_layers - 1}))


class Eagle3Drafter(EagleDrafter):
    """One-layer drafter over features of several layers, with an LM head of its own.

    Args:
        config: Llama-style, of one hidden layer; `draft_vocab_size` tokens, and layers to read in
            `eagle_config`.
    """

    ARCHITECTURE: ClassVar[str] = "LlamaForCausalLMEagle3"
    PREDICTS_HIDDEN: ClassVar[bool] = False

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        del self.layers
        size, head_dim = config.hidden_size, self.head_dim
        self.feature_layers = _feature_layers(config)
        self.fc = nn.Linear(len(self.feature_layers) * size, size, bias=False)
        layer = LlamaDecoderLayer(config, layer_idx=0)
        for name, num_heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", self.num_kv_heads),
            ("v_proj", self.num_kv_heads),
        ):
            setattr(layer.self_attn, name, nn.Linear(2 * size, num_heads * head_dim, bias=False))
        layer.add_module("hidden_norm", LlamaRMSNorm(size, eps=config.rms_norm_eps))
        self.midlayer = layer
        self.norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    @classmethod
    def for_target(
        cls,
        target: PretrainedConfig,
        *,
        seed: int,
        token_ids: Sequence[int] | None = None,
        feature_layers: Sequence[int] | None = None,
    ) -> Eagle3Drafter:
        """A randomly initialized drafter of a target's dimensions.

        Args:
            target: its configuration.
            seed: of the weights.
            token_ids: the draft vocabulary; None for all tokens.
            feature_layers: layers whose inputs are read; None for EAGLE-3's choice.
        """
        target = target.get_text_config()
        config = cls._config_for(target)
        layers = feature_layers or default_feature_layers(target.num_hidden_layers)
        if not all(1 <= layer < target.num_hidden_layers for layer in layers):
            raise ValueError(
                f"feature_layers {list(layers)}: expected layers from 1 to "
                f"{target.num_hidden_layers - 1} of the target's {target.num_hidden_layers}"
            )
        config.eagle_config = {
            "use_aux_hidden_state": True,
            _LAYER_IDS: [layer - 1 for layer in layers],
        }
        config.draft_vocab_size = len(token_ids) if token_ids is not None else target.vocab_size
        drafter = cls._random(config, seed, target.initializer_range)
        if token_ids is not None:
            drafter._set_token_map(token_ids, "a new drafter")
        return drafter

    def trim_vocabulary(self, token_ids: Sequence[int] | Tensor, source: str = "a drafter") -> None:
        """Draft these tokens alone; those of them that the LM head has no row for are an error."""
        token_map_F = checked_token_map(token_ids, self.config.vocab_size, source)
        own_F = self.token_map_F
        if own_F is None:
            own_F = torch.arange(self.config.vocab_size, device=self.fc.weight.device)
        rows_F = torch.searchsorted(own_F, token_map_F.to(own_F.device))
        rows_F = rows_F.clamp_max(len(own_F) - 1)
        if not torch.equal(own_F[rows_F], token_map_F.to(own_F.device)):
            raise ValueError(
                f"the drafter of {source} cannot draft all of these tokens: its own vocabulary has "
                f"{len(own_F)}; choose among those"
            )
        head = nn.Linear(self.lm_head.in_features, len(token_map_F), bias=False)
        head.weight = nn.Parameter(self.lm_head.weight.detach()[rows_F].clone())
        self.lm_head = head
        self.config.draft_vocab_size = len(token_map_F)
        self._set_token_map(token_map_F, source)

    def reassign_vocabulary(self, token_ids: Sequence[int] | Tensor, source: str) -> None:
        """Draft other tokens, as many; weights stay as they are. Of a drafter that is new."""
        assert self.num_drafted == len(token_ids), (
            f"{len(token_ids)} tokens for a vocabulary of {self.num_drafted}"
        )
        self._set_token_map(token_ids, source)

    @torch.no_grad()
    def start_head(self, lm_head_VD: Tensor, norm_D: Tensor) -> None:
        """Begin with the target's LM head, as far as its tokens can be drafted, and final norm.

        Far fewer steps teach what that already knows of tokens.
        """
        token_map_F = self.token_map_F
        rows = slice(None) if token_map_F is None else token_map_F.to(lm_head_VD.device)
        self.lm_head.weight.copy_(lm_head_VD[rows])
        self.norm.weight.copy_(norm_D)

    def _set_token_map(self, token_ids: Sequence[int] | Tensor, source: str) -> None:
        token_map_F = checked_token_map(token_ids, self.config.vocab_size, source)
        is_whole = len(token_map_F) == self.config.vocab_size
        self.token_map_F = None if is_whole else token_map_F.to(self.fc.weight.device)

    def check_target(self, target: PretrainedConfig, source: str) -> None:
        """Raise ValueError naming what does not fit the target, layers among it."""
        super().check_target(target, source)
        num_layers = target.get_text_config().num_hidden_layers
        if self.feature_layers[-1] >= num_layers:
            raise ValueError(
                f"drafter {source} reads layers {list(self.feature_layers)}, but the policy has "
                f"{num_layers}, counted from 0: a drafter serves only the target it was made for; "
                f"give the drafter of this policy"
            )

    # -- forward ----------------------------------------------------------------------------------

    def start(self, states: Tensor) -> Tensor:
        """Features of the target's states, joined: [*, D] of [*, S]."""
        joined: Tensor = self.fc(self._checked(states)[..., self.config.hidden_size :])
        return joined

    def forward(
        self,
        embeddings_BTD: Tensor,
        hidden_BTD: Tensor,
        position_ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        **attention_kwargs: Any,
    ) -> Tensor:
        """What the next draft reads in place of features, [B, T, D]; see `EagleDrafter.forward`."""
        layer = self.midlayer
        hidden_norm = layer.get_submodule("hidden_norm")
        inputs = torch.cat((layer.input_layernorm(embeddings_BTD), hidden_norm(hidden_BTD)), dim=-1)
        attended, _ = layer.self_attn(
            hidden_states=inputs,
            position_embeddings=self.rotary_emb(hidden_BTD, position_ids=position_ids_BT),
            attention_mask=attention_mask,
            **attention_kwargs,
        )
        hidden = hidden_BTD + attended
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the LM head reads."""
        normed: Tensor = self.norm(hidden)
        return normed

    def draft_head(self, lm_head_VD: Tensor) -> Tensor:
        """Its own, [F, D]."""
        return self.lm_head.weight

    # -- weights ----------------------------------------------------------------------------------

    def own_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Without a copy of the target's embedding, and without the lists of tokens."""
        for name, tensor in named_tensors:
            name = name.removeprefix("model.").replace("layers.0.", "midlayer.")
            is_copy = name.startswith(("embed_tokens.", "d2t", "t2d"))
            if not is_copy and not name.endswith("rotary_emb.inv_freq"):
                yield name, tensor

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: weights, `d2t` (what to add to a place in the draft vocabulary to have the
        token) and `t2d` (whether a token is in it)."""
        vocab_size, num_drafted = self.config.vocab_size, self.config.draft_vocab_size
        place_F = torch.arange(num_drafted)
        token_F = place_F if self.token_map_F is None else self.token_map_F.cpu()
        is_drafted_V = torch.zeros(vocab_size, dtype=torch.bool)
        is_drafted_V[token_F] = True
        return super()._checkpoint_tensors() | {"d2t": token_F - place_F, "t2d": is_drafted_V}

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PretrainedConfig | None = None) -> Self:
        """Load a checkpoint; with `target`, check that it fits. See `EagleDrafter`."""
        settings, tensors = read_settings(Path(folder)), read_tensors(Path(folder))
        if settings.get("architectures") != [cls.ARCHITECTURE]:
            raise ValueError(
                f"drafter checkpoint {folder} has architectures {settings.get('architectures')}, "
                f"expected ['{cls.ARCHITECTURE}']: is it an EAGLE-3 drafter?"
            )
        drafter = cls(LlamaConfig.from_dict(_completed(settings, target)))
        if target is not None:
            drafter.check_target(target, str(folder))
        drafter.load_weights(tensors.items(), source=str(folder))
        num_drafted = drafter.config.draft_vocab_size
        if "d2t" in tensors:
            offsets_F = tensors["d2t"]
        elif num_drafted == drafter.config.vocab_size:  # all tokens: nothing to map
            return drafter
        else:
            raise ValueError(
                f"drafter checkpoint {folder} has no d2t, which says what tokens it drafts: is it "
                f"complete?"
            )
        if len(offsets_F) != num_drafted:
            raise ValueError(
                f"drafter checkpoint {folder} has d2t of {len(offsets_F)} tokens, but "
                f"draft_vocab_size {num_drafted} in config.json; they are of two drafters"
            )
        drafter._set_token_map(offsets_F + torch.arange(num_drafted), str(folder))
        return drafter


def _completed(settings: dict[str, Any], target: PretrainedConfig | None) -> dict[str, Any]:
    """With what a checkpoint's configuration leaves to the target: the layers it reads."""
    eagle_config = dict(settings.get("eagle_config") or {})
    if eagle_config.get(_LAYER_IDS) is None and target is not None:
        num_layers = target.get_text_config().num_hidden_layers
        if num_layers >= _FEWEST_LAYERS:
            layers = default_feature_layers(num_layers)
            eagle_config[_LAYER_IDS] = [layer - 1 for layer in layers]
    return settings | {"eagle_config": eagle_config}


def _feature_layers(config: LlamaConfig) -> tuple[int, ...]:
    settings = config.to_dict()
    if variants := [name for name in _VARIANTS if settings.get(name)]:
        raise ValueError(
            f"EAGLE-3 drafters with {variants} are not supported; SGLang alone runs them"
        )
    eagle_config = dict(settings.get("eagle_config") or {})
    if settings.get("tie_word_embeddings") or eagle_config.get("use_aux_hidden_state") is False:
        raise ValueError(
            "an EAGLE-3 drafter with tie_word_embeddings, or with use_aux_hidden_state false, is "
            "not supported: SGLang makes something else of it"
        )
    layer_ids = eagle_config.get(_LAYER_IDS)
    if layer_ids is None:
        raise ValueError(
            f"an EAGLE-3 drafter's config.json has to say in eagle_config.{_LAYER_IDS} which "
            f"layers of the target it reads; got {eagle_config or None}"
        )
    if settings.get("draft_vocab_size") is None:
        raise ValueError(
            "an EAGLE-3 drafter without draft_vocab_size, that is with the target's LM head, is "
            "not supported; SGLang alone runs it"
        )
    layers = tuple(layer + 1 for layer in layer_ids)
    if not layers or layers[0] < 1 or any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(
            f"an EAGLE-3 drafter's eagle_config.{_LAYER_IDS} has to be ascending, from 0; got "
            f"{layer_ids}: engines would join what layers give in another order"
        )
    return layers
