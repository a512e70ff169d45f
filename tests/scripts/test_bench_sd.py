"""The benchmark of speculation on tiny models: figures by hand, files, arms, what it refuses."""

import contextlib
import gzip
import json
import os
from pathlib import Path

import bench_sd
import pytest
import sd_engines
from bench_inputs import random_weights, write_shape
from bench_sd import Bench, load_prompts, make_figures, measure, parse, prepare, run
from rollout_figures import ratio_and_spread
from sd_engines import (
    Sample,
    Session,
    sample_of,
    sglang_sessions,
    strategy_of,
    torch_sessions,
)
from sd_figures import break_even, print_against_sglang, print_step_costs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import EngineStats, FinishReason, Rollout, SamplingParams
from tests.rollout.tiny_models import make_prompts

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
SHORT = SamplingParams(max_tokens=24, ignore_eos=True)


def tiny(**changes: object) -> Bench:
    settings = {
        "engine": "torch",
        "model": str(QUICKSTART / "policy"),
        "drafter": str(QUICKSTART / "drafter"),
        "arms": ["off", "2_1_3", "ngram_4_1_5", "adaptive"],
        "batch_sizes": [1, 4],
        "rounds": 2,
        "num_samples": 2,
        "sampling": SHORT,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "prompt_tokens": 8,
    }
    return Bench(**{**settings, **changes})


def sample(rate: float, step_ms: float = 1.0, accept_length: float = 1.0) -> Sample:
    return Sample(tokens_per_s=rate, step_ms=step_ms, accept_length=accept_length)


def session(*arms: str, batch_sizes: tuple[int, ...] = (1,)) -> Session:
    return Session(arms=arms, batch_sizes=batch_sizes, open=lambda: contextlib.nullcontext({}))


# -- figures --------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds():
    ratio, spread = ratio_and_spread([10.0, 40.0, 90.0], [10.0, 20.0, 30.0])
    assert ratio == 2  # of 1, 2, 3; between the medians it is 2 as well
    assert spread == (1.5, 2.5)
    assert ratio_and_spread([10.0, 60.0], [20.0, 20.0])[0] == 1.75


def test_arms_of_another_engine_are_compared_with_the_median_of_off():
    bench = tiny(engine="sglang", arms=["stock_off", "off", "2_1_3"], batch_sizes=[1])
    samples = {
        ("stock_off", 1): [sample(10), sample(30), sample(20)],
        ("off", 1): [sample(18), sample(22), sample(20)],
        ("2_1_3", 1): [sample(60), sample(10), sample(40)],
    }
    stock, off, chain = make_figures(
        bench, samples, [session("stock_off"), session("off", "2_1_3")]
    )
    assert (stock.ratio_to_off, stock.spread) == (1, (1, 1))
    assert off.ratio_to_off == 1
    assert off.spread == pytest.approx((0.95, 1.05))
    assert (chain.tokens_per_s, chain.ratio_to_off) == (40, 2)
    assert chain.spread == pytest.approx((1.25, 2.5))


def test_arms_of_one_engine_are_compared_round_by_round():
    bench = tiny(arms=["off", "2_1_3"], batch_sizes=[1])
    samples = {("off", 1): [sample(10), sample(100)], ("2_1_3", 1): [sample(20), sample(200)]}
    _, chain = make_figures(bench, samples, [session("off", "2_1_3")])
    assert (chain.ratio_to_off, chain.spread) == (2, (2, 2))


def test_break_even_is_a_steps_time_in_plain_steps():
    bench = tiny(arms=["off", "2_1_3", "adaptive"], batch_sizes=[1, 4])
    samples = {
        (arm, size): [sample(1, step_ms=step)]
        for arm, steps in (("off", (6, 8)), ("2_1_3", (9, 20)), ("adaptive", (7, 7)))
        for size, step in zip((1, 4), steps, strict=True)
    }
    arms = session("off", "2_1_3", "adaptive", batch_sizes=(1, 4))
    found = break_even(make_figures(bench, samples, [arms]), "off")
    assert found == {"off": {1: 1, 4: 1}, "2_1_3": {1: 1.5, 4: 2.5}}


