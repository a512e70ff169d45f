"""The benchmark of a drafter gone bad: who is told of a swap, and the whole in miniature."""

import csv
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from bad_drafter_figures import BAD, GOOD, PHASES, RECOVERED, BucketOfRound
from bench_bad_drafter import (
    SWAP_STEP,
    BadDrafterBench,
    Subject,
    check_tokens,
    load_weights,
    make_engine,
    parse,
    random_weights,
    run,
    workload,
)

from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import FinishReason, Rollout, SamplingParams
from tests.rollout.tiny_models import make_prompts
from tests.rollout.worlds import World

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
GOOD_WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3)}


def tiny(**changes: object) -> BadDrafterBench:
    settings = {
        "model": str(QUICKSTART / "policy"),
        "drafter": str(QUICKSTART / "drafter"),
        "strategies": ["2_1_3"],
        "batch_sizes": [2],
        "rounds": 1,
        "settle_calls": 1,
        "phase_calls": 1,
        "rollouts_per_row": 1,
        "min_rollouts": 4,
        "num_samples": 2,
        "sampling": SamplingParams(max_tokens=60, ignore_eos=True),
        "num_threads": 1,
    }
    return BadDrafterBench(**{**settings, **changes})


class SimulatedEngine:
    """Plays 60 steps a call in a world whose drafter is good or bad; keeps what it is told."""

    def __init__(self, num_steps: int = 60) -> None:
        self.world = World(0.8)
        self.num_steps = num_steps
        self.strategy_selector = None
        self.told: list[tuple[str, bool]] = []  # how, whether of the good weights
        self.serves_good: list[bool] = []  # by step that speculated or not, plain calls left out

    def _take(self, how: str, weights: dict) -> None:
        is_good = torch.equal(weights["fc.weight"], GOOD_WEIGHTS["fc.weight"])
        self.told.append((how, is_good))
        self.world.first = self.world.second = 0.0
        if is_good:
            self.world.first, self.world.second = 0.8, 0.1

    def load_drafter(self, named_tensors, version):
        assert isinstance(self.strategy_selector, object)
        self.strategy_selector.exclude([])
        self._take("published", dict(named_tensors))

    def overwrite_drafter(self, weights):
        self._take("silent", weights)

    def generate(self, prompts, sampling, *, num_samples, seed):
        for query in self.strategy_selector.cost_queries(4, 200):
            cost = self.world.cost(query.strategy, query.batch_size)
            self.strategy_selector.record_cost(query, cost)
        for _ in range(self.num_steps):
            is_good = self.world.first > 0
            strategy = self.strategy_selector.select(4, 100)
            if len(self.strategy_selector.strategies) > 1:
                self.serves_good.append(is_good)
            self.strategy_selector.record(self.world.step(strategy, 4))
        return [
            Rollout(
                prompt=prompts[0],
                sample_index=0,
                tokens=(seed,),
                logprobs=(0.0,),
                text="",
                finish_reason=FinishReason.LENGTH,
                policy_version=0,
            )
        ]


class CountingBandit(ModelBased):
    """Counts notices."""

    notices = 0
    publications = 0

    def discount(self, keep: float, *, drafter_changed: bool = True) -> None:
        type(self).notices += 1
        type(self).publications += drafter_changed
        super().discount(keep, drafter_changed=drafter_changed)


def subject(engine: SimulatedEngine, **changes: object) -> Subject:
    return Subject(
        bench=tiny(**changes),
        batch_size=4,
        engine=engine,
        prompts=make_prompts(1),
        good=GOOD_WEIGHTS,
    )


@pytest.mark.parametrize(
    ("scenario", "how", "num_notices", "num_publications"),
    [("silent", "silent", 0, 0), ("in_run", "silent", 6, 0), ("published", "published", 2, 2)],
)
def test_who_is_told_of_the_swaps(scenario, how, num_notices, num_publications, monkeypatch):
    """Bad weights once, good ones again; the bandit only by what a run would say."""
    engine = SimulatedEngine()
    it = subject(engine, phase_calls=2)
    settled = it.settle(0)
    engine.told.clear()
    monkeypatch.setattr("bench_bad_drafter.ModelBased", CountingBandit)
    CountingBandit.notices = CountingBandit.publications = 0
    settled["algorithm"] = "CountingBandit"
    it.play(settled, scenario, 0)
    assert engine.told == [("published", True), (how, False), (how, True)]
    assert CountingBandit.notices == num_notices
    assert CountingBandit.publications == num_publications


@pytest.mark.parametrize("scenario", ["silent", "in_run", "published"])
def test_steps_belong_to_the_phase_whose_drafter_served_them(scenario):
    engine = SimulatedEngine()
    it = subject(engine, phase_calls=2)
    settled = it.settle(0)
    engine.serves_good.clear()
    round_ = it.play(settled, scenario, 0)
    late = 0 if scenario == "published" else SWAP_STEP
    lengths = [len(round_.steps[phase]) for phase in PHASES]
    assert lengths == [120 + late, 120, 120 - late]
    assert engine.serves_good == [True] * lengths[0] + [False] * lengths[1] + [True] * lengths[2]
    for steps in round_.off_steps.values():
        assert [step.strategy.is_off for step in steps] == [True] * 120
    assert any(not step.strategy.is_off for step in round_.steps[GOOD])


