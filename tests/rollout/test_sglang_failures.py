"""Real SGLang on the CPU, when something fails in it: what the trainer is told, and how soon."""

import dataclasses
import importlib
import os
import re
import signal
import threading
import time

import pytest

from fastrl.rollout.bandit import InTurns
from fastrl.rollout.sglang_process import EngineError, living_members
from fastrl.types import SamplingParams
from tests.rollout.test_sglang_engine import GREEDY, scheduler_of
from tests.rollout.tiny_models import make_prompts

pytestmark = pytest.mark.sglang

POOL = ("off", "3_1_4")


@pytest.fixture
def switching(start_sglang, target_model):
    """Under FastRL's plugin: each call of `generate` begins with an RPC."""
    engine = start_sglang(selector=InTurns(POOL))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


@pytest.fixture(params=["stock", "plugin"])
def small(request, start_sglang, target_model):
    """Believes that its cache holds more than SGLang's does: no request is refused before."""
    plugin = {"selector": InTurns(("off", "3_4_8"))}
    options = {"strategy": "3_4_8"} if request.param == "stock" else plugin
    engine = start_sglang(server_args={"max_total_tokens": 64}, **options)
    engine.load_policy(target_model.named_parameters(), version=0)
    model = dataclasses.replace(engine._running.model, pool_tokens=10**6)
    engine._running = dataclasses.replace(engine._running, model=model)
    yield engine
    engine.close()


def fails_soon(engine) -> str:
    """What is told, within seconds, of the process that was killed, and that nothing is left."""
    group = engine.process.group
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"died during 'generate'[\s\S]*\.log") as error:
        engine.generate(make_prompts(2), GREEDY)
    assert time.monotonic() - started < 10
    assert living_members(group) == []
    return str(error.value)


def test_a_scheduler_killed_between_two_calls_is_named(switching):
    victim = scheduler_of(switching.process.group)
    switching.generate(make_prompts(2), GREEDY)
    os.kill(victim, signal.SIGKILL)
    time.sleep(2.5)  # SGLang has had time to see it, but sees nothing between calls
    message = fails_soon(switching)
    assert re.search(rf"its process {victim} \(sglang::scheduler\S*\) is gone", message)
    assert "    [" in message  # lines of the log


def test_a_scheduler_killed_while_it_is_asked_is_named(switching):
    victim = scheduler_of(switching.process.group)
    os.kill(victim, signal.SIGSTOP)  # it will not answer
    threading.Timer(1.5, os.kill, (victim, signal.SIGKILL)).start()
    message = fails_soon(switching)
    assert f"its process {victim} (sglang::scheduler" in message


def test_an_sglang_that_leaves_the_plugin_out_does_not_start(start_sglang, monkeypatch):
    """The least demanding engine: a fixed strategy, and no hidden states."""
    monkeypatch.setenv("SGLANG_PLUGINS", "fastrl_sglang_cpu")
    with pytest.raises(EngineError, match=r"does not run in SGLang's scheduler.*SGLANG_PLUGINS"):
        start_sglang(strategy="off")


def test_a_hook_that_sglang_did_not_apply_is_named(start_sglang, monkeypatch):
    target = "sglang.srt.speculative.eagle_utils.eagle_sample"
    monkeypatch.setenv("FASTRL_TEST_LOST_HOOK", target)
    with pytest.raises(EngineError, match=rf"did not apply FastRL's hooks of \['{target}'"):
        start_sglang(strategy="3_4_8")


def test_a_selector_of_an_unknown_class_is_refused_and_the_engine_goes_on(
    switching, tmp_path, monkeypatch
):
    """A module of the trainer's alone stands for the script that is run."""
    (tmp_path / "of_the_trainer.py").write_text(
        "from fastrl.rollout.bandit import InTurns\nclass Mine(InTurns): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("of_the_trainer")
    expected = switching.generate(make_prompts(2), GREEDY)
    group = switching.process.group
    switching.strategy_selector = module.Mine(POOL)
    with pytest.raises(ValueError, match=r"cannot unpickle what 'generate' .*of_the_trainer"):
        switching.generate(make_prompts(2), GREEDY)
    switching.strategy_selector = InTurns(POOL)
    rollouts = switching.generate(make_prompts(2), GREEDY)
    assert [one.tokens for one in rollouts] == [one.tokens for one in expected]
    assert switching.process.group == group


def test_a_request_that_sglang_gives_up_is_named_and_the_engine_goes_on(small, target_model):
    short = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    prompts = make_prompts(4)
    expected = [rollout.tokens for rollout in small.generate(prompts, short)]
    group = small.process.group
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"prompt 1, sample 0: SGLang gave .*Out of memory"):
            small.generate(prompts, GREEDY)
        assert [rollout.tokens for rollout in small.generate(prompts, short)] == expected
    small.load_policy(target_model.named_parameters(), version=1)  # its cache can be emptied
    assert [rollout.tokens for rollout in small.generate(prompts, short)] == expected
    assert small.process.group == group