def test_adaptive_is_compared_with_sglangs_own(capsys):
    arms = ["stock_off", "sglang_adaptive", "2_1_3", "adaptive"]
    bench = tiny(engine="sglang", arms=arms, batch_sizes=[4])
    samples = {(arm, 4): [sample(rate)] for arm, rate in zip(arms, (5, 8, 9, 12), strict=True)}
    own = [session(arm, batch_sizes=(4,)) for arm in arms[:2]]
    print_against_sglang(make_figures(bench, samples, [*own, session(*arms[2:], batch_sizes=(4,))]))
    assert capsys.readouterr().out.splitlines()[-1].split() == ["4", "1.50"]


def test_a_responses_first_token_is_the_prefills():
    (prompt,) = make_prompts(1)
    rollouts = [
        Rollout(
            prompt=prompt,
            sample_index=0,
            tokens=(3,) * (1 + sum(lengths)),
            logprobs=(0.0,) * (1 + sum(lengths)),
            text="",
            finish_reason=FinishReason.LENGTH,
            policy_version=0,
            accept_lengths=lengths,
        )
        for lengths in ((1, 2, 3), (2, 2, 2))
    ]
    stats = EngineStats(
        num_rollouts=2, num_tokens=14, num_steps=3, seconds=5.0, row_steps=6, accepted_tokens=12
    )
    found = sample_of(rollouts, stats, prefill_s=2.0)
    assert found == Sample(tokens_per_s=4.0, step_ms=1000.0, accept_length=2.0)
    with pytest.raises(ValueError, match=r"raise sampling\.max_tokens"):
        sample_of(rollouts, stats, prefill_s=5.0)


# -- what is run ----------------------------------------------------------------------------------


def test_figures_of_the_embedded_engine_are_written_and_read_back(tmp_path, capsys):
    sums = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}
    files = {"json": tmp_path / "bench.json", "plot": tmp_path / "bench.png"}
    bench = tiny(prompt_tokens=None, task_config=sums, **files)
    figures = run(bench)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(entry["batch_size"], entry["arm"]) for entry in written] == [
        (batch_size, arm) for batch_size in (1, 4) for arm in bench.arms
    ]
    for entry, figure in zip(written, figures, strict=True):
        assert set(entry) == {
            *("engine", "batch_size", "arm", "tokens_per_s", "ratio_to_off", "spread"),
            *("accept_length", "step_ms"),
        }
        assert entry["engine"] == "torch"
        assert entry["tokens_per_s"] == figure.tokens_per_s > 0
        assert entry["step_ms"] == figure.step_ms > 0
        low, high = entry["spread"]
        assert low <= entry["ratio_to_off"] <= high
        if entry["arm"] == "off":
            assert low == high == entry["accept_length"] == 1
        if entry["arm"] == "2_1_3":
            assert 1 < entry["accept_length"] <= 3
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "adaptive/best fixed" in shown
    assert "milliseconds a step (accept length from which on it is faster than off)" in shown


def test_a_trace_of_each_arm_is_written_where_asked_for(tmp_path):
    run(tiny(arms=["off", "2_1_3"], batch_sizes=[2], rounds=1, profile=tmp_path / "traces"))
    for arm in ("off", "2_1_3"):
        (trace,) = (tmp_path / "traces" / f"{arm}_batch_2").iterdir()
        names = {
            event["name"]
            for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        }
        assert "aten::linear" in names


def test_every_arm_gets_the_same_prompts_and_each_round_its_own():
    """In each batch size so many requests as it says, warm-up rounds included."""
    asked: dict[str, list] = {"off": [], "2_1_3": []}

    class Listening:
        def __init__(self, name):
            self.name = name

        def run(self, prompts, num_samples, seed):
            ids = tuple(prompt.prompt_id for prompt in prompts)
            asked[self.name].append((ids, num_samples, seed))
            return sample(len(asked[self.name]))

    bench = tiny(arms=["off", "2_1_3"], batch_sizes=[1, 2, 6], rounds=2, warm_up_rounds=1)
    prompts = load_prompts(bench, bench.model)
    arms = {name: Listening(name) for name in asked}
    one = Session(
        arms=("off", "2_1_3"), batch_sizes=(1, 2, 6), open=lambda: contextlib.nullcontext(arms)
    )
    samples = measure(bench, one, prompts)
    assert asked["off"] == asked["2_1_3"]
    assert sorted(len(ids) * num for ids, num, _ in asked["off"]) == [1, 1, 1, 2, 2, 2, 6, 6, 6]
    large = [(ids, seed) for ids, num, seed in asked["off"] if len(ids) * num == 6]
    assert len({prompt_id for ids, _ in large for prompt_id in ids}) == 9  # 3 in each round
    assert [seed for _, seed in large] == [0, 1, 2]
    assert {key: len(values) for key, values in samples.items()} == {
        (arm, size): 2 for arm in asked for size in (1, 2, 6)
    }
    assert min(one.tokens_per_s for values in samples.values() for one in values) > 3  # warm-up's


