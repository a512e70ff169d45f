"""The embedded engine's behaviour: batching, ends of responses, weights, statistics, errors."""

import dataclasses
import itertools
import shutil
import time

import pytest
import torch
from transformers import GPT2Config, GptOssConfig, GptOssForCausalLM

from fastrl.rollout.bandit import EpsilonGreedy, FixedStrategy, InTurns
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.rollout.torch_engine.served_linear import ServedLinear
from fastrl.types import FinishReason, Prompt, SamplingParams
from tests.rollout.tiny_models import EOS, VOCAB_SIZE, make_drafter, make_prompts, make_target
from tests.rollout.torch_engine.fakes import CyclingSelector

LONG = SamplingParams(max_tokens=30, ignore_eos=True)


def test_cost_follows_the_live_batch(engine):
    """Rows leave at once when they end; waiting requests take their places."""
    selector = CyclingSelector(["off"])
    engine.strategy_selector = selector
    rollouts = engine.generate(make_prompts(5), SamplingParams(max_tokens=30), num_samples=4)
    row_steps = sum(stats.batch_size for stats in selector.recorded)
    assert row_steps == sum(len(r.tokens) - 1 for r in rollouts)
    sizes = [stats.batch_size for stats in selector.recorded]
    assert max(sizes) == 6
    full = sizes[: len(sizes) - sizes[::-1].index(6)]
    assert set(full) == {6}  # never fewer while requests wait
    assert sizes == sorted(sizes, reverse=True)


def test_a_group_s_prompt_is_prefilled_once(engine):
    prompts = make_prompts(4)
    engine.generate(prompts, LONG, num_samples=5)
    assert engine.stats().num_prompt_tokens == sum(len(prompt.tokens) for prompt in prompts)


def test_rollouts_come_prompt_major_with_their_origin(engine, target_model):
    engine.load_policy(target_model.named_parameters(), version=12)
    rollouts = engine.generate(make_prompts(3), SamplingParams(max_tokens=9), num_samples=2)
    origins = [(r.prompt.prompt_id, r.sample_index) for r in rollouts]
    assert origins == [(p, s) for p in range(3) for s in range(2)]
    for rollout in rollouts:
        assert rollout.policy_version == 12
        assert len(rollout.logprobs) == len(rollout.tokens) == 1 + sum(rollout.accept_lengths)
        words = " ".join(f"w{token}" for token in rollout.tokens if token not in (0, EOS))
        assert rollout.text == words


@pytest.mark.parametrize("strategy", ["off", "4_4_16"])
def test_responses_end_as_the_sampling_parameters_say(engine, strategy):
    engine.strategy_selector = FixedStrategy(strategy)
    free = engine.generate(make_prompts(4), LONG, num_samples=3)
    assert all(len(r.tokens) == 30 for r in free)
    assert {r.finish_reason for r in free} == {FinishReason.LENGTH}

    def first(tokens, is_end):
        return next((n for n, token in enumerate(tokens, 1) if is_end(token)), 30)

    stop_word = free[0].tokens[3]
    cases = [
        (SamplingParams(max_tokens=30), lambda token: token == EOS),
        (SamplingParams(max_tokens=30, stop_token_ids=(7, 9)), lambda token: token in (EOS, 7, 9)),
        (SamplingParams(max_tokens=30, stop=(f"w{stop_word}",)), None),
    ]
    for sampling, is_end in cases:
        for rollout, whole in zip(
            engine.generate(make_prompts(4), sampling, num_samples=3), free, strict=True
        ):
            if is_end is None:

                def is_end_of_string(token):
                    return token == EOS or f"w{token}".startswith(f"w{stop_word}")

                expected = first(whole.tokens, is_end_of_string)
            else:
                expected = first(whole.tokens, is_end)
            assert rollout.tokens == whole.tokens[:expected]
            ended = expected < 30 or rollout.finish_reason == FinishReason.STOP
            assert (rollout.finish_reason == FinishReason.STOP) == ended


def test_a_stop_string_over_several_tokens_ends_at_its_last_token(engine):
    engine.strategy_selector = FixedStrategy("3_3_10")
    whole = engine.generate(make_prompts(1), LONG)[0]
    stop = " ".join(f"w{token}" for token in whole.tokens[2:5])
    sampling = dataclasses.replace(LONG, stop=(stop,))
    rollout = engine.generate(make_prompts(1), sampling)[0]
    assert rollout.tokens == whole.tokens[:5]
    assert rollout.finish_reason == FinishReason.STOP


@pytest.mark.parametrize("strategy", ["off", "6_2_20"])
def test_a_response_stops_at_the_model_s_context(engine, strategy):
    engine.strategy_selector = FixedStrategy(strategy)
    prompt = dataclasses.replace(make_prompts(1)[0], tokens=(2,) * 120)
    rollout = engine.generate([prompt], dataclasses.replace(LONG, max_tokens=100))[0]
    assert len(rollout.tokens) == 8
    assert rollout.finish_reason == FinishReason.LENGTH


