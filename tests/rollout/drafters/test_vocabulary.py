"""Drafters with fewer tokens than their target: the choice, the loss, the files, the drafts."""

import copy
import dataclasses
import json
from collections import deque

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.agreement import agreement_by_depth
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import eagle_loss
from fastrl.rollout.drafters.packing import pack_sequences
from fastrl.rollout.drafters.vocabulary import (
    TOKEN_MAP_FILE,
    check_same_vocabulary,
    frequent_tokens,
)
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, SamplingParams
from tests.rollout.drafters.conftest import VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains
from tests.rollout.tiny_models import VOCAB_SIZE as TARGET_VOCAB_SIZE
from tests.rollout.tiny_models import make_prompts
from tests.rollout.torch_engine.test_cache_after_acceptance import generation_of, requests_of
from tests.rollout.torch_engine.test_drafting import paths_of

TOKENS = (1, 2, 5, 6, 9)
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

# -- the choice -----------------------------------------------------------------------------------


def test_the_most_frequent_tokens_of_equals_the_lowest():
    sequences = [(3, 3, 7, 1), (7, 3, 0), (9, 1)]  # 3: 3, 1: 2, 7: 2, 0: 1, 9: 1
    chosen = [
        frequent_tokens(sequences, vocab_size=10, size=size).token_ids for size in range(1, 7)
    ]
    assert chosen == [(3,), (1, 3), (1, 3, 7), (0, 1, 3, 7), (0, 1, 3, 7, 9), (0, 1, 2, 3, 7, 9)]
    assert frequent_tokens(sequences, vocab_size=10, size=3).coverage == pytest.approx(7 / 9)
    always = frequent_tokens(sequences, vocab_size=10, size=3, always=(8, 9))
    assert always.token_ids == (3, 8, 9)
    assert always.coverage == pytest.approx(4 / 9)
    assert frequent_tokens([], vocab_size=4, size=2).token_ids == (0, 1)


def test_sizes_and_tokens_out_of_range_are_refused():
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"vocabulary of {size} tokens"):
            frequent_tokens([], vocab_size=10, size=size)
    with pytest.raises(ValueError, match="at least the 2"):
        frequent_tokens([], vocab_size=10, size=1, always=(3, 4))
    with pytest.raises(ValueError, match="another tokenizer"):
        frequent_tokens([(3, 10)], vocab_size=10, size=4)


# -- training -------------------------------------------------------------------------------------


def naive_cross_entropy(drafter, shared_weights, sequences, depth):
    """Chain by chain in float64, token by token of the vocabulary."""
    embedding_VD, lm_head_VD = (weight.detach().double() for weight in shared_weights)
    losses, acceptances = [], []
    for predicted, target in naive_chains(drafter, embedding_VD, sequences, depth):
        target_V = (lm_head_VD @ target).softmax(0)
        logits = {token: lm_head_VD[token] @ predicted for token in TOKENS}
        normalizer = torch.stack([logit.exp() for logit in logits.values()]).sum().log()
        losses.append(-sum(target_V[token] * (logits[token] - normalizer) for token in TOKENS))
        best = max(TOKENS, key=lambda token: logits[token].item())
        acceptances.append(float(target_V[best]))
    return torch.stack(losses).mean(), sum(acceptances) / len(acceptances)


