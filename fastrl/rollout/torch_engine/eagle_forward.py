"""The EAGLE drafter's forward as the engine serves it: the same arithmetic in half the operations.

A draft step of a small model costs what its operations cost to launch. Here projections that share
an input are one matrix product, rotations come from a table, and nothing is asked of transformers.
`EagleDrafter.forward` is the definition; tests hold the two together. `LayerForward` is what a
drafter of another kind shares with it (eagle3_forward.py). Leaves out training.
Shape legend: fastrl/types.py; G grouped heads: of queries, keys and values together; I inputs of
the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from fastrl.rollout.attention import KVView, attend
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.torch_engine.served_linear import ServedLinear

_FIRST_POSITIONS = 512


class LayerForward(ABC):
    """Serves the weights of a drafter of one Llama layer as they were at the last `refresh`.

    Args:
        drafter: on its device, in its dtype.
        embedding: the target's.
    """

    def __init__(self, drafter: EagleDrafter, embedding: nn.Module) -> None:
        self._drafter = drafter
        self._embedding = embedding
        self._num_heads = drafter.config.num_attention_heads
        self._num_kv_heads = drafter.num_kv_heads
        self.refresh()

    @abstractmethod
    def _layer(self) -> LlamaDecoderLayer:
        """The drafter's."""

    @abstractmethod
    def _read(self, embeddings_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer's attention reads, [B, T, I], and what it is added to, [B, T, D]."""

    def refresh(self) -> None:
        """Take the drafter's weights, after they were loaded."""
        layer = self._layer()
        attention, mlp = layer.self_attn, layer.mlp
        self._served: dict[int, tuple[ServedLinear, slice]] = {}
        self._qkv = self._serve(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = self._serve(attention.o_proj)
        self._norm = layer.post_attention_layernorm
        self._gate_up = self._serve(mlp.gate_proj, mlp.up_proj)
        self._down, self._activation = self._serve(mlp.down_proj), mlp.act_fn
        self._scale: float = attention.scaling
        self._rotations_S2d = attention.o_proj.weight.new_zeros(0, 2, self._drafter.head_dim)

    def _serve(self, *layers: nn.Linear) -> ServedLinear:
        """One matrix product for layers with the same input."""
        served = ServedLinear.joined(*layers)
        start = 0
        for layer in layers:
            self._served[id(layer.weight)] = served, slice(start, start + layer.out_features)
            start += layer.out_features
        return served

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What it computes with, by the drafter's names; biases of joined matrices left out."""
        for name, tensor in self._drafter.named_weights():
            if id(tensor) in self._served:
                served, outputs = self._served[id(tensor)]
                tensor = served.weight_OI[outputs]
            yield name, tensor

    def __call__(
        self,
        tokens_BT: Tensor,
        hidden_BTD: Tensor,
        positions_BT: Tensor,
        view: KVView,
        longest_position: int,
    ) -> Tensor:
        """The drafter's outputs, [B, T, D]; see its `forward`.

        Args:
            tokens_BT: tokens t+1, whose embeddings the drafter reads.
            hidden_BTD: hidden states t, or what the drafter reads for them.
            positions_BT: t; a second dimension of 1 stands for the same position throughout.
            view: of the drafter's cache.
            longest_position: no position is larger; known to the host.
        """
        inputs_BTI, residual_BTD = self._read(self._embedding(tokens_BT), hidden_BTD)
        qkv_BTGd = self._qkv(inputs_BTI).view(*tokens_BT.shape, -1, self._drafter.head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated_BTGd = self._rotate(qkv_BTGd[:, :, :num_rotated], positions_BT, longest_position)
        rotated_BGTd = rotated_BTGd.transpose(1, 2)
        keys, values = view.update(
            0,
            rotated_BGTd[:, self._num_heads :],
            qkv_BTGd[:, :, num_rotated:].transpose(1, 2),
        )
        attended_BHTd = attend(
            rotated_BGTd[:, : self._num_heads],
            keys,
            values,
            view.additive_mask(None, hidden_BTD.dtype),
            self._scale,
        )
        attended_BTD = attended_BHTd.transpose(1, 2).flatten(2)
        residual_BTD = residual_BTD + self._out(attended_BTD)
        gate, up = self._gate_up(normed(residual_BTD, self._norm)).chunk(2, dim=-1)
        return residual_BTD + self._down(self._activation(gate) * up)

    def _rotate(self, heads_BTGd: Tensor, positions_BT: Tensor, longest_position: int) -> Tensor:
        """Rotary embedding: x cos + (x with its halves exchanged) (-sin, sin)."""
        if longest_position >= len(self._rotations_S2d):
            self._extend_rotations(longest_position + 1)
        rotations = self._rotations_S2d[positions_BT]
        cos_BT1d, sin_BT1d = rotations[:, :, :1], rotations[:, :, 1:]
        exchanged = heads_BTGd.roll(self._drafter.head_dim // 2, dims=-1)
        return torch.addcmul(heads_BTGd * cos_BT1d, exchanged, sin_BT1d)

    def _extend_rotations(self, num_positions: int) -> None:
        num_positions = max(num_positions, 2 * len(self._rotations_S2d), _FIRST_POSITIONS)
        positions_1S = torch.arange(num_positions, device=self._norm.weight.device).unsqueeze(0)
        cos, sin = self._drafter.rotary_emb(self._norm.weight, position_ids=positions_1S)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._rotations_S2d = torch.stack((cos[0], signed_sin[0]), dim=1)


class EagleForward(LayerForward):
    """The EAGLE drafter's."""

    def refresh(self) -> None:
        """Take the drafter's weights, after they were loaded."""
        super().refresh()
        self._fc = self._serve(self._drafter.fc)

    def _layer(self) -> LlamaDecoderLayer:
        layer = self._drafter.layers[0]
        assert isinstance(layer, LlamaDecoderLayer), "an EAGLE drafter has one Llama layer"
        return layer

    def _read(self, embeddings_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        inputs_BTD = self._fc(torch.cat((embeddings_BTD, hidden_BTD), dim=-1))
        return inputs_BTD, inputs_BTD


def normed(hidden: Tensor, norm: LlamaRMSNorm) -> Tensor:
    """Normalized, in one operation."""
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
