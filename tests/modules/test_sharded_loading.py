"""Models loaded as shards, on two real processes: every weight, under its own name."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.modules import GRPO
from fastrl.modules.loading import load_causal_lm
from fastrl.modules.sharded_loading import data_parallel_mesh, load_policy
from fastrl.modules.sharding_settings import ShardingSettings
from tests.rollout.ranks import raised, run_ranks

ALL = ShardingSettings(activation_checkpointing=True, cpu_offload=True, reduce_dtype="bfloat16")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,  # no rank's share is whole rows of the other's
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def mesh_of(data_parallel: int, tensor_parallel: int) -> Any:
    names = ("data_parallel", "tensor_parallel")
    return init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=names)


def load(path: str, precision: str, is_frozen: bool, settings: ShardingSettings) -> dict[str, Any]:
    logging.disable()
    mesh = data_parallel_mesh(mesh_of(dist.get_world_size(), 1))
    if dist.get_rank() > 0:  # it is not to read weights
        path = shutil.copytree(path, f"{path}{dist.get_rank()}")
        (Path(path) / "model.safetensors").unlink()
    model = load_policy(path, mesh, settings, precision, is_frozen=is_frozen)
    return {
        "weights": {name: one.full_tensor() for name, one in model.named_parameters()},
        "num_numbers": sum(one.to_local().numel() for one in model.parameters()),
        "needs_gradients": {one.requires_grad for one in model.parameters()},
        "buffers": dict(model.named_buffers()),
        "state_keys": set(model.state_dict()),
        "is_tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "is_training": model.training,
    }


@pytest.mark.parametrize(
    ("precision", "is_frozen", "settings"),
    [
        ("32-true", False, ShardingSettings()),
        ("bf16-mixed", False, ALL),
        ("bf16-mixed", True, ALL),
    ],
    ids=["float32", "bfloat16, all options", "reference"],
)
def test_ranks_have_shards_of_what_the_first_has_read(
    tmp_path: Path, folder: str, precision: str, is_frozen: bool, settings: ShardingSettings
) -> None:
    whole = load_causal_lm(folder)
    ranks = run_ranks(load, tmp_path / "ranks", folder, precision, is_frozen, settings)
    is_rounded = precision == "bf16-mixed" and is_frozen
    for rank in ranks:
        assert rank["weights"].keys() == dict(whole.named_parameters()).keys()
        assert rank["state_keys"] == set(whole.state_dict())
        assert rank["is_tied"] is whole.config.tie_word_embeddings
        assert rank["needs_gradients"] == {not is_frozen}
        assert rank["is_training"] is not is_frozen
        for name, tensor in whole.named_parameters():
            expected = tensor.detach().to(torch.bfloat16) if is_rounded else tensor.detach()
            assert torch.equal(rank["weights"][name], expected), name
            assert rank["weights"][name].dtype == expected.dtype
        assert rank["buffers"].keys() == dict(whole.named_buffers()).keys() != set()
        for name, buffer in whole.named_buffers():
            assert torch.equal(rank["buffers"][name], buffer), name
    num_numbers = [rank["num_numbers"] for rank in ranks]
    assert sum(num_numbers) == sum(one.numel() for one in whole.parameters())
    assert max(num_numbers) < 0.55 * sum(num_numbers)


def published_after_a_forward(path: str) -> tuple[bool, bool]:
    """Whether weights are whole after a forward that gathers them, and once they are published."""
    module = GRPO(path, sharding=ShardingSettings(reshard_after_forward=False))
    mesh = data_parallel_mesh(mesh_of(2, 1))
    module.policy = load_policy(path, mesh, module.sharding, "32-true")
    with torch.no_grad():
        module.policy(torch.tensor([[1, 2, 3]]))
    are_whole = not any(isinstance(one, DTensor) for one in module.policy.parameters())
    return are_whole, not all(isinstance(one, DTensor) for _, one in module.policy_tensors())


def test_shards_are_published_whatever_forward_was_before(
    tmp_path: Path, model_folder: str
) -> None:
    ranks = run_ranks(published_after_a_forward, tmp_path, model_folder)
    assert ranks == [(True, False)] * 2


def refusals(path: str) -> dict[str, tuple[str, str]]:
    mesh = data_parallel_mesh(mesh_of(2, 1))
    plain = ShardingSettings()
    return {
        "tensor parallel": raised(lambda: data_parallel_mesh(mesh_of(1, 2))),
        "precision": raised(lambda: load_policy(path, mesh, plain, "bf16-true")),
        "missing": raised(lambda: load_policy(f"{path}/none", mesh, plain, "32-true")),
    }


def test_what_cannot_be_sharded_is_refused_on_all_ranks(tmp_path: Path, model_folder: str) -> None:
    for rank in run_ranks(refusals, tmp_path, model_folder):
        kind, message = rank["tensor parallel"]
        assert kind == "ValueError"
        assert "set data_parallel_size to the number of all GPUs" in message
        kind, message = rank["precision"]
        assert kind == "ValueError"
        assert "bf16-true: a policy is sharded with float32 weights" in message
        assert rank["missing"][0] == "FileNotFoundError"


def test_options_without_effect_are_refused(model_folder: str) -> None:
    with pytest.raises(ValueError, match=r"cpu_offload True, reduce_dtype bfloat16 has no effect"):
        load_policy(model_folder, None, ALL, None)
    recomputed = ShardingSettings(activation_checkpointing=True)
    model = load_policy(model_folder, None, recomputed, None)
    assert model.is_gradient_checkpointing
    assert not any(isinstance(one, DTensor) for one in model.parameters())