def test_the_embedded_engines_arms_have_engines_of_their_own(tmp_path):
    """So n-grams find no other arm's responses; the bandit is one for all batch sizes."""
    bench = tiny()
    bandits = set()
    subject = prepare(bench, tmp_path)
    for one in torch_sessions(subject, bench.arms, bench.batch_sizes):
        with one.open() as arms:
            engines = {name: arm.engine for name, arm in arms.items()}
            assert len(set(map(id, engines.values()))) == len(bench.arms)
            for name in ("off", "2_1_3", "ngram_4_1_5"):
                assert engines[name].strategy_selector.strategies == (strategy_of(name),)
            bandits.add(engines["adaptive"].strategy_selector)
    (bandit,) = bandits
    assert isinstance(bandit, ModelBased)
    assert [str(arm) for arm in bandit.arms] == ["off", "2_1_3", "ngram_4_1_5"]


def test_a_shape_is_run_with_random_weights(tmp_path):
    """No checkpoint: a configuration alone, on both sides of it."""
    shape = tmp_path / "shape"
    shape.mkdir()
    config = json.loads((QUICKSTART / "policy/config.json").read_text())
    (shape / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    bench = tiny(
        model=str(shape),
        drafter=None,
        load_format="dummy",
        prompt_tokens=None,
        arms=["off", "2_1_3"],
        batch_sizes=[2],
        rounds=1,
    )
    figures = run(bench)
    assert [figure.arm for figure in figures] == ["off", "2_1_3"]
    subject = prepare(bench, tmp_path / "again")
    weights = dict(subject.weights())
    assert not any("layers.2." in name for name in weights)
    assert all(len(prompt.tokens) == 128 for prompt in load_prompts(bench, subject.folder))


def test_random_weights_are_the_policys_by_name_and_repeat():
    config = AutoConfig.from_pretrained(QUICKSTART / "policy")
    expected = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    dtype = next(iter(expected.values())).dtype

    def made(seed):
        return dict(random_weights(config, dtype=dtype, device="cpu", seed=seed))

    assert {name: one.shape for name, one in made(0).items()} == {
        name: one.shape for name, one in expected.items()
    }
    name = "model.layers.3.mlp.up_proj.weight"
    assert made(0)[name].equal(made(0)[name])
    assert not made(0)[name].equal(made(1)[name])
    assert made(0)[name].std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert made(0)["model.norm.weight"].unique().tolist() == [1]


@pytest.mark.parametrize(("shape", "billions"), [("qwen2.5-7b", 7.6), ("qwen2.5-32b", 32.8)])
def test_known_shapes_are_as_large_as_their_models(shape, billions, tmp_path):
    """Qwen says 7.61 and 32.5 billion; here each embedding has its padding rows as well."""
    from fastrl.rollout.sglang_weights import policy_skeleton

    folder = write_shape(shape, tmp_path)
    weights = policy_skeleton(AutoConfig.from_pretrained(folder))
    assert sum(weight.numel() for weight in weights.values()) / 1e9 == pytest.approx(
        billions, abs=0.05
    )
    assert AutoTokenizer.from_pretrained(folder).eos_token == "b"


def test_a_shape_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"known are qwen2\.5-7b"):
        write_shape(str(tmp_path / "nothing"), tmp_path)


# -- SGLang's arms, without SGLang ----------------------------------------------------------------


