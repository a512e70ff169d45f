"""Timing publications to real SGLang on the CPU, in miniature."""

import importlib.util

import pytest
from bench_publication import Bench, run

from tests.rollout.tiny_models import make_target
from tests.scripts.test_bench_sd_sglang import ON_CPU
from tests.sglang_cpu import environment

pytestmark = pytest.mark.sglang


def test_both_publications_are_timed(tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    model = make_target(tmp_path / "target")
    publications = run(
        Bench(
            model=str(tmp_path / "target"), rounds=2, dtype="float32", device="cpu", sglang=ON_CPU
        )
    )
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert publications["policy, float32"].gigabytes == pytest.approx(num_weights * 4 / 1e9)
    assert (
        0 < publications["drafter, bfloat16"].gigabytes < publications["policy, float32"].gigabytes
    )
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in publications.values())
    printed = capsys.readouterr().out
    assert "policy, bfloat16: " in printed
    assert "GB/s" in printed