@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE])
def test_loss_and_gradients_are_those_of_the_tokens_that_it_can_draft(
    drafter, shared_weights, max_chunk_logits
):
    sequences = random_sequences((7, 3), (3, 1), (10, 6))
    drafter.trim_vocabulary(TOKENS)
    exact = copy.deepcopy(drafter).double()
    sequences_64 = [dataclasses.replace(f, hidden_TD=f.hidden_TD.double()) for f in sequences]
    first, acceptance = naive_cross_entropy(exact, shared_weights, sequences_64, 1)
    second, _ = naive_cross_entropy(exact, shared_weights, sequences_64, 2)
    expected = (first + 0.8 * second) / 1.8
    expected.backward()
    packed = pack_sequences(sequences, max_pairs=100)
    result = eagle_loss(
        drafter,
        *shared_weights,
        packed,
        hidden_loss_weight=0.0,
        num_depths=2,
        max_chunk_logits=max_chunk_logits,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(result.cross_entropy) == pytest.approx(first.item(), rel=1e-5)
    assert float(result.top1_acceptance) == pytest.approx(acceptance, rel=1e-5)
    exact_gradients = dict(exact.named_parameters())
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(
            parameter.grad, exact_gradients[name].grad.float(), rtol=1e-4, atol=1e-5
        )
    agreements = agreement_by_depth(drafter, *shared_weights, packed, max_depth=2)
    assert agreements[0].top1_acceptance == pytest.approx(acceptance, rel=1e-5)
    assert agreements[1].cross_entropy == pytest.approx(second.item(), rel=1e-5)


def vars_of(result):
    return [getattr(result, field.name).detach() for field in dataclasses.fields(result)]


def test_a_vocabulary_of_all_tokens_is_the_targets(drafter, shared_weights):
    packed = pack_sequences(random_sequences((7, 3), (9, 2)), max_pairs=100)
    whole = eagle_loss(drafter, *shared_weights, packed, hidden_loss_weight=0.5, num_depths=2)
    drafter.trim_vocabulary(range(VOCAB_SIZE))
    listed = eagle_loss(drafter, *shared_weights, packed, hidden_loss_weight=0.5, num_depths=2)
    torch.testing.assert_close(vars_of(listed), vars_of(whole))


def test_a_run_is_resumed_with_its_vocabulary_alone():
    ours, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    check_same_vocabulary(None, None)
    check_same_vocabulary(ours, ours.clone())
    for pair in ((ours, other), (ours, None), (None, ours), (ours, torch.tensor([1]))):
        with pytest.raises(ValueError, match="resume with the drafter that the run began with"):
            check_same_vocabulary(*pair)


# -- files ----------------------------------------------------------------------------------------


def test_a_vocabulary_is_saved_and_loaded(drafter, tmp_path):
    drafter.trim_vocabulary(TOKENS)
    drafter.save_pretrained(tmp_path)
    loaded = EagleDrafter.from_pretrained(tmp_path)
    assert loaded.token_map_F.tolist() == list(TOKENS)
    assert json.loads((tmp_path / "config.json").read_text())["hot_vocab_size"] == len(TOKENS)
    assert torch.load(tmp_path / TOKEN_MAP_FILE, weights_only=True) == list(TOKENS)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors", TOKEN_MAP_FILE):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_vocabulary_that_is_lost_or_of_another_drafter_is_noticed(drafter, tmp_path):
    drafter.trim_vocabulary(TOKENS)
    drafter.save_pretrained(tmp_path)
    torch.save([1, 2], tmp_path / TOKEN_MAP_FILE)
    with pytest.raises(ValueError, match="has 2 tokens, but hot_vocab_size in its config"):
        EagleDrafter.from_pretrained(tmp_path)
    (tmp_path / TOKEN_MAP_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="copy the file too"):
        EagleDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("tokens", [(), (2, 1), (1, 1), (-1, 3), (3, VOCAB_SIZE)])
def test_what_is_no_vocabulary_is_refused(drafter, tokens):
    with pytest.raises(ValueError, match="has to be a list of different token ids, ascending"):
        drafter.trim_vocabulary(tokens)


# -- serving --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed_folder(folders, tmp_path_factory):
    drafter = EagleDrafter.from_pretrained(folders[1])
    drafter.trim_vocabulary(range(0, TARGET_VOCAB_SIZE, 3))
    folder = tmp_path_factory.mktemp("trimmed") / "drafter"
    drafter.save_pretrained(folder)
    return folder


@pytest.fixture
def trimmed_engine(folders, trimmed_folder, target_model):
    engine = TorchEngine(drafter_path=str(trimmed_folder), max_batch_size=6, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["4_1_5", "3_3_10"])
def test_trees_are_those_of_a_head_that_knows_no_other_token(
    trimmed_engine, folders, target_model, name, monkeypatch
):
    """Every other token's logit at minus infinity, in the drafter's whole vocabulary."""
    strategy, sampling = DraftStrategy.parse(name), SamplingParams(temperature=0.7)

    def paths(engine):
        generation = generation_of(engine, ["off"])
        with torch.inference_mode():
            generation._admit(deque(requests_of(make_prompts(4))))
            tree = generation._drafting.draft(generation._rows, strategy, sampling)
        return [paths_of(tree, row) for row in range(4)]

    ours = paths(trimmed_engine)
    whole = TorchEngine(drafter_path=str(folders[1]), max_batch_size=6, device="cpu")
    whole.start(str(folders[0]))
    whole.load_policy(target_model.named_parameters(), version=0)
    head = whole._started().drafting._head
    all_logits = head.logits

    def listed_logits(hidden):
        logits = all_logits(hidden)
        listed = torch.full_like(logits, -torch.inf)
        listed[..., ::3] = logits[..., ::3]
        return listed

    monkeypatch.setattr(head, "logits", listed_logits)
    assert ours == paths(whole)
    whole.close()
    tokens = {token for row in ours for path in row for token in path}
    assert len(tokens) > 3
    assert all(token % 3 == 0 for token in tokens)


def test_tokens_are_those_of_plain_decoding(trimmed_engine):
    responses = {}
    for name in ("off", "4_1_5", "3_3_10"):
        trimmed_engine.strategy_selector = FixedStrategy(name)
        rollouts = trimmed_engine.generate(make_prompts(5), GREEDY)
        responses[name] = [rollout.tokens for rollout in rollouts]
    assert responses["off"] == responses["4_1_5"] == responses["3_3_10"]


def test_more_children_than_tokens_are_refused(trimmed_engine):
    trimmed_engine.strategy_selector = FixedStrategy(f"2_{TARGET_VOCAB_SIZE // 2}_30")
    with pytest.raises(ValueError, match="larger than the vocabulary"):
        trimmed_engine.generate(make_prompts(1), GREEDY)


def test_the_head_follows_the_policy(trimmed_engine, target_model):
    """A publication after which the policy's LM head is another."""
    changed = {name: weight.clone() for name, weight in target_model.named_parameters()}
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"].flip(0)
    trimmed_engine.load_policy(changed.items(), version=1)
    loaded = trimmed_engine._started()
    hidden = torch.randn(2, target_model.config.hidden_size)
    with torch.inference_mode():
        expected = loaded.target.lm_head(hidden)[:, ::3]
        torch.testing.assert_close(loaded.drafting._head.logits(hidden), expected)
