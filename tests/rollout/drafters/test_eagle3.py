"""The EAGLE-3 drafter against its definition in float64, one token at a time, and its files."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from fastrl.rollout.drafters.agreement import agreement_by_depth
from fastrl.rollout.drafters.checkpoints import check_sglang_reads
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter, default_feature_layers
from fastrl.rollout.drafters.loading import is_eagle3, load_drafter
from fastrl.rollout.drafters.loss import eagle_loss
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.types import SequenceFeatures

TOKENS = (1, 2, 5, 6, 9)
SIZE, VOCAB_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 11, 2, 1, 4
TARGET = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=SIZE,
    intermediate_size=12,
    num_hidden_layers=7,
    num_attention_heads=NUM_HEADS,
    num_key_value_heads=NUM_KV_HEADS,
    initializer_range=0.5,
    rms_norm_eps=0.1,
    rope_parameters={"rope_type": "default", "rope_theta": 50.0},
)


@pytest.fixture(params=[TOKENS, None], ids=["few tokens", "all tokens"])
def drafter(request):
    drafter = Eagle3Drafter.for_target(TARGET, seed=0, token_ids=request.param)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "norm" in name:  # weights of one would hide a norm that is left out
                weight.uniform_(0.5, 1.5, generator=generator)
    return drafter


@pytest.fixture
def shared_weights():
    generator = torch.Generator().manual_seed(1)
    embedding_VD, lm_head_VD = torch.randn(2, VOCAB_SIZE, SIZE, generator=generator)
    return embedding_VD.requires_grad_(), lm_head_VD.requires_grad_()


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(2)
    return [
        SequenceFeatures(
            tokens_T=torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator),
            hidden_TD=torch.randn(num_tokens, 4 * SIZE, generator=generator),
            num_prompt_tokens=num_prompt_tokens,
            rl_step=0,
        )
        for num_tokens, num_prompt_tokens in ((7, 3), (3, 1), (9, 6))
    ]


# -- the definition -------------------------------------------------------------------------------


def weights_of(drafter):
    return {name: tensor.double() for name, tensor in drafter.named_weights()}


def norm(vector, weight):
    return vector / (vector.pow(2).mean() + TARGET.rms_norm_eps).sqrt() * weight


def rotated(head, position):
    half = len(head) // 2
    out = []
    for i in range(len(head)):
        angle = position / 50.0 ** (2 * (i % half) / HEAD_DIM)
        other = -head[i + half] if i < half else head[i - half]
        out.append(head[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


def step_by_step(weights, embeddings, hiddens):
    """The last place's output, and its logits: vectors, loops, no batch and no mask."""
    inputs = [
        torch.cat(
            (
                norm(embedding, weights["midlayer.input_layernorm.weight"]),
                norm(hidden, weights["midlayer.hidden_norm.weight"]),
            )
        )
        for embedding, hidden in zip(embeddings, hiddens, strict=True)
    ]
    projected = {
        name: [weights[f"midlayer.self_attn.{name}_proj.weight"] @ one for one in inputs]
        for name in "qkv"
    }
    attended = []
    for head in range(NUM_HEADS):
        of_query = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        of_key = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
        query = rotated(projected["q"][-1][of_query], len(inputs) - 1)
        scores = [
            query @ rotated(key[of_key], place) / math.sqrt(HEAD_DIM)
            for place, key in enumerate(projected["k"])
        ]
        shares = torch.stack(scores).softmax(0)
        values = [value[of_key] for value in projected["v"]]
        attended.append(sum(share * value for share, value in zip(shares, values, strict=True)))
    hidden = hiddens[-1] + weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(attended)
    normed = norm(hidden, weights["midlayer.post_attention_layernorm.weight"])
    gate = weights["midlayer.mlp.gate_proj.weight"] @ normed
    up = weights["midlayer.mlp.up_proj.weight"] @ normed
    output = hidden + weights["midlayer.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return output, weights["lm_head.weight"] @ norm(output, weights["norm.weight"])


def naive_chains(weights, embedding_VD, sequences, depth):
    """Of all chains that reach a depth: logits, and the target's last hidden state there."""
    found = []
    for features in sequences:
        tokens, states = features.tokens_T, features.hidden_TD.double()
        for first in range(max(features.num_prompt_tokens, 2), len(tokens) - depth + 1):
            hiddens = [weights["fc.weight"] @ state[SIZE:] for state in states[: first - 1]]
            for token in range(first, first + depth):
                embeddings = [embedding_VD[tokens[place]] for place in range(1, token)]
                output, logits_F = step_by_step(weights, embeddings, hiddens)
                hiddens.append(output)
            found.append((logits_F, states[first + depth - 2][:SIZE]))
    return found


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE])
def test_loss_and_gradients_are_those_of_the_definition(
    drafter, shared_weights, sequences, max_chunk_logits, is_folded
):
    embedding_VD, lm_head_VD = (weight.detach().double() for weight in shared_weights)
    exact = copy.deepcopy(drafter).double()
    weights = dict(exact.named_weights())
    drafted = list(range(VOCAB_SIZE)) if drafter.token_map_F is None else list(TOKENS)
    by_depth, acceptances = [], []
    for depth in (1, 2, 3):
        losses = []
        for logits_F, hidden in naive_chains(weights, embedding_VD, sequences, depth):
            target_V = (lm_head_VD @ hidden).softmax(0)
            logprobs_F = logits_F - logits_F.exp().sum().log()
            losses.append(-sum(target_V[token] * logprobs_F[i] for i, token in enumerate(drafted)))
            if depth == 1:
                acceptances.append(target_V[drafted[int(logits_F.argmax())]].item())
        by_depth.append(sum(losses) / len(losses))
    expected = (by_depth[0] + 0.8 * by_depth[1] + 0.64 * by_depth[2]) / (1 + 0.8 + 0.64)
    expected.backward()

    packed = pack_sequences(sequences, max_pairs=100)
    result = eagle_loss(
        drafter,
        *shared_weights,
        fold_segments(packed) if is_folded else packed,
        hidden_loss_weight=7.0,  # of what an EAGLE-3 drafter does not have
        num_depths=3,
        max_chunk_logits=max_chunk_logits,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert result.hidden.item() == 0
    assert result.top1_acceptance.item() == pytest.approx(
        sum(acceptances) / len(acceptances), rel=1e-4
    )
    exact_gradients = {name: weight.grad for name, weight in exact.named_parameters()}
    for name, weight in drafter.named_parameters():
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(
            weight.grad.double(), exact_gradients[name], rtol=1e-3, atol=1e-5, msg=name
        )
    assert all(weight.grad is None for weight in shared_weights)
    agreements = agreement_by_depth(drafter, *shared_weights, packed, max_depth=3)
    for agreement, loss in zip(agreements, by_depth, strict=True):
        assert agreement.cross_entropy == pytest.approx(loss.item(), rel=1e-4)


def test_no_other_sequence_and_no_later_token_matters(drafter, shared_weights, sequences):
    """Gradients of one sequence's first prediction with respect to all states."""
    states = [f.hidden_TD.clone().requires_grad_() for f in sequences]
    given = [
        dataclasses.replace(f, hidden_TD=state) for f, state in zip(sequences, states, strict=True)
    ]
    packed = pack_sequences(given, max_pairs=100)
    hidden = drafter.start(packed.hidden_BTD)
    embeddings = shared_weights[0][packed.next_tokens_BT]
    output = drafter(embeddings, hidden, packed.position_ids_BT, packed.attention_mask())
    num_first = len(sequences[0]) - 2
    output[0, num_first + 0].sum().backward()  # the second sequence's first pair
    assert states[0].grad is None or not states[0].grad.any()
    assert states[1].grad[0, SIZE:].any()
    assert not states[1].grad[1:].any()
    assert not states[1].grad[:, :SIZE].any()  # the last hidden state is no feature
    assert states[2].grad is None or not states[2].grad.any()


def test_states_of_another_width_are_refused(drafter):
    with pytest.raises(ValueError, match=r"reads layers \[2, 3, 4\] takes states of 32 numbers"):
        drafter.start(torch.zeros(1, 2, SIZE))


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(32, (2, 16, 29)), (7, (2, 3, 4)), (6, (1, 3, 5)), (5, (1, 2, 4)), (3, (1, 2)), (2, (1,))],
)
def test_layers_that_are_read(num_layers, layers):
    assert default_feature_layers(num_layers) == layers


