"""The target model as the engine runs it: transformers' own modules over our cache.

A skeleton of the model is built without weights, and takes the policy's: the very same storage
where device and dtype agree (so an optimizer step is seen at once), copies elsewhere. The next
publication is written over copies, tensor by tensor: there is never a second set of them, and no
more than one whole tensor, or that and its layout, besides.

In bfloat16 on a CPU linear layers are laid out for its kernel (served_linear.py), which is a copy.
There nothing is shared: an optimizer step that embedding and norms alone had seen would make a
model that was never published. The LM head has its weight beside the layout: it is the embedding
where the two are tied, and drafters draft with it.

Leaves out training: the policy module has its own model object with its own attention.
Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastrl.rollout.attention import CACHED_ATTENTION, KVView
from fastrl.rollout.drafters.states import inputs_of_layers
from fastrl.rollout.sharded_weights import is_shared, whole
from fastrl.rollout.torch_engine.kv_cache import KVCache
from fastrl.rollout.torch_engine.served_linear import ServedLinear, has_kernel
from fastrl.rollout.weight_differences import Comparison, WeightDifference
from fastrl.rollout.weights import changes_after_head, check_fits

_HEAD = "lm_head.weight"
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class TargetModel:
    """A decoder-only causal LM over a `KVCache`.

    Args:
        model_path: folder with a Hugging Face `config.json`.
        dtype, device: to compute in.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a model this engine would not run exactly.
    """

    def __init__(self, model_path: str, *, dtype: torch.dtype, device: torch.device) -> None:
        if not (Path(model_path) / "config.json").is_file():
            raise FileNotFoundError(
                f"model folder {model_path} has no config.json; expected a Hugging Face checkpoint "
                f"folder (config.json, model.safetensors, tokenizer files)"
            )
        self.dtype, self.device = dtype, device
        self.config: PretrainedConfig = AutoConfig.from_pretrained(model_path).get_text_config()
        _check_supported(self.config, model_path)
        with torch.device("meta"):
            self._model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                self.config, dtype=dtype, attn_implementation=CACHED_ATTENTION
            )
        self._model.eval()
        self._base = self._model.base_model
        if not any(name == "rotary_emb" for name, _ in self._base.named_children()):
            raise ValueError(
                f"{model_path}: {type(self._model).__name__} has no rotary embedding, which the "
                f"embedded engine relies on for positions in a tree; use the SGLang engine, or a "
                f"model of the Llama, Qwen or Mistral families"
            )
        with torch.device(device):
            self._base.rotary_emb = type(self._base.rotary_emb)(config=self.config)
        self._mask_stand_in = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
        self._read_layers: tuple[int, ...] = ()
        self._copies: dict[str, Tensor] = {}  # of weights that could not be shared
        self._laid_out = self._layers_to_lay_out()  # by their weights' names
        self._served: dict[str, ServedLinear] = {}  # likewise, from `load` on
        self.has_weights = False

    @property
    def embedding(self) -> nn.Module:
        """Token embedding: ids to [*, D]."""
        embedding: nn.Module = self._model.get_input_embeddings()
        return embedding

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states to logits [*, V]."""
        lm_head: nn.Module = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return lm_head

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens, prompt and response."""
        return int(self.config.max_position_embeddings)

    def new_cache(self, num_rows: int) -> KVCache:
        """An empty cache for this model."""
        config = self.config
        head_dim = getattr(config, "head_dim", None)
        return KVCache(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            num_rows=num_rows,
            dtype=self.dtype,
            device=self.device,
        )

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights; tensors of our device and dtype are shared, others copied, sharded ones
        gathered from all ranks of their mesh. In bfloat16 on a CPU all are copied: what is served
        stands still until the next call.

        Raises ValueError naming missing, unknown and misshapen tensors.
        """
        given = dict(named_tensors)
        if self.config.tie_word_embeddings:
            given.pop(_HEAD, None)
        own = dict(self._model.named_parameters())
        check_fits(given, own, what="policy weights for the engine's model")
        self.has_weights = False
        new = {}
        # The first publication may be a validation's, in inference mode; later ones write over it.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in given.items():
                ready = whole(tensor, dtype=self.dtype, device=self.device)
                if name in self._laid_out and name != _HEAD:
                    self._lay_out(name, ready)
                elif name in self._copies:
                    self._copies[name].copy_(ready)
                elif not is_shared(ready, tensor):
                    self._copies[name] = new[name] = ready
                elif self._laid_out:
                    self._copies[name] = new[name] = ready.clone()
                else:
                    new[name] = ready
                del ready  # before the next is made
        self._model.load_state_dict(new, strict=False, assign=True)
        self._model.requires_grad_(False)
        self._model.tie_weights()
        if _HEAD in self._laid_out:
            self._lay_out(_HEAD, self.lm_head.get_parameter("weight"))
        for name, served in self._served.items():
            served.bias_O = self._laid_out[name].bias
        _check_materialized(self._model, except_for=self._served.keys() - {_HEAD})
        self.has_weights = True

    def _layers_to_lay_out(self) -> dict[str, nn.Linear]:
        """Float32 is left alone: there the trainer's own memory is served."""
        if self.dtype != torch.bfloat16 or not has_kernel(self.device, self.dtype):
            return {}
        return {
            f"{name}.weight": module
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def _lay_out(self, name: str, weight_OI: Tensor) -> None:
        """Have a layer compute with a weight that its module does not keep."""
        self._served[name] = ServedLinear(weight_OI)
        self._laid_out[name].forward = self._served[name]  # type: ignore[method-assign,assignment]

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[WeightDifference]:
        """Our weights that differ from these; sharded ones are gathered from all ranks of their
        mesh, one at a time.

        Raises ValueError naming missing, unknown and misshapen tensors.
        """
        own, given = dict(self._model.named_parameters()), dict(named_tensors)
        if self.config.tie_word_embeddings:
            given.pop(_HEAD, None)
        check_fits(given, own, what="policy weights to compare")
        comparison = Comparison()
        for name, tensor in given.items():
            published = whole(tensor, dtype=self.dtype, device=self.device)
            if not own[name].is_meta:
                comparison.compare(name, own[name], published)
            for layer in self._layers_of(name, own[name]):
                comparison.compare(layer, self._served[layer].weight_OI, published)
        return comparison.differences()

    def _layers_of(self, name: str, weight: Tensor) -> list[str]:
        """Names of the layers laid out that compute with a published weight: the LM head's, for the
        embedding that it is tied to."""
        if weight is self.lm_head.get_parameter("weight"):
            name = _HEAD
        return [name] if name in self._served else []

    def read_layers(self, layers: Sequence[int]) -> None:
        """Have states hold the inputs of these layers, for a drafter that reads them."""
        self._read_layers = tuple(layers)

    @property
    def state_size(self) -> int:
        """Width S of states: of the hidden state, and of the layers' inputs that are read."""
        return int(self.config.hidden_size) * (1 + len(self._read_layers))

    def logits(self, states: Tensor) -> Tensor:
        """[*, V] of states [*, S]."""
        logits: Tensor = self.lm_head(states[..., : self.config.hidden_size])
        return logits

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, view: KVView) -> Tensor:
        """States [B, T, S]: hidden states after the final norm, and side by side with them the
        inputs of the layers that are read; keys and values go into the view's cache."""
        with inputs_of_layers(self._base, self._read_layers) as inputs:
            output = self._base(
                input_ids=tokens_BT,
                position_ids=positions_BT,
                attention_mask=self._mask_stand_in,  # four-dimensional: passed on as it is, unused
                use_cache=False,
                kv_view=view,
            )
        hidden_BTD: Tensor = output.last_hidden_state
        if not self._read_layers:
            return hidden_BTD
        read = (inputs[layer] for layer in self._read_layers)
        return torch.cat((hidden_BTD, *read), dim=-1)


def _check_supported(config: PretrainedConfig, model_path: str) -> None:
    settings = config.to_dict()
    rope = settings.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"{model_path}: rope type {rope_type!r} makes a token's rotation depend on the longest "
            f"sequence of its batch, so batched rollouts would not be exact; use a model with rope "
            f"type default, linear, llama3 or yarn, or the SGLang engine"
        )
    if changes := changes_after_head(settings):
        raise ValueError(
            f"{model_path} sets {changes}, which change logits after the LM head; the embedded "
            f"engine does not apply them; use the SGLang engine"
        )
    if others := set(settings.get("layer_types") or ()) - _LAYER_TYPES:
        raise ValueError(
            f"{model_path} has layers of type {sorted(others)}; the embedded engine's cache holds "
            f"keys and values of {sorted(_LAYER_TYPES)} alone; use the SGLang engine"
        )


def _check_materialized(model: nn.Module, *, except_for: Collection[str]) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, one in tensors if one.is_meta and name not in except_for]:
        raise ValueError(
            f"the embedded engine cannot fill {empty} of {type(model).__name__}: they are neither "
            f"published weights nor rotary buffers; use the SGLang engine for this architecture"
        )
