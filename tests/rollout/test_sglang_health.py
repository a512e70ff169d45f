"""Known failures of others on real SGLang: each is silent without the check, and named by it."""

import dataclasses
import json
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch

from fastrl.rollout import sglang_options, sglang_served_weights
from fastrl.rollout.sglang_process import EngineError
from fastrl.rollout.sglang_weights import _handles
from fastrl.rollout.weight_check import WeightCheck
from fastrl.rollout.weight_differences import WeightError
from fastrl.types import SamplingParams
from tests.rollout.test_sglang_engine import echoing_drafter, random_drafter
from tests.rollout.tiny_models import make_eagle3_drafter, make_prompts, make_target

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture
def good_drafter(target_model) -> dict[str, torch.Tensor]:
    """Often right."""
    return echoing_drafter(target_model)


@pytest.fixture
def served(sglang_engine, good_drafter):
    """An engine whose drafter is often right, with the acceptance that this brings."""
    sglang_engine.load_drafter(good_drafter.items(), version=1)
    assert accept_length(sglang_engine) > 1.1
    return sglang_engine


def accept_length(engine) -> float:
    engine.generate(make_prompts(6), GREEDY)
    return engine.stats().accept_length


def overwrite(engine, role, weights) -> None:
    """Change served weights behind the publisher's back; nothing is checked. Where ranks share the
    engine, all do this."""
    process = engine.process
    process.call("begin_update", 60, role=role)
    process.send_bucket("update", role, lambda: [_handles(list(weights.items()))], 60)
    process.call("end_update", 60)


@contextmanager
def lost_messages(engine, is_lost):
    """SGLang never gets the buckets of which `is_lost(number)` is true."""
    process, numbers = engine.process, iter(range(10**6))
    call = process.call

    def lossy_call(request, timeout_s, **arguments):
        if request == "update" and is_lost(next(numbers)):
            return None
        return call(request, timeout_s, **arguments)

    process.call = lossy_call
    try:
        yield
    finally:
        del process.call


def zeroed(weights) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


def check(engine, target_model, drafter, **settings) -> str | None:
    """All there is, as after a start; what is wrong with the drafter."""
    settings = {"every_n_publications": 1, "num_canaries": 4, "canary_tolerance": 1e-3} | settings
    weight_check = WeightCheck(**settings)
    failure = weight_check.drafter_failure(engine, lambda: drafter.items())
    weight_check.check_policy(engine, target_model, target_model.named_parameters)
    return failure


def test_what_is_served_as_published_passes_and_stays(served, target_model, good_drafter):
    before = served.weight_checksums()
    assert check(served, target_model, good_drafter) is None
    assert served.weight_checksums() == before


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_family_is_compared_under_its_own_names(start_sglang, tmp_path, family):
    model = make_target(tmp_path, family)
    engine = start_sglang(strategy="off", model_path=str(tmp_path))
    engine.load_policy(model.named_parameters(), version=0)
    assert engine.compare_policy(model.named_parameters()) == []
    other = {name: tensor + 1 for name, tensor in model.named_parameters()}
    found = {one.name for one in engine.compare_policy(other.items())}
    assert found == {name for name, _ in model.named_parameters()}
    engine.close()


def test_a_memory_release_that_leaves_the_drafter_zeroed(served, target_model, good_drafter):
    before = accept_length(served)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # but there is no word of it
        overwrite(served, "draft", zeroed(good_drafter))
        assert accept_length(served) < before - 0.1
    failure = check(served, target_model, good_drafter)
    assert failure is not None
    assert failure.startswith("the engine does not serve drafter version 1 as published")
    assert "fc.weight: all zero" in failure


def test_a_memory_release_that_leaves_the_drafter_stale(served, target_model, good_drafter):
    newer = random_drafter(target_model, seed=4)
    served.load_drafter(newer.items(), version=2)
    overwrite(served, "draft", good_drafter)
    assert served.drafter_version == 2
    failure = check(served, target_model, newer)
    assert failure is not None
    assert "layers.0.mlp.up_proj.weight: all zero" in failure
    assert "fc.weight: 2048 of 2048 numbers differ" in failure


def test_a_synchronization_that_does_not_update_the_drafter(served, target_model):
    newer = random_drafter(target_model, seed=5)
    with lost_messages(served, lambda number: True):
        served.load_drafter(newer.items(), version=2)
    assert served.drafter_version == 2
    assert accept_length(served) > 1.1  # the old one drafts on
    failure = check(served, target_model, newer)
    assert failure is not None
    assert "fc.weight: " in failure


def test_a_drafter_published_to_the_policy(served, target_model):
    newer = random_drafter(target_model, seed=6)
    publisher = served._running.weights.drafter
    publisher._role = "target"
    try:
        served.load_drafter(newer.items(), version=2)  # SGLang answers: Success
    finally:
        publisher._role = "draft"
    failure = check(served, target_model, newer)
    assert failure is not None
    assert "layers.0.mlp.down_proj.weight" in failure