def test_weights_are_shared_not_copied(engine, target_model):
    ours = dict(engine._started().target._model.named_parameters())
    for name, parameter in target_model.named_parameters():
        assert ours[name].data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad


def test_an_optimizer_step_shows_in_the_next_rollouts(folders, tmp_path):
    model = make_target(tmp_path, seed=3)
    engine = TorchEngine(device="cpu")
    engine.start(str(tmp_path))
    engine.load_policy(model.named_parameters(), version=0)
    before = engine.generate(make_prompts(2), LONG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.load_policy(model.named_parameters(), version=1)
    after = engine.generate(make_prompts(2), LONG)
    assert [r.tokens for r in before] != [r.tokens for r in after]
    fresh = TorchEngine(device="cpu")
    fresh.start(str(tmp_path))
    fresh.load_policy([(n, p.clone()) for n, p in model.named_parameters()], version=1)
    assert [r.tokens for r in fresh.generate(make_prompts(2), LONG)] == [r.tokens for r in after]


def test_the_published_drafter_is_a_copy(engine, target_model, tmp_path):
    drafter = make_drafter(tmp_path, target_model, seed=5)
    engine.load_drafter(drafter.named_weights(), version=3)
    serving = engine._started().drafter
    with torch.no_grad():
        published = serving.fc.weight.clone()
        drafter.fc.weight.add_(1.0)
    assert torch.equal(serving.fc.weight, published)
    assert engine.drafter_version == 3


def test_statistics_add_up(engine):
    selector = CyclingSelector(["3_3_10", "off"])
    engine.strategy_selector = selector
    rollouts = engine.generate(make_prompts(4), LONG, num_samples=2)
    stats = engine.stats()
    assert stats.num_rollouts == 8
    assert stats.num_tokens == sum(len(r.tokens) for r in rollouts)
    assert stats.num_steps == len(selector.recorded)
    speculative = [s for s in selector.recorded if not s.strategy.is_off]
    assert stats.steps_by_strategy == {
        "3_3_10": len(speculative),
        "off": len(selector.recorded) - len(speculative),
    }
    assert stats.row_steps == sum(s.batch_size for s in speculative)
    assert stats.accepted_tokens == sum(s.num_tokens for s in speculative)
    assert stats.accept_length == stats.accepted_tokens / stats.row_steps
    assert stats.offered_by_depth[0] == stats.row_steps
    for depth in range(2):
        assert stats.offered_by_depth[depth + 1] == stats.accepted_by_depth[depth]
    for depth in range(3):
        by_rank = [sum(s.accepted_by_rank[depth][rank] for s in speculative) for rank in range(3)]
        assert sum(by_rank) == stats.accepted_by_depth[depth]
        offered = [sum(s.offered_by_rank[depth][rank] for s in speculative) for rank in range(3)]
        assert stats.offered_by_depth[depth] >= offered[0] >= offered[1] >= offered[2]
        assert all(a <= o for a, o in zip(by_rank, offered, strict=True))
    assert sum(r.num_verify_steps for r in rollouts) == stats.row_steps
    assert 0 < stats.draft_seconds < stats.seconds


def test_what_the_learned_drafter_had_accepted_and_what_n_grams_had_is_counted_apart(engine):
    selector = CyclingSelector(["3_3_10", "ngram_5_1_6", "off"])
    engine.strategy_selector = selector
    engine.generate(make_prompts(2), dataclasses.replace(LONG, temperature=0.0), num_samples=4)
    stats = engine.stats()
    for drafter, depth, offered_by_depth, accepted_by_depth in (
        ("learned", 3, stats.offered_by_depth, stats.accepted_by_depth),
        ("ngram", 5, stats.ngram_offered_by_depth, stats.ngram_accepted_by_depth),
    ):
        steps = [s for s in selector.recorded if s.strategy.depth and s.strategy.drafter == drafter]
        accepted = [sum(sum(s.accepted_by_rank[d]) for s in steps) for d in range(depth)]
        assert sum(accepted) > 0
        assert accepted_by_depth == tuple(accepted)
        assert offered_by_depth == (sum(s.batch_size for s in steps), *accepted[:-1])


def test_sleeping_frees_the_caches_and_changes_nothing(engine):
    engine.strategy_selector = FixedStrategy("3_3_10")
    before = engine.generate(make_prompts(2), LONG)
    assert engine._started().cache.num_bytes > 0
    engine.sleep()
    assert engine._started().cache.num_bytes == 0
    engine.wake()
    assert [r.tokens for r in engine.generate(make_prompts(2), LONG)] == [r.tokens for r in before]


def test_spans_tell_what_followed_what(engine):
    """Eight prompts in six rows: prefills come between; runs of a strategy are one span."""
    engine.strategy_selector = InTurns(["off", "off", "3_3_10"])
    before = time.perf_counter()
    engine.generate(make_prompts(8), SamplingParams(max_tokens=20, ignore_eos=True))
    after, stats = time.perf_counter(), engine.stats()
    names = [span.name for span in stats.spans]
    assert names[:4] == ["prefill", "off", "3_3_10", "off"]
    assert names.count("prefill") > 1
    assert all(first != second for first, second in itertools.pairwise(names))
    for first, second in itertools.pairwise(stats.spans):
        assert first.end_s == pytest.approx(second.start_s, abs=1e-6)
    assert before <= stats.spans[0].start_s
    assert stats.spans[-1].end_s <= after + 1e-6
    assert sum(span.seconds for span in stats.spans) > 0.5 * stats.seconds
    prefill_s = sum(span.seconds for span in stats.spans if span.name == "prefill")
    assert prefill_s > 0.5 * stats.prefill_seconds


def test_generation_can_go_on_after_an_interrupted_call(engine):
    expected = engine.generate(make_prompts(2), LONG)

    class Interrupting(CyclingSelector):
        def record(self, stats):
            super().record(stats)
            if len(self.recorded) == 5:
                raise KeyboardInterrupt

    engine.strategy_selector = Interrupting(["3_3_10"])
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_prompts(3, seed=1), LONG, num_samples=2)
    engine.strategy_selector = FixedStrategy("off")
    assert [r.tokens for r in engine.generate(make_prompts(2), LONG)] == [
        r.tokens for r in expected
    ]


