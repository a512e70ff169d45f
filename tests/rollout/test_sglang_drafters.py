"""Stock SGLang on the CPU, without FastRL's plugin, serving a drafter that was imported from
SafeAILab's layout and exported for it: it holds the same weights and is accepted as often as in the
embedded engine."""

import dataclasses

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.drafters.published_eagle import SETTINGS, publish
from tests.rollout.tiny_models import make_prompts

pytestmark = pytest.mark.sglang

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def published(request, target_model, tmp_path):
    """A folder in SafeAILab's layout, of float16. It predicts that the hidden state nearly stays as
    it is, and so some tokens that are accepted."""
    config = target_model.config
    drafter = EagleDrafter.for_target(config, seed=0)
    weights = {
        name: (0.1 * weight.detach() if weight.ndim == 2 else weight.detach()).half()
        for name, weight in drafter.named_weights()
    }
    weights["fc.weight"][:, config.hidden_size :] += torch.eye(config.hidden_size).half()
    generator = torch.Generator().manual_seed(0)
    weights["fc.bias"] = (0.1 * torch.randn(config.hidden_size, generator=generator)).half()
    if not request.param:
        del weights["fc.bias"]
    weights["embed_tokens.weight"] = target_model.model.embed_tokens.weight.detach().half()
    changes = {
        key: value
        for key, value in config.to_dict().items()
        if key in SETTINGS and "arch" not in key
    }
    changes |= {"rope_theta": config.rope_parameters["rope_theta"], "num_hidden_layers": 1}
    publish(tmp_path / "published", weights, **changes, bias=request.param)
    return tmp_path / "published"


def test_stock_sglang_serves_an_exported_drafter_with_the_same_acceptance(
    published, start_sglang, folders, target_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("SGLANG_PLUGINS", "fastrl_sglang_cpu")  # kernels alone
    monkeypatch.setenv("FASTRL_TEST_STOCK", "1")
    drafter = EagleDrafter.from_pretrained(published, target_model.config)
    drafter.save_pretrained(tmp_path / "exported")
    embedded = TorchEngine(drafter_path=str(published), max_batch_size=6, device="cpu")
    embedded.start(str(folders[0]))
    embedded.load_policy(target_model.named_parameters(), version=0)
    stock = start_sglang(strategy="3_4_8", drafter_path=str(tmp_path / "exported"))
    stock.load_policy(target_model.named_parameters(), version=0)
    all_steps: list[int] = []
    try:
        assert stock.compare_drafter(drafter.named_weights()) == []
        prompts = make_prompts(6)
        embedded.strategy_selector = FixedStrategy("3_4_8")
        for ours in embedded.generate(prompts, GREEDY):
            # Up to the end of its last whole step: of one cut off, SGLang does not tell which.
            steps = ours.accept_lengths[:-1]
            num_tokens = 1 + sum(steps)
            (theirs,) = stock.generate(
                [ours.prompt], dataclasses.replace(GREEDY, max_tokens=num_tokens)
            )
            assert theirs.tokens == ours.tokens[:num_tokens]
            assert list(theirs.accept_lengths) == sorted(steps)
            all_steps += steps
    finally:
        stock.close()
        embedded.close()
    assert sum(all_steps) > 1.2 * len(all_steps)  # else nothing was put to the test
    assert max(all_steps) == 4


def test_the_layout_of_others_is_not_handed_to_sglang(published, start_sglang):
    """It would run it as something else; the error says how to write it anew."""
    with pytest.raises(ValueError, match=r"export_drafter\.py") as error:
        start_sglang(strategy="3_4_8", drafter_path=str(published))
    assert "architectures ['LlamaForCausalLM']" in str(error.value)