def test_a_bucket_of_the_policy_that_is_lost(served, target_model, good_drafter, tmp_path):
    other = make_target(tmp_path, seed=1)
    publisher = served._running.weights.policy
    bucket_bytes, publisher._bucket_bytes = publisher._bucket_bytes, 20_000
    try:
        with lost_messages(served, lambda number: number == 1):
            served.load_policy(other.named_parameters(), version=1)
    finally:
        publisher._bucket_bytes = bucket_bytes
    assert served.generate(make_prompts(2), GREEDY)
    with pytest.raises(WeightError, match=r"policy version 1 as published: model\.layers\.0\.\S+ "):
        check(served, other, good_drafter)


def test_a_policy_weight_zeroed_behind_the_publisher(served, target_model, good_drafter):
    name = "model.layers.1.self_attn.k_proj.weight"  # a part of a fused matrix
    overwrite(
        served, "target", {name: torch.zeros_like(dict(target_model.named_parameters())[name])}
    )
    assert served.generate(make_prompts(2), GREEDY)
    with pytest.raises(WeightError, match=rf"as published: {name}: all zero\. Its rollouts"):
        check(served, target_model, good_drafter)


@pytest.mark.parametrize("tolerance", [1e-3, 0.1])  # the second is WeightHealth's default
def test_canaries_tell_wrong_weights_whatever_their_names(
    served, target_model, tmp_path, tolerance
):
    """The comparison is not due: only what the engine computes can tell."""
    weight_check = WeightCheck(every_n_publications=100, num_canaries=4, canary_tolerance=tolerance)
    tensors = target_model.named_parameters
    gap = weight_check.check_policy(served, target_model, tensors)
    assert gap is not None
    assert gap < 1e-4
    assert weight_check.check_policy(served, target_model, tensors) is None  # nothing was touched
    served.load_policy(make_target(tmp_path, seed=1).named_parameters(), version=1)
    with pytest.raises(WeightError, match="canary tokens differ by"):
        weight_check.check_policy(served, target_model, tensors)


def test_a_drafter_that_is_never_accepted_is_named(served, target_model, good_drafter):
    bad = zeroed(good_drafter)
    bad["fc.bias"] += torch.randn(bad["fc.bias"].shape, generator=torch.Generator().manual_seed(0))
    served.load_drafter(bad.items(), version=7)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = make_prompts(10)
    health = served._drafter_watch.health
    health.min_acceptance = 0.5  # a tiny vocabulary is guessed too often for 0.01
    try:
        with pytest.warns(UserWarning, match="drafter version 7: .* rows accepted its first"):
            served.generate(prompts, sampling, num_samples=4)
        assert served.stats().drafter_failures
        served.generate(prompts[:1], sampling)
        assert served.stats().drafter_failures == ()  # told once
    finally:
        health.min_acceptance = 0.01


def test_without_its_drafter_the_engine_goes_on_until_the_next(
    start_sglang, target_model, good_drafter
):
    engine = start_sglang(strategy="3_4_8")
    engine.load_policy(target_model.named_parameters(), version=0)
    expected = [rollout.tokens for rollout in engine.generate(make_prompts(3), GREEDY)]
    with pytest.warns(UserWarning, match="drafter: stale"):
        engine.reject_drafter("stale")
    assert engine.policy_version == -1
    engine.load_policy(target_model.named_parameters(), version=0)
    assert [rollout.tokens for rollout in engine.generate(make_prompts(3), GREEDY)] == expected
    assert engine.stats().row_steps == 0
    assert engine.stats().drafter_failures == (f"drafter of {engine.drafter_path}: stale",)
    engine.load_drafter(good_drafter.items(), version=1)
    engine.load_policy(target_model.named_parameters(), version=0)
    assert [rollout.tokens for rollout in engine.generate(make_prompts(3), GREEDY)] == expected
    assert engine.stats().accept_length > 1.1
    engine.close()


# -- memory that was given back -------------------------------------------------------------------


