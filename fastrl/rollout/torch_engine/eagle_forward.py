"""The EAGLE drafter's forward as the engine serves it: the same arithmetic in half the operations.

A draft step of a small model costs what its operations cost to launch. Here projections that share
an input are one matrix product, rotations come from a table, and nothing is asked of transformers.
`EagleDrafter.forward` is the definition; tests hold the two together. Leaves out training.
Shape legend: fastrl/types.py; G grouped heads: of queries, keys and values together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastrl.rollout.attention import KVView, attend
from fastrl.rollout.drafters.eagle import EagleDrafter

_FIRST_POSITIONS = 512


class EagleForward:
    """Serves a drafter's weights as they were at the last `refresh`.

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

    def refresh(self) -> None:
        """Take the drafter's weights, after they were loaded."""
        layer = self._drafter.layers[0]
        assert isinstance(layer, LlamaDecoderLayer), "an EAGLE drafter has one Llama layer"
        attention, mlp = layer.self_attn, layer.mlp
        self._fc = self._drafter.fc
        self._qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = attention.o_proj
        self._norm = layer.post_attention_layernorm
        self._gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self._down, self._activation = mlp.down_proj, mlp.act_fn
        self._scale: float = attention.scaling
        self._rotations_S2d = self._fc.weight.new_zeros(0, 2, self._drafter.head_dim)
        self._copies = {
            id(layer.weight): part
            for (weight, _), layers in (
                (self._qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (self._gate_up, (mlp.gate_proj, mlp.up_proj)),
            )
            for layer, part in zip(
                layers, torch.split(weight, [layer.out_features for layer in layers]), strict=True
            )
        }

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What it computes with, by the drafter's names; biases of joined matrices left out."""
        for name, tensor in self._drafter.named_weights():
            yield name, self._copies.get(id(tensor), tensor)

    def __call__(
        self,
        tokens_BT: Tensor,
        hidden_BTD: Tensor,
        positions_BT: Tensor,
        view: KVView,
        longest_position: int,
    ) -> Tensor:
        """Predicted hidden states, [B, T, D]; see `EagleDrafter.forward`.

        Args:
            tokens_BT: tokens t+1, whose embeddings the drafter reads.
            hidden_BTD: hidden states t.
            positions_BT: t; a second dimension of 1 stands for the same position throughout.
            view: of the drafter's cache.
            longest_position: no position is larger; known to the host.
        """
        inputs_BTD = linear(
            torch.cat((self._embedding(tokens_BT), hidden_BTD), dim=-1),
            self._fc.weight,
            self._fc.bias,
        )
        qkv_BTGd = linear(inputs_BTD, *self._qkv).view(*tokens_BT.shape, -1, self._drafter.head_dim)
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
            view.additive_mask(None, inputs_BTD.dtype),
            self._scale,
        )
        attended_BTD = attended_BHTd.transpose(1, 2).flatten(2)
        hidden = inputs_BTD + linear(attended_BTD, self._out.weight, self._out.bias)
        normed = rms_norm(
            hidden, self._norm.weight.shape, self._norm.weight, self._norm.variance_epsilon
        )
        gate, up = linear(normed, *self._gate_up).chunk(2, dim=-1)
        return hidden + linear(self._activation(gate) * up, self._down.weight, self._down.bias)

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
        positions_1S = torch.arange(num_positions, device=self._fc.weight.device).unsqueeze(0)
        cos, sin = self._drafter.rotary_emb(self._fc.weight, position_ids=positions_1S)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._rotations_S2d = torch.stack((cos[0], signed_sin[0]), dim=1)


def _joined(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers' outputs side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None