class RecordingEngine:
    """Stands for SGLangEngine, as far as sessions ask it: what it is made of and told, in order."""

    made: list["RecordingEngine"]

    def __init__(self, **options: object) -> None:
        self.options, self.events = options, []
        self.strategy_selector: object = None
        RecordingEngine.made.append(self)

    def start(self, folder: str) -> None:
        simulated = os.environ.get("SGLANG_SIMULATE_ACC_LEN")
        self.events.append(("start", self.strategy_selector, simulated))

    def load_policy(self, named_tensors, version: int) -> None:
        self.events.append(("load_policy", len(dict(named_tensors))))

    def load_drafter(self, named_tensors, version: int) -> None:
        self.events.append(("load_drafter", len(dict(named_tensors))))

    def graph_memory(self) -> dict[str, float]:
        return {"off": 0.5, "all": 1.25} if len(self.strategy_selector.strategies) > 1 else {}

    def close(self) -> None:
        self.events.append(("close",))


@pytest.fixture
def recorded(monkeypatch):
    RecordingEngine.made = []
    monkeypatch.setattr(sd_engines, "SGLangEngine", RecordingEngine)
    monkeypatch.delenv("SGLANG_SIMULATE_ACC_LEN", raising=False)
    return RecordingEngine.made


def test_stock_arms_have_engines_of_their_own_and_others_share_one(recorded, tmp_path):
    arms = ["stock_off", "stock_4_2_8", "sglang_adaptive", "off", "2_1_3", "adaptive"]
    bench = tiny(engine="sglang", arms=arms, simulate_accept_length=2.5)
    sessions = sglang_sessions(prepare(bench, tmp_path), arms, bench.batch_sizes)
    assert [one.arms for one in sessions] == [
        *(("stock_off",), ("stock_4_2_8",), ("sglang_adaptive",)),
        ("off", "2_1_3", "adaptive"),
    ]
    for one in sessions:
        with one.open() as opened:
            assert tuple(opened) == one.arms
            assert "SGLANG_SIMULATE_ACC_LEN" not in os.environ
    selectors = [engine.events[0][1] for engine in recorded]
    assert [str(one.strategy) for one in selectors[:3]] == ["off", "4_2_8", "7_1_8"]
    assert recorded[2].options["server_args"] == {"speculative_adaptive": True}
    assert recorded[1].options["server_args"] == {}
    assert [str(one) for one in selectors[3].strategies] == ["off", "2_1_3"]
    for engine in recorded:
        assert [event[0] for event in engine.events] == ["start", "load_policy", "close"]
        assert engine.events[0][2] == "2.5"
        assert engine.options["max_batch_size"] == 4
    assert opened["adaptive"].selector is selectors[3]
    assert isinstance(opened["off"].selector, FixedStrategy)


def test_an_engine_that_switches_runs_no_trees_beyond_its_bandits_limit(capsys):
    """2048 nodes; one that runs a single strategy has graphs of its own for all batch sizes."""
    arms = ["stock_off", "stock_8_4_16", "off", "2_1_3", "8_4_16", "adaptive"]
    bench = tiny(engine="sglang", arms=arms, batch_sizes=[128, 256])
    *stock, switching = sglang_sessions(prepare(bench, Path("unused")), arms, bench.batch_sizes)
    assert switching.arms_at(128) == ["off", "2_1_3", "8_4_16", "adaptive"]
    assert switching.arms_at(256) == ["off", "2_1_3", "adaptive"]
    assert stock[1].arms_at(256) == ["stock_8_4_16"]
    sessions = [*stock, switching]
    samples = {
        (arm, size): [sample(10, step_ms=2)]
        for one in sessions
        for size in (128, 256)
        for arm in one.arms_at(size)
    }
    print_step_costs(make_figures(bench, samples, sessions), "stock_off")
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.split()[:1] == ["8_4_16"])
    assert line.split() == ["8_4_16", "2.00", "(1.00)", "-"]


