"""What every rollout engine keeps to; each engine joins by an entry in the fixture."""

import copy

import pytest
import torch

from fastrl.rollout.canary import canary_gap
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.engine import RolloutEngine, WeightEvents
from fastrl.rollout.sampling import log_distribution
from fastrl.types import FinishReason, SamplingParams
from tests.rollout.tiny_models import EOS, make_prompts, make_target

SAMPLING = SamplingParams(max_tokens=16)


@pytest.fixture(params=["engine", pytest.param("sglang_engine", marks=pytest.mark.sglang)])
def any_engine(request) -> RolloutEngine:
    """A started engine with a drafter and weights of version 0."""
    return request.getfixturevalue(request.param)


def test_it_is_a_rollout_engine(any_engine):
    assert isinstance(any_engine, RolloutEngine)


def test_rollouts_are_a_function_of_seed_step_prompt_and_sample(any_engine):
    def tokens(**identity):
        rollouts = any_engine.generate(make_prompts(3), SAMPLING, num_samples=2, **identity)
        return [rollout.tokens for rollout in rollouts]

    assert tokens(seed=1, rl_step=4) == tokens(seed=1, rl_step=4)
    assert tokens(seed=1, rl_step=4) != tokens(seed=2, rl_step=4)
    assert tokens(seed=1, rl_step=4) != tokens(seed=1, rl_step=5)
    alone = any_engine.generate(make_prompts(3)[2:], SAMPLING, num_samples=2, seed=1, rl_step=4)
    assert [rollout.tokens for rollout in alone] == tokens(seed=1, rl_step=4)[4:]


def test_rollouts_carry_version_reason_and_log_probabilities(any_engine, target_model):
    any_engine.load_policy(target_model.named_parameters(), version=5)
    assert any_engine.policy_version == 5
    for rollout in any_engine.generate(make_prompts(4), SAMPLING):
        assert rollout.policy_version == 5
        assert len(rollout.logprobs) == len(rollout.tokens) <= SAMPLING.max_tokens
        assert all(logprob <= 0 for logprob in rollout.logprobs)
        is_stopped = rollout.tokens[-1] == EOS
        assert rollout.finish_reason == (FinishReason.STOP if is_stopped else FinishReason.LENGTH)


@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, SamplingParams(max_tokens=16, temperature=0.7, top_k=5)],
    ids=["plain", "filtered"],
)
def test_log_probabilities_are_those_of_a_plain_forward(any_engine, target_model, sampling):
    for rollout in any_engine.generate(make_prompts(4), sampling, num_samples=2):
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)])
        with torch.no_grad():
            logits = target_model(tokens[:, :-1]).logits[0, len(rollout.prompt.tokens) - 1 :]
        expected = log_distribution(logits, sampling).gather(
            1, tokens[0, len(rollout.prompt.tokens) :, None]
        )
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs), expected.squeeze(1), atol=2e-5, rtol=0
        )


GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def test_greedy_tokens_are_certain_and_the_most_likely(any_engine, target_model):
    for rollout in any_engine.generate(make_prompts(4), GREEDY):
        assert len(rollout.tokens) == GREEDY.max_tokens
        assert rollout.logprobs == (0.0,) * GREEDY.max_tokens
        tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)])
        with torch.no_grad():
            best = target_model(tokens[:, :-1]).logits[0].argmax(-1)
        assert rollout.tokens == tuple(best[len(rollout.prompt.tokens) - 1 :].tolist())


def test_stop_tokens_end_a_response_and_are_kept(any_engine):
    (whole,) = any_engine.generate(make_prompts(1), GREEDY)
    stop = whole.tokens[5]
    sampling = SamplingParams(max_tokens=16, temperature=0, stop_token_ids=(stop,))
    (cut,) = any_engine.generate(make_prompts(1), sampling)
    end = min(whole.tokens.index(one) for one in {stop, EOS} & set(whole.tokens))
    assert cut.tokens == whole.tokens[: end + 1]
    assert cut.finish_reason == FinishReason.STOP


