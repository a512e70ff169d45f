"""SGLang and the embedded engine taking the same turns between strategies."""

from collections.abc import Sequence

from fastrl.rollout.bandit import InTurns
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import Prompt, SamplingParams


def check_turns_accept_the_same(
    served: SGLangEngine,
    embedded: TorchEngine,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    *,
    max_tokens: int = 24,
) -> None:
    """Each step of each greedy response accepts as much in both, and some accept something."""
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    num_accepted = 0
    for prompt in prompts:  # one by one, so that both engines take the same turns
        for engine in (served, embedded):
            engine.strategy_selector = InTurns(names)
        ours, theirs = (engine.generate([prompt], greedy)[0] for engine in (served, embedded))
        assert ours.tokens == theirs.tokens
        assert ours.accept_lengths == theirs.accept_lengths
        num_accepted += sum(ours.accept_lengths) - len(ours.accept_lengths)
    assert num_accepted > 5