def test_a_bandit_that_notices_is_seen_to():
    round_ = subject(engine := SimulatedEngine()).play(subject(engine).settle(0), "silent", 0)
    assert round_.alarm_step is not None
    assert round_.alarm_step <= 20
    assert round_.exclusion_step is None


def test_a_rollout_too_short_to_swap_in_is_refused():
    engine = SimulatedEngine(num_steps=SWAP_STEP - 1)
    it = subject(engine)
    with pytest.raises(ValueError, match=f"ended before its decode step {SWAP_STEP}.*raise"):
        it.play(it.settle(0), "silent", 0)


def test_tokens_that_differ_end_the_run():
    check_tokens([(1, 2)], [(1, 2)], "silent, bad")
    with pytest.raises(SystemExit, match="silent, bad: 1 of 2 rollouts differ"):
        check_tokens([(1, 2), (3,)], [(1, 2), (4,)], "silent, bad")


def test_random_weights_have_the_scale_of_the_good_ones():
    good = {"norm": torch.full((4000,), 3.0), "fc": 0.02 * torch.randn(200, 200) - 1}
    bad = random_weights(good, seed=0)
    assert torch.equal(bad["norm"], good["norm"])
    assert bad["fc"].mean().item() == pytest.approx(-1, abs=0.001)
    assert bad["fc"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.allclose(bad["fc"], good["fc"], atol=0.01)
    assert torch.equal(random_weights(good, seed=0)["fc"], bad["fc"])
    assert not torch.equal(random_weights(good, seed=1)["fc"], bad["fc"])


def test_overwritten_weights_are_served_without_a_word():
    """As many drafts are accepted as of the same weights published, to the last one."""
    bench = tiny(batch_sizes=[4], sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    model, _ = load_weights(workload(bench))
    accepted = {}
    for how in ("published", "silent"):
        engine = make_engine(bench, 4, model)
        engine.strategy_selector = (bandit := ModelBased(["2_1_3"]))
        weights = random_weights(dict(engine._loaded.drafter.named_weights()), seed=3)
        bandit._candidates = lambda batch_size: [1]
        engine.generate(make_prompts(4), bench.sampling)
        before = engine.stats().accepted_by_depth
        if how == "silent":
            engine.overwrite_drafter(weights)
            assert engine.drafter_version == -1
        else:
            engine.load_drafter(weights.items(), version=1)
        engine.generate(make_prompts(4), bench.sampling)
        accepted[how] = engine.stats().accepted_by_depth
        assert accepted[how] != before
    assert accepted["silent"] == accepted["published"]


def test_the_whole_in_miniature(tmp_path, capsys):
    bench = tiny(json=tmp_path / "figures.json", steps=tmp_path / "steps.csv")
    found = run(bench)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert len(written) == len(found) > 0
    assert {entry["scenario"] for entry in written} == {"silent", "in_run", "published"}
    for entry, figure in zip(written, found, strict=True):
        assert set(entry["rounds"]) == {one.name for one in fields(BucketOfRound)}
        assert entry["bucket"] == 2
        assert entry["rounds"]["good_ratio"][1] == figure.rounds["good_ratio"][1] > 0
        assert entry["is_back"] == (entry["rounds"]["back_ratio"][1] >= 0.97)
        assert entry["is_recovered"] == (entry["rounds"]["recovery"][1] >= 0.97)
    lines = list(csv.DictReader((tmp_path / "steps.csv").open()))
    phases = [line["phase"] for line in lines if line["swap"] == "silent"]
    assert list(dict.fromkeys(phases)) == [GOOD, BAD, RECOVERED]
    off = [line for line in lines if line["arm"] == "off"]
    assert {line["strategy"] for line in off} == {"off"}
    # Speculation or not, 4 rollouts of 60 tokens, of which decode steps emit all but the first.
    for swap in ("silent", "in_run", "published"):
        ours = [line for line in lines if line["swap"] == swap]
        for is_off in (True, False):
            tokens = [int(line["tokens"]) for line in ours if (line["arm"] == "off") == is_off]
            assert sum(tokens) == 3 * 4 * 59
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(found)


def test_the_command_line_and_what_it_refuses():
    bench = parse(["--ckpt", "c", "--scenarios", "[silent]", "--batch_sizes", "[1, 8]"])
    assert (bench.ckpt, bench.scenarios, bench.batch_sizes) == ("c", ["silent"], [1, 8])
    with pytest.raises(SystemExit):
        parse(["--scenarios", "[loud]"])
    with pytest.raises(ValueError, match="rounds, settle_calls and phase_calls must be >= 1"):
        replace(bench, rounds=0)
    with pytest.raises(ValueError, match=r"learned drafter.*got 'ngram_4_1_5'"):
        replace(bench, strategies=["ngram_4_1_5"])
