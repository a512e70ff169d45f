"""The rollout benchmark on tiny models: its figures, its files, and what it refuses."""

import json
from pathlib import Path

import bench_rollout
import pytest
from bench_rollout import Bench, fixed_strategies, measure, parse, run

from fastrl.types import SamplingParams
from tests.rollout.tiny_models import make_prompts

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


def tiny(**changes: object) -> Bench:
    settings = {
        "model": str(QUICKSTART / "policy"),
        "drafter": str(QUICKSTART / "drafter"),
        "arms": ["off", "2_1_3", "adaptive"],
        "batch_sizes": [1, 3],
        "rounds": 2,
        "warm_up_rounds": 0,
        "rollouts_per_row": 1,
        "min_rollouts": 2,
        "num_samples": 2,
        "sampling": SHORT,
        "num_threads": 1,
    }
    return Bench(**{**settings, **changes})


def test_figures_are_written_and_read_back(tmp_path, capsys):
    bench = tiny(json=tmp_path / "bench.json", plot=tmp_path / "bench.png")
    figures = run(bench)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(entry["batch_size"], entry["arm"]) for entry in written] == [
        (batch_size, arm) for batch_size in (1, 3) for arm in bench.arms
    ]
    for entry, figure in zip(written, figures, strict=True):
        assert set(entry) == {"batch_size", "arm", "tokens_per_s", "ratio_to_off", "spread"}
        assert entry["tokens_per_s"] == figure.tokens_per_s > 0
        low, high = entry["spread"]
        assert low <= entry["ratio_to_off"] <= high
        if entry["arm"] == "off":
            assert low == high == 1
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "adaptive/best fixed" in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["hf_generate", "hf_continuous", "hf_assisted"])
def test_transformers_arms_generate_as_many_tokens(arm):
    """Twice, since transformers' arms of all batch sizes share a model."""
    figures = run(
        tiny(arms=["off", arm], batch_sizes=[1, 1], sampling=SamplingParams(max_tokens=6))
    )
    assert [figure.arm for figure in figures] == ["off", arm] * 2
    assert all(figure.tokens_per_s > 0 for figure in figures)


def test_a_transformers_response_ends_at_its_end_token():
    """Counted tokens are those a response has, not what its batch was padded to."""
    model, _ = bench_rollout.load_weights(tiny())
    arms = bench_rollout.make_arms(
        tiny(arms=["off", "hf_generate"], sampling=SamplingParams(max_tokens=60)),
        4,
        model,
        {},
        None,
    )
    responses = arms["hf_generate"].generate(bench_rollout.load_prompts(tiny()), 2, seed=0)
    eos = 2
    assert any(response[-1] == eos for response in responses)
    assert all(eos not in response[:-1] for response in responses)


class Scripted:
    """An arm that returns what it is told."""

    accept_length = 1.0

    def __init__(self, token: int) -> None:
        self._token = token

    def generate(self, prompts, num_samples, seed):
        return [(self._token,) * 3 for _ in range(len(prompts) * num_samples)]


def test_an_arm_whose_tokens_differ_ends_the_run():
    with pytest.raises(SystemExit, match=r"tokens differ from plain decoding's.*'2_1_3': 4"):
        measure(tiny(), 1, {"off": Scripted(1), "2_1_3": Scripted(2)}, make_prompts(2))


def test_each_round_asks_prompts_of_its_own():
    """N-grams must not find what was answered a round ago."""
    asked = []

    class Listening(Scripted):
        def generate(self, prompts, num_samples, seed):
            asked.append([prompt.prompt_id for prompt in prompts])
            return super().generate(prompts, num_samples, seed)

    bench = tiny(rounds=2, warm_up_rounds=1, rollouts_per_row=4, num_samples=2)
    measure(bench, 1, {"off": Listening(1)}, bench_rollout.load_prompts(bench))
    assert len({prompt_id for ids in asked for prompt_id in ids}) == sum(map(len, asked)) == 3 * 2


def test_rounding_may_move_tokens_in_bfloat16(capsys):
    arms = {"off": Scripted(1), "2_1_3": Scripted(2)}
    measure(tiny(dtype="bfloat16"), 1, arms, make_prompts(2))
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "4"


def test_the_command_line_reads_off_as_a_strategy():
    bench = parse(["--model", "m", "--arms", "[off, 4_1_5, hf_generate, adaptive]"])
    assert bench.arms == ["off", "4_1_5", "hf_generate", "adaptive"]
    assert fixed_strategies(bench) == ["4_1_5"]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="arms must hold 'off'"):
        tiny(arms=["2_1_3"])
    with pytest.raises(ValueError, match="need --drafter"):
        run(tiny(drafter=None, arms=["off", "2_1_3"]))