def test_a_target_without_inner_layers_is_refused():
    with pytest.raises(ValueError, match="a target of 1 layer has none"):
        default_feature_layers(1)
    with pytest.raises(ValueError, match="expected layers from 1 to 6 of the target's 7"):
        Eagle3Drafter.for_target(TARGET, seed=0, feature_layers=(0, 7))


# -- files ----------------------------------------------------------------------------------------


def test_a_checkpoint_has_sglangs_layout_and_comes_back_bit_by_bit(drafter, tmp_path):
    drafter.save_pretrained(tmp_path / "a")
    saved = load_file(tmp_path / "a/model.safetensors")
    drafted = list(range(VOCAB_SIZE)) if drafter.token_map_F is None else list(TOKENS)
    assert (saved["d2t"] + torch.arange(len(drafted))).tolist() == drafted
    assert saved["t2d"].nonzero().flatten().tolist() == drafted
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == len(drafted)
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    loaded = load_drafter(tmp_path / "a", TARGET)
    assert isinstance(loaded, Eagle3Drafter)
    assert loaded.feature_layers == (2, 3, 4)
    loaded.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for (name, ours), (_, theirs) in zip(
        loaded.named_weights(), drafter.named_weights(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_published_names_and_what_the_target_lends_are_read(drafter, tmp_path):
    """Later names of SGLang, a copy of the embedding, and layers left to the target."""
    drafter.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    renamed = {
        f"model.{name.replace('midlayer.', 'layers.0.')}": tensor
        for name, tensor in saved.items()
        if name not in ("d2t", "t2d")
    }
    more = {"model.embed_tokens.weight": torch.zeros(VOCAB_SIZE, SIZE)}
    kept = {name: saved[name] for name in ("d2t", "t2d")}
    save_file(renamed | more | kept, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eagle_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_drafter(tmp_path, LlamaConfig(**(TARGET.to_dict() | {"num_hidden_layers": 8})))
    assert loaded.feature_layers == (2, 4, 5)
    for (name, ours), (_, theirs) in zip(
        loaded.named_weights(), drafter.named_weights(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match="which layers of the target it reads"):
        load_drafter(tmp_path)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_safeailabs_layout_is_told_by_its_weights(drafter, tmp_path, architectures):
    """As eagle/traineagle3 writes it: float16 in one .bin, the layers that are read left unsaid,
    no lists of tokens where all are drafted."""
    drafter = copy.deepcopy(drafter).half()
    tensors = drafter._checkpoint_tensors()
    if drafter.token_map_F is None:
        tensors = {name: t for name, t in tensors.items() if name not in ("d2t", "t2d")}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    settings = SAFEAILAB | {"draft_vocab_size": drafter.num_drafted}
    if architectures is not None:
        settings |= {"architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    target = LlamaConfig(**(TARGET.to_dict() | {"num_hidden_layers": 8}))
    loaded = load_drafter(tmp_path, target)
    assert isinstance(loaded, Eagle3Drafter)
    assert loaded.feature_layers == (2, 4, 5)  # idx 2, len // 2 and len - 3 of its model
    assert loaded.num_drafted == drafter.num_drafted
    for name, weight in loaded.named_weights():
        assert torch.equal(weight.half(), tensors[name]), name
    with pytest.raises(ValueError, match="is an EAGLE-3 drafter"):
        EagleDrafter.from_pretrained(tmp_path, target)
    with pytest.raises(ValueError, match=r"export_drafter\.py --drafter"):
        check_sglang_reads(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    check_sglang_reads(tmp_path / "again")


SAFEAILAB = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": SIZE,
    "initializer_range": 0.02,
    "intermediate_size": TARGET.intermediate_size,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": TARGET.num_attention_heads,
    "num_key_value_heads": TARGET.num_key_value_heads,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": TARGET.rms_norm_eps,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
"""eagle/traineagle3/config.json, of this target's dimensions."""


def test_an_eagle_drafter_is_no_eagle_3_drafter(tmp_path):
    EagleDrafter.for_target(TARGET, seed=0).save_pretrained(tmp_path)
    for architectures in (["LlamaForCausalLMEagle"], ["LlamaForCausalLM"]):
        config = json.loads((tmp_path / "config.json").read_text())
        config["architectures"] = architectures
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert not is_eagle3(tmp_path)
        with pytest.raises(ValueError, match="is it an EAGLE-3 drafter"):
            Eagle3Drafter.from_pretrained(tmp_path)


def reading(layer_ids, **more):
    return {"eagle_aux_hidden_state_layer_ids": layer_ids} | more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before_fc": True}, "SGLang alone runs them"),
        ({"draft_vocab_size": None}, "SGLang alone runs it"),
        ({"vocab_size": 12}, "vocab_size 12, but the policy's is 11"),
        ({"architectures": ["Other"]}, "is it a drafter"),
        ({"tie_word_embeddings": True}, "SGLang makes something else of it"),
        ({"eagle_config": reading([1, 3, 2])}, "has to be ascending"),
        ({"eagle_config": reading([1, 1, 2])}, "has to be ascending"),
        ({"eagle_config": reading([-1, 1, 2])}, "has to be ascending"),
        ({"eagle_config": reading([1, 2, 6])}, r"reads layers \[2, 3, 7\], but the policy has 7"),
        ({"eagle_config": reading([1, 2, 3], use_aux_hidden_state=False)}, "something else of it"),
    ],
)
def test_what_is_not_supported_is_said(drafter, tmp_path, change, message):
    drafter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path, TARGET)


def test_a_lost_list_of_tokens_and_another_kind_are_noticed(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an EAGLE-3 drafter"):
        EagleDrafter.from_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    del saved["d2t"]
    save_file(saved, tmp_path / "model.safetensors")
    if drafter.token_map_F is None:
        assert load_drafter(tmp_path).token_map_F is None
    else:
        with pytest.raises(ValueError, match="has no d2t"):
            load_drafter(tmp_path)


def test_a_list_of_tokens_of_another_drafter_is_noticed(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    save_file(saved | {"d2t": saved["d2t"][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="they are of two drafters"):
        load_drafter(tmp_path)


def test_a_run_is_resumed_with_the_layers_it_read(drafter):
    drafter.check_reads_the_same(drafter.what_it_reads())
    with pytest.raises(ValueError, match=r"the resumed run's \[2, 3\]"):
        drafter.check_reads_the_same(drafter.what_it_reads() | {"feature_layers": [2, 3]})


def test_a_vocabulary_is_trimmed_with_its_rows(drafter):
    before = drafter.lm_head.weight.detach().clone()
    drafted = list(range(VOCAB_SIZE)) if drafter.token_map_F is None else list(TOKENS)
    drafter.trim_vocabulary((2, 6))
    assert drafter.token_map_F.tolist() == [2, 6]
    assert torch.equal(drafter.lm_head.weight, before[[drafted.index(2), drafted.index(6)]])
    with pytest.raises(ValueError, match="choose among those"):
        drafter.trim_vocabulary((2, 7))