# -- bad input ------------------------------------------------------------------------------------


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config.json; expected"):
        TorchEngine(device="cpu").start(str(tmp_path / "nowhere"))


def test_a_drafter_for_another_target_is_refused(tmp_path):
    make_target(tmp_path / "target")
    other = make_target(tmp_path / "other", hidden_size=64)
    make_drafter(tmp_path / "drafter", other)
    engine = TorchEngine(drafter_path=str(tmp_path / "drafter"), device="cpu")
    with pytest.raises(ValueError, match="hidden_size 64, but the policy's is 32"):
        engine.start(str(tmp_path / "target"))


def test_generating_too_early_says_what_is_missing(folders):
    engine = TorchEngine(device="cpu")
    with pytest.raises(ValueError, match="call start"):
        engine.generate(make_prompts(1), LONG)
    engine.start(str(folders[0]))
    with pytest.raises(ValueError, match="call load_policy"):
        engine.generate(make_prompts(1), LONG)


def test_strategies_that_cannot_run_are_refused_before_the_first_rollout(folders):
    """Also an arm that a bandit would try late, when few rows are left."""
    with pytest.raises(ValueError, match=r"4_2_8 needs a drafter, but engine\.drafter_path"):
        TorchEngine(strategy="4_2_8", device="cpu").start(str(folders[0]))
    engine = TorchEngine(drafter_path=str(folders[1]), device="cpu")
    engine.strategy_selector = EpsilonGreedy(["4_2_8", f"2_{VOCAB_SIZE + 1}_9"])
    with pytest.raises(ValueError, match=r"topk 41 is larger than the vocabulary"):
        engine.start(str(folders[0]))


def test_more_children_than_tokens_are_refused(engine):
    engine.strategy_selector = FixedStrategy(f"2_{VOCAB_SIZE + 1}_9")
    with pytest.raises(ValueError, match=r"topk 41 is larger than the vocabulary"):
        engine.generate(make_prompts(1), LONG)


@pytest.mark.parametrize("length", [0, 128, 500])
def test_prompts_without_room_for_a_response_are_refused(engine, length):
    prompt = Prompt(prompt_id=3, tokens=(2,) * length, text="", answer="")
    with pytest.raises(ValueError, match=f"prompt 3 has {length} tokens"):
        engine.generate([prompt], LONG)