def test_prefills_are_timed_without_the_bandit():
    """It would have steps timed for the context of that call; and they are taken off. Neither the
    first, which fills the cache, nor one that the machine held up tells how long one takes."""
    asked = []

    class Timed:
        strategy_selector: object = None

        def flush_cache(self):
            assert not asked  # before what fills it

        def generate(self, prompts, sampling, num_samples, seed):
            asked.append((self.strategy_selector, sampling.max_tokens))
            self.tokens = sampling.max_tokens
            (prompt,) = prompts
            return [
                Rollout(
                    prompt=prompt,
                    sample_index=0,
                    tokens=(3,) * self.tokens,
                    logprobs=(0.0,) * self.tokens,
                    text="",
                    finish_reason=FinishReason.LENGTH,
                    policy_version=0,
                    accept_lengths=(1,) * (self.tokens - 1),
                )
            ]

        def stats(self):
            seconds = {1: 7.0, 2: 1.0, 3: 9.0, 4: 1.5, 5: 5.5}[len(asked)]
            return EngineStats(num_steps=self.tokens - 1, seconds=seconds)

    bandit = ModelBased(["2_1_3"])
    arm = sd_engines.SGLangArm(
        engine=Timed(), sampling=SamplingParams(max_tokens=9), selector=bandit
    )
    assert arm.run(make_prompts(1), 1, seed=0).tokens_per_s == 8 / (5.5 - 1.5)
    assert [tokens for _, tokens in asked] == [1, 1, 1, 1, 9]
    assert [selector is bandit for selector, _ in asked] == [False] * 4 + [True]
    assert {str(selector.strategy) for selector, _ in asked[:4]} == {"off"}


def test_an_engine_that_fails_is_closed_and_what_was_measured_is_kept(
    recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench_sd.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(sd_engines.SGLangArm, "run", lambda self, *_: self.engine.run())
    runs = iter([sample(1), sample(2), sample(3), sample(2), sample(3), sample(4)])
    RecordingEngine.run = lambda self: next(runs)  # the second engine finds none left
    bench = tiny(engine="sglang", arms=["stock_off", "off"], json=tmp_path / "bench.json")
    try:
        with pytest.raises(StopIteration):
            run(bench)
    finally:
        del RecordingEngine.run
    assert [engine.events[-1] for engine in recorded] == [("close",)] * 2
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["arm"] for entry in written] == ["stock_off", "stock_off"]


# -- the command line -----------------------------------------------------------------------------


def test_the_command_line_is_read():
    bench = parse(
        [
            *("--engine", "sglang", "--model", "qwen2.5-7b", "--load_format", "dummy"),
            *("--simulate_accept_length", "6.5", "--arms", "[stock_off, off, 8_4_48, adaptive]"),
            *("--sglang.mem_fraction_static", "0.8", "--sglang.server_args.disable_cuda_graph"),
            "true",
        ]
    )
    assert bench.arms == ["stock_off", "off", "8_4_48", "adaptive"]
    assert bench.simulate_accept_length == 6.5
    assert bench.sglang.mem_fraction_static == 0.8
    assert bench.sglang.server_args == {"disable_cuda_graph": True}
    assert bench_sd.arms_of(tiny(arms=None))[0] == "off"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["2_1_3"]}, "arms must hold 'off'"),
        ({"arms": ["off", "adaptive"]}, "chooses among strategies"),
        ({"arms": ["off", "4_2"]}, "malformed strategy '4_2'"),
        ({"arms": ["off", "stock_2_1_3"]}, "are SGLang's"),
        ({"arms": ["off", "sglang_adaptive"]}, "are SGLang's"),
        ({"engine": "sglang", "arms": ["off", "ngram_2_1_3"]}, "no n-gram trees"),
        ({"drafter": None, "arms": ["off", "2_1_3"]}, "need --drafter"),
        (
            {"engine": "sglang", "drafter": None, "arms": ["stock_off", "sglang_adaptive"]},
            "need --drafter",
        ),
        ({"simulate_accept_length": 3.0}, "is SGLang's"),
        (
            {"engine": "sglang", "arms": ["stock_off"], "simulate_accept_length": 0.5},
            "must be >= 1",
        ),
        ({"load_format": "dummy", "ckpt": "x.ckpt"}, "takes no weights"),
        ({"draft_vocab_size": 64}, "trim_vocabulary.py trims one"),
        ({"warm_up_rounds": 0}, "must be >= 1"),
        ({"batch_sizes": [1, 3]}, r"batch size 3 .*num_samples \(2\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
