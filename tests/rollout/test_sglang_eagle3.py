"""EAGLE-3 drafters on real SGLang: stock, and while strategies change."""

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.tiny_models import VOCAB_SIZE, make_prompts
from tests.rollout.turns import check_turns_accept_the_same

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = make_prompts(6)


def often_right(target_model, seed=0) -> Eagle3Drafter:
    """Its features are the input of the last layer, its head the target's: some of its drafts are
    the target's next tokens."""
    size = target_model.config.hidden_size
    drafter = Eagle3Drafter.for_target(
        target_model.config, seed=seed, token_ids=range(1, VOCAB_SIZE)
    )
    with torch.no_grad():
        drafter.fc.weight.zero_()
        drafter.fc.weight[:, -size:] = torch.eye(size)
        for name, weight in drafter.midlayer.named_parameters():
            if "norm" not in name:
                weight.mul_(0.3)
        drafter.lm_head.weight.copy_(target_model.lm_head.weight[1:])
    return drafter


@pytest.fixture(scope="module")
def drafter_folder(target_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle3") / "drafter"
    often_right(target_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def embedded(folders, drafter_folder, target_model):
    engine = TorchEngine(drafter_path=drafter_folder, max_batch_size=6, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


def test_stock_sglang_drafts_what_the_embedded_engine_drafts(
    start_sglang, drafter_folder, embedded, target_model
):
    served = start_sglang(strategy="3_1_4", drafter_path=drafter_folder)
    embedded.strategy_selector = FixedStrategy("3_1_4")
    served.load_policy(target_model.named_parameters(), version=0)
    accepted = []
    for version, seed in enumerate((0, 5)):
        weights = dict(often_right(target_model, seed=seed).named_weights())
        for engine in (served, embedded):
            engine.load_drafter(weights.items(), version=version)
        assert served.compare_drafter(weights.items()) == []
        ours, theirs = (engine.generate(PROMPTS, GREEDY) for engine in (served, embedded))
        assert [rollout.tokens for rollout in ours] == [rollout.tokens for rollout in theirs]
        assert served.stats().accepted_by_depth == embedded.stats().accepted_by_depth
        assert served.stats().accept_length > 1.1  # else nothing was put to the test
        accepted.append(served.stats().accepted_by_depth)
    assert accepted[0] != accepted[1]
    assert served.compare_policy(target_model.named_parameters()) == []
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["lm_head.weight"][0] += 1
    (difference,) = served.compare_drafter(changed.items())
    assert difference.name == "lm_head.weight"
    served.close()


def test_tokens_are_those_of_plain_decoding_while_switching(
    start_sglang, drafter_folder, embedded, target_model
):
    names = ("off", "3_4_8", "4_1_5")
    served = start_sglang(selector=InTurns(names), drafter_path=drafter_folder)
    served.load_policy(target_model.named_parameters(), version=0)
    rollouts = served.generate(PROMPTS, GREEDY)
    embedded.strategy_selector = FixedStrategy("off")
    expected = embedded.generate(PROMPTS, GREEDY)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in expected]
    assert set(served.stats().steps_by_strategy) == set(names)
    assert served.stats().accepted_by_depth[0] > 10
    served.close()


def test_a_drafter_that_reads_one_layer_is_refused(start_sglang, target_model, tmp_path):
    drafter = Eagle3Drafter.for_target(target_model.config, seed=0, feature_layers=(1,))
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads a single layer, 1: SGLang takes"):
        start_sglang(strategy="3_1_4", drafter_path=str(tmp_path))


def test_what_sglang_would_make_something_else_of_is_refused(
    start_sglang, drafter_folder, target_model, tmp_path
):
    with pytest.raises(ValueError, match="returns the hidden states that the drafter reads"):
        start_sglang(strategy="3_1_4", drafter_path=drafter_folder, hidden_states=True)
    few = Eagle3Drafter.for_target(target_model.config, seed=0, token_ids=(1, 2, 3))
    few.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"topk 4 is larger than the vocabulary of the drafter"):
        start_sglang(strategy="3_4_8", drafter_path=str(tmp_path))


def test_the_drafter_has_read_what_plain_steps_left_to_it(
    start_sglang, drafter_folder, embedded, target_model
):
    """Chains between plain steps accept as much as where the embedded engine does the same."""
    names = ("off", "off", "4_1_5")
    served = start_sglang(selector=InTurns(names), drafter_path=drafter_folder)
    served.load_policy(target_model.named_parameters(), version=0)
    check_turns_accept_the_same(served, embedded, PROMPTS, names)
    long_plain = (*("off",) * 40, *("4_1_5",) * 12)
    check_turns_accept_the_same(served, embedded, PROMPTS, long_plain, max_tokens=90)
    served.close()
