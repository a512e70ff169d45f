"""One tiny target and drafter for all rollout tests; engines over them."""

from pathlib import Path

import pytest
import torch

from fastrl.rollout.torch_engine import TorchEngine
from tests.rollout.tiny_models import make_drafter, make_target


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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