def test_stop_strings_end_a_response_and_are_kept(any_engine):
    (whole,) = any_engine.generate(make_prompts(1), GREEDY)
    stop = f"w{whole.tokens[4]} w{whole.tokens[5]}"
    sampling = SamplingParams(max_tokens=16, temperature=0, stop=(stop,), ignore_eos=True)
    (cut,) = any_engine.generate(make_prompts(1), sampling)
    assert cut.text.endswith(stop)
    assert cut.text == whole.text[: whole.text.index(stop) + len(stop)]
    assert cut.finish_reason == FinishReason.STOP


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_misnamed_weights_are_refused_by_name(any_engine, target_model, name):
    weights = dict(target_model.named_parameters())
    weights[f"{name}_misspelt"] = weights.pop(name)
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unknown \['{name}_misspelt'\]"):
        any_engine.load_policy(weights.items(), version=1)


def test_weights_are_compared_under_their_published_names(any_engine, target_model):
    published = {name: tensor.clone() for name, tensor in target_model.named_parameters()}
    assert any_engine.compare_policy(published.items()) == []
    published["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    published["model.norm.weight"].zero_()
    found = any_engine.compare_policy(published.items())
    assert sorted(map(str, found)) == [
        "model.layers.1.mlp.up_proj.weight: 1 of 2048 numbers differ",
        "model.norm.weight: 32 of 32 numbers differ",
    ]
    assert any_engine.compare_policy(target_model.named_parameters()) == []  # nothing was changed


def test_the_drafters_weights_are_compared_under_their_published_names(any_engine, target_model):
    published = dict(EagleDrafter.for_target(target_model.config, seed=3).named_weights())
    any_engine.load_drafter(published.items(), version=1)
    assert any_engine.compare_drafter(published.items()) == []
    other = published | {"layers.0.self_attn.k_proj.weight": torch.ones(16, 32)}
    (found,) = any_engine.compare_drafter(other.items())
    assert str(found) == "layers.0.self_attn.k_proj.weight: 512 of 512 numbers differ"
    with pytest.raises(ValueError, match=r"missing \['fc.bias'\]"):
        any_engine.compare_drafter(one for one in published.items() if one[0] != "fc.bias")


def test_publications_are_counted(any_engine, target_model):
    before = any_engine.weight_events
    drafter = EagleDrafter.for_target(target_model.config, seed=3)
    any_engine.load_drafter(drafter.named_weights(), version=1)
    any_engine.load_policy(target_model.named_parameters(), version=1)
    any_engine.load_policy(target_model.named_parameters(), version=1)
    assert any_engine.weight_events == WeightEvents(
        policy_loads=before.policy_loads + 2,
        drafter_loads=before.drafter_loads + 1,
        wakes=before.wakes,
    )


def test_a_probe_answers_and_leaves_no_trace(any_engine):
    any_engine.generate(make_prompts(2), SAMPLING, num_samples=3)
    stats, state = any_engine.stats(), copy.deepcopy(any_engine.state_dict())
    rollouts = any_engine.probe(make_prompts(3, seed=8), GREEDY, seed=4)
    assert [len(rollout.tokens) for rollout in rollouts] == [GREEDY.max_tokens] * 3
    assert any_engine.stats() is stats
    assert any_engine.state_dict() == state


def test_canaries_agree_with_the_policy_that_is_served_and_no_other(
    any_engine, target_model, tmp_path
):
    assert canary_gap(any_engine, target_model, 4) < 1e-4
    assert canary_gap(any_engine, make_target(tmp_path, seed=1), 4) > 0.5


def test_stats_are_of_the_last_call(any_engine):
    rollouts = any_engine.generate(make_prompts(2), SAMPLING, num_samples=3)
    stats = any_engine.stats()
    assert stats.num_rollouts == 6
    assert stats.num_tokens == sum(len(rollout.tokens) for rollout in rollouts)
    assert stats.seconds > 0


def test_after_a_resume_the_weights_must_be_pushed_again(any_engine):
    any_engine.load_state_dict(any_engine.state_dict())
    assert any_engine.policy_version == -1


def test_closing_twice_is_safe_and_ends_generation(any_engine):
    any_engine.close()
    any_engine.close()
    with pytest.raises(ValueError, match="not started"):
        any_engine.generate(make_prompts(1), SAMPLING)
