"""One tiny target and drafter for all rollout tests; engines over them."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.rollout.torch_engine import TorchEngine
from tests.rollout.sglang_options import sglang_options
from tests.rollout.tiny_models import make_drafter, make_target
from tests.sglang_cpu import environment


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoint folders of a target and its random drafter."""
    root = tmp_path_factory.mktemp("tiny")
    target = make_target(root / "target")
    make_drafter(root / "drafter", target)
    return root / "target", root / "drafter"


@pytest.fixture(scope="session")
def target_model(folders):
    """The target as transformers runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders[0], attn_implementation="eager").eval()


@pytest.fixture
def engine(folders, target_model):
    """A started engine with weights and a drafter, of 6 rows."""
    engine = TorchEngine(drafter_path=str(folders[1]), max_batch_size=6, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def start_sglang(folders) -> Iterator[Callable[..., SGLangEngine]]:
    """Starts SGLang over the tiny target (or `model_path`), on the CPU, in float32; ended with the
    session if not before. Options are the engine's."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as engines:
        for name, value in environment().items():
            patch.setenv(name, value)

        def start(
            model_path: str = str(folders[0]),
            selector: StrategySelector | None = None,
            **options: object,
        ) -> SGLangEngine:
            engine = SGLangEngine(**sglang_options(str(folders[1]), **options))
            engines.callback(engine.close)
            if selector is not None:
                engine.strategy_selector = selector
            engine.start(model_path)
            return engine

        yield start


@pytest.fixture(scope="session")
def sglang_by_strategy(start_sglang) -> Callable[[str], SGLangEngine]:
    """Engines that tests share, by strategy; one that a test has ended is started anew."""
    engines: dict[str, SGLangEngine] = {}

    def shared(strategy: str) -> SGLangEngine:
        if strategy not in engines or engines[strategy].process is None:
            engines[strategy] = start_sglang(strategy=strategy, hidden_states=True)
        return engines[strategy]

    return shared


@pytest.fixture
def sglang_engine(sglang_by_strategy, target_model) -> SGLangEngine:
    """SGLang, speculating with the tiny drafter, with weights of version 0."""
    engine = sglang_by_strategy("3_4_8")
    engine.load_policy(target_model.named_parameters(), version=0)
    return engine