def test_missing_unknown_and_misshapen_weights_are_named(engine, target_model):
    weights = dict(target_model.named_parameters())
    renamed = dict(weights)
    renamed["model.norm.wait"] = renamed.pop("model.norm.weight")
    with pytest.raises(
        ValueError, match=r"missing \['model.norm.weight'\], unknown \['model.norm.w"
    ):
        engine.load_policy(renamed.items(), version=1)
    cut = weights | {"model.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"model.norm.weight \(3,\) instead of \(32,\)"):
        engine.load_policy(cut.items(), version=1)


@pytest.mark.parametrize("strategy", ["off", "3_3_10"])
def test_logits_that_are_no_numbers_stop_generation(tmp_path, strategy):
    model = make_target(tmp_path / "target")
    make_drafter(tmp_path / "drafter", model)
    engine = TorchEngine(str(tmp_path / "drafter"), strategy, device="cpu")
    engine.start(str(tmp_path / "target"))
    engine.load_policy(model.named_parameters(), version=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="prompt 0, sample 0, response token 0: the pol"):
        engine.generate(make_prompts(1), LONG)


def test_architectures_that_would_not_be_exact_are_refused(tmp_path):
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "sinks")
    make_target(tmp_path / "llama")
    for file in (tmp_path / "llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "sinks")
    engine = TorchEngine(device="cpu")
    engine.start(str(tmp_path / "sinks"))
    engine.load_policy(model.named_parameters(), version=0)
    with pytest.raises(ValueError, match=r"asks for attention with \['s_aux'\]"):
        engine.generate(make_prompts(1), LONG)
    GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary embedding"):
        TorchEngine(device="cpu").start(str(tmp_path / "gpt2"))


def test_length_dependent_rotary_embeddings_are_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    make_target(tmp_path, rope_parameters=rope)
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        TorchEngine(device="cpu").start(str(tmp_path))


def test_bfloat16_serves_each_publication_and_shows_what_it_serves(folders, target_model):
    """On a CPU linear layers have a layout of their own, which a publication has to reach."""
    engine = TorchEngine(max_batch_size=2, dtype="bfloat16", device="cpu")
    engine.start(str(folders[0]))
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    weights = {name: tensor.detach().clone() for name, tensor in target_model.named_parameters()}
    for version in range(2):
        engine.load_policy(weights.items(), version=version)
        assert engine.compare_policy(weights.items()) == []
        head = weights["model.embed_tokens.weight"].bfloat16()
        logits = engine._started().target.logits(hidden)
        torch.testing.assert_close(logits, hidden @ head.t(), rtol=2**-7, atol=2**-7)
        for tensor in weights.values():
            tensor.mul_(-1.5)
    assert engine.compare_policy(weights.items()) != []
    engine.close()


def test_a_tied_head_that_is_not_the_published_embedding_is_found(folders, target_model):
    """On a CPU in bfloat16 the head is a copy of its own, under no published name."""
    engine = TorchEngine(max_batch_size=2, dtype="bfloat16", device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    target = engine._started().target
    served, embedding = target.lm_head.forward, target.embedding.weight
    served._weight = ServedLinear(embedding + torch.eye(*embedding.shape).bfloat16())._weight
    (difference,) = engine.compare_policy(target_model.named_parameters())
    assert difference.name == "lm_head.weight"
    assert difference.num_different == min(embedding.shape)
    engine.load_policy(target_model.named_parameters(), version=1)
    assert engine.compare_policy(target_model.named_parameters()) == []
    engine.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied; a head and biases of its own
def test_a_bfloat16_trainer_s_step_shows_in_nothing_before_its_publication(tmp_path, family):
    """Layers that are laid out would stay behind an embedding that is shared."""
    model = make_target(tmp_path, family).to(torch.bfloat16)
    engine = TorchEngine(max_batch_size=2, dtype="bfloat16", device="cpu")
    engine.start(str(tmp_path))

    def served():
        (one,) = engine.generate(make_prompts(1), LONG, return_hidden_states=True)
        return one.tokens, one.hidden_states

    engine.load_policy(model.named_parameters(), version=0)
    tokens, states = served()
    names = dict(model.named_parameters()).keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    assert served()[0] == tokens
    assert torch.equal(served()[1], states)
    assert {one.name for one in engine.compare_policy(model.named_parameters())} >= names
    engine.load_policy(model.named_parameters(), version=1)
    assert engine.compare_policy(model.named_parameters()) == []
    fresh = TorchEngine(max_batch_size=2, dtype="bfloat16", device="cpu")
    fresh.start(str(tmp_path))
    fresh.load_policy([(name, one.clone()) for name, one in model.named_parameters()], version=1)
    (expected,) = fresh.generate(make_prompts(1), LONG, return_hidden_states=True)
    assert served()[0] == expected.tokens
    assert torch.equal(served()[1], expected.hidden_states)
    assert not torch.equal(states[:1], expected.hidden_states[:1])


def test_a_layer_that_is_laid_out_keeps_no_second_weight(folders, target_model):
    engine = TorchEngine(max_batch_size=2, dtype="bfloat16", device="cpu")
    engine.start(str(folders[0]))
    for version in range(2):
        engine.load_policy(target_model.named_parameters(), version=version)
        own = dict(engine._started().target._model.named_parameters())
        kept = {name for name, one in own.items() if not one.is_meta}
        assert all("norm" in name or "embed" in name for name in kept)
        assert "model.embed_tokens.weight" in kept