@pytest.mark.parametrize("shares_rotary_cache", [True, False])
def test_buffers_that_come_back_as_garbage(
    start_sglang, folders, target_model, good_drafter, tmp_path, monkeypatch, shares_rotary_cache
):
    """SGLang restores the policy's alone. (On a CPU no memory is given back, but zeroed.)"""
    shutil.copytree(folders[1], tmp_path / "drafter")
    if not shares_rotary_cache:
        config_file = tmp_path / "drafter" / "config.json"
        config = json.loads(config_file.read_text())
        config["max_position_embeddings"] *= 2
        config_file.write_text(json.dumps(config))
    monkeypatch.setenv("FASTRL_TEST_LOSE_MEMORY", "1")
    engine = start_sglang(strategy="3_4_8", drafter_path=str(tmp_path / "drafter"))

    def publish() -> None:
        engine.load_policy(target_model.named_parameters(), version=0)
        engine.load_drafter(good_drafter.items(), version=0)

    publish()
    before = accept_length(engine)
    assert check(engine, target_model, good_drafter) is None
    engine._options = dataclasses.replace(engine._options, memory_saver=True)
    engine.sleep()
    with pytest.raises(ValueError, match=r"load_policy: the engine sleeps.*wake\(\)"):
        engine.load_policy(target_model.named_parameters(), version=0)
    with pytest.raises(ValueError, match=r"load_drafter: the engine sleeps.*wake\(\)"):
        engine.load_drafter(good_drafter.items(), version=0)
    engine.wake()
    publish()
    failure = check(engine, target_model, good_drafter)  # of the policy's nothing is wrong
    if shares_rotary_cache:
        assert failure is None
        assert accept_length(engine) == before
    else:
        assert failure is not None
        assert failure.endswith(
            "as published: buffer model.layers.0.self_attn.rotary_emb.cos_sin_cache: all zero"
        )
    engine.close()


# -- a drafter of another kind --------------------------------------------------------------------


@contextmanager
def unchecked(monkeypatch, algorithm: str, drafter: str):
    """Start SGLang with speculation as it is told, past the checks."""
    with monkeypatch.context() as patch:
        arguments = {
            "speculative_algorithm": algorithm,
            "speculative_draft_model_path": drafter,
            "speculative_num_steps": 3,
            "speculative_eagle_topk": 4,
            "speculative_num_draft_tokens": 8,
        }
        patch.setattr(sglang_options, "speculation_arguments", lambda *_: arguments)
        patch.setattr(sglang_served_weights, "check_every_weight_is_reached", lambda *_: None)
        yield


def test_an_eagle3_drafter_under_the_eagle_flag(start_sglang, target_model, tmp_path, monkeypatch):
    """SGLang runs it without a word, and accepts what chance brings; we never start it."""
    make_eagle3_drafter(tmp_path / "eagle3", target_model)
    with unchecked(monkeypatch, "EAGLE", str(tmp_path / "eagle3")):
        engine = start_sglang(strategy="off")
    engine.load_policy(target_model.named_parameters(), version=0)
    rollouts = engine.generate(make_prompts(6), GREEDY)
    num_verified = sum(rollout.num_verify_steps for rollout in rollouts)
    assert sum(len(rollout.tokens) - 1 for rollout in rollouts) / num_verified < 1.3
    engine.close()
    # Ours goes by the checkpoint (test_sglang_eagle3.py); this one leaves open what it reads.
    with pytest.raises(ValueError, match="which layers of the target it reads"):
        start_sglang(strategy="3_4_8", drafter_path=str(tmp_path / "eagle3"))


def test_an_eagle_drafter_under_the_eagle3_flag(start_sglang, folders, monkeypatch):
    """SGLang dies of it, far from the reason; our options do not let it be asked for."""
    with (
        unchecked(monkeypatch, "EAGLE3", str(folders[1])),
        pytest.raises(EngineError, match="hot_token_id"),
    ):
        start_sglang(strategy="off")
    for strategy in ("off", "3_4_8"):
        with pytest.raises(ValueError, match=r"must not hold \['speculative_algorithm'\]"):
            start_sglang(strategy=strategy, server_args={"speculative_algorithm": "EAGLE3"})


# -- the cache's size -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_embedding_of_the_drafters_own_when_the_cache_is_sized(
    start_sglang, target_model, monkeypatch, tmp_path, is_shared
):
    """Stock SGLang holds the drafter's while it measures what is left for the cache."""
    monkeypatch.setenv("SGLANG_PLUGINS", "fastrl_sglang_cpu")
    monkeypatch.setenv("FASTRL_TEST_STOCK", "1")
    monkeypatch.setenv("FASTRL_TEST_EMBEDDINGS", str(tmp_path / "own.json"))
    if is_shared:
        monkeypatch.setenv("FASTRL_TEST_SHARED", "1")
    engine = start_sglang(strategy="3_4_8")
    own = json.loads((tmp_path / "own.json").read_text())
    padded_vocab_size, size = 64, target_model.config.hidden_size
    if is_shared:
        assert own == {}
    else:
        assert own == dict.fromkeys(
            ("model.embed_tokens.weight", "lm_head.weight"), padded_vocab_size * size * 4
        )
    engine.load_policy(target_model.named_parameters(), version=0)
    (checksums,) = engine.weight_checksums()
    embedding = checksums["model.embed_tokens.weight"]
    assert checksums["draft.model.embed_tokens.weight"] == embedding
    assert engine.generate(make_prompts(2), GREEDY)
    engine.close()
