"""The benchmark of speculation over real SGLang on the CPU, in miniature."""

import gzip
import importlib.util
import itertools
import json

import pytest
from bench_sd import Bench, run
from sd_engines import SGLangOptions

from fastrl.types import SamplingParams
from tests.rollout.tiny_models import make_drafter, make_target
from tests.sglang_cpu import environment

pytestmark = pytest.mark.sglang

ON_CPU = SGLangOptions(
    mem_fraction_static=0.1,
    attention_backend="intel_amx",
    server_args={
        "disable_cuda_graph": True,
        "max_total_tokens": 4096,
        "skip_server_warmup": True,
        "sleep_on_idle": True,
    },
)


@pytest.fixture(autouse=True)
def _sglang(monkeypatch):
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def bench_of(folder, **changes: object) -> Bench:
    settings = {
        "engine": "sglang",
        "model": str(folder / "target"),
        "batch_sizes": [1, 4],
        "rounds": 2,
        "num_samples": 2,
        "prompt_tokens": 8,
        "sampling": SamplingParams(max_tokens=40, ignore_eos=True),
        "dtype": "float32",
        "device": "cpu",
        "sglang": ON_CPU,
        "num_threads": 1,
        "json": folder / "bench.json",
    }
    return Bench(**{**settings, **changes})


def test_stock_engines_and_sglangs_own_adaptive_mode(tmp_path):
    make_drafter(tmp_path / "drafter", make_target(tmp_path / "target"))
    arms = ["stock_off", "stock_3_4_8", "sglang_adaptive"]
    bench = bench_of(
        tmp_path, arms=arms, drafter=str(tmp_path / "drafter"), profile=tmp_path / "traces"
    )
    run(bench)
    for arm, batch_size in itertools.product(arms, (1, 4)):
        (trace,) = (tmp_path / "traces" / f"{arm}_batch_{batch_size}").rglob("*.json.gz")
        names = {
            event["name"]
            for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        }
        assert "aten::linear" in names
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(entry["batch_size"], entry["arm"]) for entry in written] == [
        (batch_size, arm) for batch_size in (1, 4) for arm in arms
    ]
    lengths = {(entry["arm"], entry["batch_size"]): entry["accept_length"] for entry in written}
    for batch_size in (1, 4):
        assert lengths["stock_off", batch_size] == 1
        assert 1 <= lengths["stock_3_4_8", batch_size] <= 4
        assert 1 <= lengths["sglang_adaptive", batch_size] <= 8
    assert lengths["stock_3_4_8", 4] > 1
    assert all(entry["engine"] == "sglang" for entry in written)
    assert all(entry["tokens_per_s"] > 0 and entry["step_ms"] > 0 for entry in written)


def test_acceptance_is_simulated_over_random_weights_of_a_shape(tmp_path):
    """In the mean of many verifications 2.5 tokens, which a random drafter does not reach."""
    make_target(tmp_path / "target", vocab_size=128)  # SGLang then answers with token 100
    (tmp_path / "target" / "model.safetensors").unlink()
    bench = bench_of(
        tmp_path,
        arms=["stock_off", "stock_4_2_8"],
        load_format="dummy",
        simulate_accept_length=2.5,
        sampling=SamplingParams(max_tokens=80, ignore_eos=True),
    )
    off, *_, tree = run(bench)
    assert (off.arm, tree.arm) == ("stock_off", "stock_4_2_8")
    assert off.accept_length == 1
    assert 2.2 < tree.accept_length < 2.8


def test_arms_of_one_engine_that_switches_between_them(tmp_path):
    """Held against plain decoding by stock SGLang, in an engine of its own."""
    make_drafter(tmp_path / "drafter", make_target(tmp_path / "target"))
    arms = ["stock_off", "off", "2_1_3", "3_4_8", "adaptive"]
    run(bench_of(tmp_path, arms=arms, drafter=str(tmp_path / "drafter")))
    written = json.loads((tmp_path / "bench.json").read_text())
    lengths = {(entry["arm"], entry["batch_size"]): entry["accept_length"] for entry in written}
    assert set(lengths) == {(arm, batch_size) for arm in arms for batch_size in (1, 4)}
    for batch_size in (1, 4):
        assert lengths["off", batch_size] == lengths["stock_off", batch_size] == 1
    assert lengths["3_4_8", 4] > 1
    ratios = {(one["arm"], one["batch_size"]): one["ratio_to_off"] for one in written}
    assert ratios["stock_off", 1] == ratios["stock_off", 4] == 1
    assert all(ratio > 0 for ratio in ratios.values())
