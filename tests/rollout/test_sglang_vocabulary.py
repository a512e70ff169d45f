"""Drafters with a vocabulary of their own on real SGLang: stock, and while strategies change."""

import pytest

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.vocabulary import frequent_tokens
from fastrl.rollout.sglang_weights import _handles
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.test_sglang_engine import echoing_drafter
from tests.rollout.tiny_models import VOCAB_SIZE, make_prompts
from tests.rollout.turns import check_turns_accept_the_same

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = make_prompts(6)


@pytest.fixture(scope="module")
def trimmed_folder(folders, target_model, tmp_path_factory):
    """Of a drafter that is often right, with half of the tokens: those that responses have."""
    with TorchEngineOf(folders[0], None, target_model) as engine:
        responses = [rollout.tokens for rollout in engine.generate(PROMPTS, GREEDY)]
    chosen = frequent_tokens(responses, vocab_size=VOCAB_SIZE, size=VOCAB_SIZE // 2)
    drafter = EagleDrafter.from_pretrained(folders[1])
    drafter.load_weights(echoing_drafter(target_model).items(), source="a test")
    drafter.trim_vocabulary(chosen.token_ids)
    folder = tmp_path_factory.mktemp("trimmed") / "drafter"
    drafter.save_pretrained(folder)
    return str(folder)


class TorchEngineOf:
    """An embedded engine for the length of a block."""

    def __init__(self, target, drafter, target_model):
        self.engine = TorchEngine(drafter_path=drafter, max_batch_size=6, device="cpu")
        self.engine.start(str(target))
        self.engine.load_policy(target_model.named_parameters(), version=0)

    def __enter__(self):
        return self.engine

    def __exit__(self, *error):
        self.engine.close()


def test_stock_sglang_drafts_what_the_embedded_engine_drafts(
    start_sglang, trimmed_folder, folders, target_model
):
    """And goes on so after a publication: its copy of the LM head's rows follows the policy."""
    served = start_sglang(strategy="3_1_4", drafter_path=trimmed_folder)
    served.load_policy(target_model.named_parameters(), version=0)
    changed = {name: weight.clone() for name, weight in target_model.named_parameters()}
    changed["model.embed_tokens.weight"] *= 1.3
    with TorchEngineOf(folders[0], trimmed_folder, target_model) as embedded:
        embedded.strategy_selector = FixedStrategy("3_1_4")
        first = compare_accept_lengths(served, embedded)
        for engine in (served, embedded):
            engine.load_policy(changed.items(), version=1)
        assert compare_accept_lengths(served, embedded) != first
    assert served.compare_policy(changed.items()) == []

    # The failure of others: the policy is published, and the copy stays as it was.
    process = served.process
    process.call("begin_update", 60, role="target")
    payload = [_handles(list(target_model.named_parameters()))]
    process.send_bucket("update", "target", iter([payload, None]).__next__, 60)
    process.call("end_update", 60, has_new_weights=False)
    (difference,) = served.compare_policy(target_model.named_parameters())
    assert "the LM head's rows of the drafter's vocabulary: " in str(difference)
    assert difference.num_compared == VOCAB_SIZE // 2 * target_model.config.hidden_size
    served.load_policy(target_model.named_parameters(), version=2)
    assert served.compare_policy(target_model.named_parameters()) == []
    served.close()


def compare_accept_lengths(served, embedded):
    ours, theirs = served.generate(PROMPTS, GREEDY), embedded.generate(PROMPTS, GREEDY)
    lengths = [rollout.accept_lengths for rollout in theirs]
    assert [rollout.tokens for rollout in ours] == [rollout.tokens for rollout in theirs]
    assert served.stats().accepted_by_depth == embedded.stats().accepted_by_depth
    assert embedded.stats().accept_length > 1.1  # else nothing was put to the test
    return lengths


def test_tokens_are_those_of_plain_decoding_while_switching(
    start_sglang, trimmed_folder, folders, target_model
):
    names = ("off", "3_4_8", "4_1_5")
    served = start_sglang(selector=InTurns(names), drafter_path=trimmed_folder)
    served.load_policy(target_model.named_parameters(), version=0)
    rollouts = served.generate(PROMPTS, GREEDY)
    with TorchEngineOf(folders[0], None, target_model) as engine:
        expected = engine.generate(PROMPTS, GREEDY)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in expected]
    assert set(served.stats().steps_by_strategy) == set(names)
    assert served.stats().accepted_by_depth[0] > 10
    served.close()


def test_the_drafter_has_read_what_plain_steps_left_to_it(
    start_sglang, trimmed_folder, folders, target_model
):
    """Chains between plain steps accept as much as where the embedded engine does the same."""
    names = ("off", "off", "4_1_5")
    served = start_sglang(selector=InTurns(names), drafter_path=trimmed_folder)
    served.load_policy(target_model.named_parameters(), version=0)
    with TorchEngineOf(folders[0], trimmed_folder, target_model) as embedded:
        check_turns_accept_the_same(served, embedded, PROMPTS, names)
        read_at_once = (*("off",) * 40, *("4_1_5",) * 12)
        check_turns_accept_the_same(served, embedded, PROMPTS, read_at_once, max_tokens=90)
    served.close()


def test_several_gpus_are_refused(trimmed_folder, folders, start_sglang):
    with pytest.raises(ValueError, match="which SGLang cannot split among 2 GPUs"):
        start_sglang(strategy="3_1_4", drafter_path=trimmed_folder, tp_size=2)
