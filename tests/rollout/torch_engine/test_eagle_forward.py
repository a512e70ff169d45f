"""The serving forwards are the drafters' own forwards, in other operations."""

import pytest
import torch
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine.cache_views import CausalView
from fastrl.rollout.torch_engine.eagle3_forward import Eagle3Forward
from fastrl.rollout.torch_engine.eagle_forward import EagleForward, LayerForward
from fastrl.rollout.torch_engine.kv_cache import KVCache

ROTARY = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
}
VOCAB_SIZE = 50
KINDS = {"eagle": (EagleDrafter, EagleForward), "eagle3": (Eagle3Drafter, Eagle3Forward)}


def make_drafter(kind: str = "eagle", **changes: object) -> EagleDrafter:
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": ROTARY["default"],
            "draft_vocab_size": VOCAB_SIZE,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
            **changes,
        }
    )
    torch.manual_seed(0)
    drafter = KINDS[kind][0](config)
    for parameter in drafter.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.requires_grad_(False).eval()


def serving(drafter: EagleDrafter, embedding: torch.nn.Module) -> LayerForward:
    """The forward of the drafter's kind."""
    (forward,) = [forward for kind, forward in KINDS.values() if type(drafter) is kind]
    return forward(drafter, embedding)


def both_outputs(
    drafter: EagleDrafter, dtype: torch.dtype, first_position: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the drafter's forward, and of the serving one in two calls with a cache between."""
    torch.manual_seed(1)
    drafter = drafter.to(dtype)
    embedding = torch.nn.Embedding(VOCAB_SIZE, 32).to(dtype)
    tokens_BT = torch.randint(VOCAB_SIZE, (3, 9))
    hidden_BTD = torch.randn(3, 9, 32, dtype=dtype)
    positions_BT = torch.arange(9).expand(3, -1) + first_position
    causal_TT = torch.ones(9, 9, dtype=torch.bool).tril()
    with torch.inference_mode():
        expected = drafter(
            embedding(tokens_BT),
            hidden_BTD,
            positions_BT,
            attention_mask=causal_TT.expand(3, 1, -1, -1),
        )
        serve = serving(drafter, embedding)
        cache = KVCache(
            num_layers=1,
            num_kv_heads=drafter.num_kv_heads,
            head_dim=drafter.head_dim,
            num_rows=3,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        cache.reserve(9, 0)
        served = []
        for start, end in ((0, 4), (4, 9)):
            view = CausalView(
                cache,
                base_B=torch.full((3,), start),
                longest_base=start,
                num_tokens=end - start,
            )
            span = slice(start, end)
            served.append(
                serve(
                    tokens_BT[:, span],
                    hidden_BTD[:, span],
                    positions_BT[:, span],
                    view,
                    first_position + end - 1,
                )
            )
    return expected, torch.cat(served, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_serving_computes_the_drafter_s_forward(changes, rotary, kind):
    drafter = make_drafter(kind, rope_parameters=ROTARY[rotary], **changes)
    expected, served = both_outputs(drafter, torch.float32)
    assert (served - expected).norm() < 1e-6 * expected.norm()


def test_serving_computes_it_far_into_a_sequence():
    """Rotations come from a table that grows."""
    expected, served = both_outputs(make_drafter(), torch.float32, first_position=1500)
    assert (served - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_serving_in_bfloat16_is_as_near_to_float32_as_the_forward_itself(kind):
    exact, _ = both_outputs(make_drafter(kind), torch.float32)
    expected, served = both_outputs(make_drafter(kind), torch.bfloat16)
    own_error = (expected.float() - exact).norm()
    assert (served.float() - exact).norm() < 1.5 * own_error


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_weights_are_served_after_a_refresh(kind):
    drafter, other = make_drafter(kind), make_drafter(kind)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    embedding = torch.nn.Embedding(VOCAB_SIZE, 32)
    serve = serving(drafter, embedding)
    drafter.load_weights(other.named_weights(), source="test")
    serve.refresh()
    fresh = serving(other, embedding)
    tokens_BT, hidden_BTD = torch.tensor([[3]]), torch.randn(1, 1, 32)

    def output(forward: LayerForward) -> torch.Tensor:
        cache = KVCache(
            num_layers=1,
            num_kv_heads=2,
            head_dim=8,
            num_rows=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        cache.reserve(1, 0)
        view = CausalView(cache, base_B=torch.tensor([0]), longest_base=0, num_tokens=1)
        with torch.inference_mode():
            return forward(tokens_BT, hidden_BTD, torch.tensor([[0]]), view, 0)

    assert torch.equal(output(serve), output(fresh))
    served = dict(serve.named_weights())
    for name, tensor in other.named_weights():
        assert torch.equal(served[name], tensor), name
