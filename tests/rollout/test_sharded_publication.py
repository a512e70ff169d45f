"""Policies sharded over two real processes, published whole: the same weights, the same tokens.

Memory is counted as storages alive at once, seen by a dispatch mode: what is gathered must not
outlive its bucket.
"""

import pickle
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sglang_process import EngineError
from fastrl.rollout.sglang_weights import WeightPublisher, check_ranks_agree, policy_skeleton
from fastrl.rollout.sharded_weights import whole
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams
from tests.rollout.ranks import raised, run_ranks
from tests.rollout.tiny_models import make_prompts, make_target

SAMPLING = SamplingParams(max_tokens=12)
BUCKET_BYTES = 20_000  # of 115 kB in float32 that the policy has
GRACE_S = 0.1
"""What gloo's threads get to let go of what they have sent, on a machine that is busy."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive: now, and at most.

    A storage is counted once, whatever views it has; a tensor in a kernel's own layout has none and
    counts for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_key(one) for one in tree_leaves((args, kwargs)) if _is_plain(one)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if _is_plain(one) and (key := _key(one)) not in given | self._known:
                self._known.add(key)
                size = one.nbytes if one.is_mkldnn else _storage(one).nbytes()
                self.now += size
                weakref.finalize(one if one.is_mkldnn else _storage(one), self._forget, key, size)
                self.peak = max(self.peak, self.settled(self.peak))
        return result

    def settled(self, few: int = 0) -> int:
        """Bytes alive, once they are as few or nobody lets go of any more: gloo's threads hold what
        they have sent until they run again, which is theirs to decide and not ours."""
        deadline = time.monotonic() + GRACE_S
        while self.now > few and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.now

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_plain(value: object) -> bool:
    """Whether it holds memory: wrappers (DTensors, results of collectives) and metas have none."""
    is_tensor = isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
    return is_tensor and not value.is_meta


def _key(tensor: torch.Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else _storage(tensor)._cdata


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def test_live_bytes_are_counted_once_and_forgotten() -> None:
    with LiveBytes() as memory:
        first = torch.ones(100)
        view = first.view(10, 10)
        assert memory.now == 400
        second = first + 1
        assert memory.now == 800
        del first, second
        assert memory.now == 400
        del view
        assert (memory.now, memory.peak) == (0, 800)


def sharded(folder: str, how: str) -> PreTrainedModel:
    """The target's weights, over both ranks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if how == "tensor parallel":
        columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
        rows = {"o_proj": RowwiseParallel()}
        plan = {f"self_attn.{name}": style for name, style in (columns | rows).items()}
        plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        for layer in model.model.layers:
            parallelize_module(
                layer, init_device_mesh("cpu", (2,)), plan | {"mlp.down_proj": RowwiseParallel()}
            )
    return model


def sharded_names(model: PreTrainedModel) -> set[str]:
    return {name for name, one in model.named_parameters() if isinstance(one, DTensor)}


def change(model: PreTrainedModel) -> None:
    """As an optimizer step does, in place and on each shard alone."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.mul_(0.9)


# -- the embedded engine --------------------------------------------------------------------------


def serve(folder: str, how: str, dtype: str) -> dict[str, object]:
    """Weights and tokens of two publications, the first in inference mode as a validation's is."""
    policy = sharded(folder, how)
    engine = TorchEngine(dtype=dtype, device="cpu")
    engine.start(folder)
    result: dict[str, object] = {"sharded": sharded_names(policy), "tokens": [], "weights": []}
    memory = LiveBytes()  # over both: what the second replaces is given back
    for version in range(2):
        held = memory.peak = memory.settled()
        with torch.inference_mode(version == 0), memory:
            engine.load_policy(policy.named_parameters(), version)
        result["peak"] = memory.peak - held
        rollouts = engine.generate(make_prompts(3), SAMPLING, num_samples=2, seed=3)
        result["tokens"].append([rollout.tokens for rollout in rollouts])
        target = engine._loaded.target
        laid_out = {name: layer.weight_OI for name, layer in target._served.items()}
        served = dict(target._model.named_parameters()) | laid_out
        result["weights"].append({name: one.detach().clone() for name, one in served.items()})
        result["same"] = engine.compare_policy(policy.named_parameters())
        change(policy)
    result["changed"] = {one.name for one in engine.compare_policy(policy.named_parameters())}
    result["num_bytes"] = sum(one.nbytes for one in served.values())
    result["largest"] = max(one.nbytes for one in served.values())
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target")
    make_target(path, num_hidden_layers=3)
    return str(path)


@pytest.mark.parametrize("how", ["fsdp2", "tensor parallel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_policy_is_served_as_a_whole_one(
    folder: str, tmp_path: Path, how: str, dtype: str
) -> None:
    expected = serve(folder, "whole", dtype)
    assert expected["sharded"] == set()
    for rank in run_ranks(serve, tmp_path, folder, how, dtype):
        assert len(rank["sharded"]) > 20
        assert rank["tokens"] == expected["tokens"]
        assert rank["tokens"][0] != rank["tokens"][1]
        assert rank["same"] == []
        assert rank["changed"] >= rank["sharded"]  # others are shared where they are float32
        for served, wanted in zip(rank["weights"], expected["weights"], strict=True):
            assert served.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(served[name], tensor), name
        # One tensor and its shard cast, and in bfloat16 its layout beside the one before; gloo may
        # not have let go of the last ones. No whole copy.
        num_whole = 4 if dtype == "bfloat16" else 3
        assert rank["largest"] <= rank["peak"] <= num_whole * rank["largest"]
        assert rank["peak"] < rank["num_bytes"] / (3 if dtype == "bfloat16" else 4)


# -- what is handed to SGLang ---------------------------------------------------------------------


class Reader:
    """Stands for SGLang's process: reads each bucket, outside of what is counted."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.has_ended = False
        self.fail_at = fail_at
        self.weights: dict[str, torch.Tensor] = {}
        self.bucket_bytes: list[int] = []

    def call(self, request: str, timeout_s: float, **arguments: object) -> None: ...

    def send_bucket(self, request, role, next_payloads, timeout_s) -> bool:
        if len(self.bucket_bytes) == self.fail_at:
            self.has_ended = True
            raise EngineError("it died")
        if (payloads := next_payloads()) is None:
            return False
        with _disable_current_modes():
            (payload,) = payloads
            bucket = pickle.loads(payload)
            self.bucket_bytes.append(sum(tensor.nbytes for _, tensor in bucket))
            self.weights |= {name: tensor.clone() for name, tensor in bucket}
        return True


def publish(folder: str, dtype: torch.dtype, dies_on_rank: int | None = None) -> dict[str, object]:
    policy = sharded(folder, "fsdp2")
    reader = Reader(fail_at=1 if dies_on_rank == dist.get_rank() else None)
    skeleton = policy_skeleton(policy.config)
    publisher = WeightPublisher(
        reader, "target", skeleton, dtype=dtype, device=torch.device("cpu"), bucket_mib=1
    )
    publisher._bucket_bytes = BUCKET_BYTES
    error = None
    with LiveBytes() as memory:
        try:
            publisher.publish(policy.named_parameters())
        except EngineError as raised_error:
            error = str(raised_error)
    return {
        "weights": reader.weights,
        "buckets": reader.bucket_bytes,
        "peak": memory.peak,
        "left": memory.settled(),
        "error": error,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_policy_is_sent_bucket_by_bucket(folder: str, tmp_path: Path, dtype) -> None:
    policy = sharded(folder, "whole")
    expected = {name: one.detach().to(dtype) for name, one in policy.named_parameters()}
    num_bytes = sum(one.nbytes for one in expected.values())
    largest = max(one.nbytes for one in expected.values())
    for rank in run_ranks(publish, tmp_path, folder, dtype):
        assert rank["weights"].keys() == expected.keys()  # the tied head is none of them
        for name, tensor in expected.items():
            assert torch.equal(rank["weights"][name], tensor), name
        assert sum(rank["buckets"]) == num_bytes
        assert max(rank["buckets"]) <= BUCKET_BYTES
        assert len(rank["buckets"]) > 2
        # A bucket, and what gathering its last tensor takes.
        assert max(rank["buckets"]) <= rank["peak"] <= BUCKET_BYTES + 2 * largest < num_bytes
        assert rank["left"] == 0


def test_where_one_engine_dies_the_others_publication_goes_on(folder: str, tmp_path: Path) -> None:
    """All ranks gather, each for its own engine: who stops would have the others wait."""
    first, second = run_ranks(publish, tmp_path, folder, torch.float32, 0)
    assert first["error"] == "it died"
    assert len(first["buckets"]) == 1
    assert second["error"] is None
    assert second["weights"].keys() == policy_skeleton(sharded(folder, "whole").config).keys()


def compare_drafters() -> list[tuple[str, str] | None]:
    group = EngineGroup.join(2, timeout_s=60)
    same = {"a": torch.ones(4, 4), "b": torch.arange(6.0).bfloat16()}
    other = same | {"b": same["b"] + 0.25 * group.place}
    check_ranks_agree(group, list(same.items()))
    return raised(lambda: check_ranks_agree(group, list(other.items())))


def test_ranks_with_different_drafters_are_refused(tmp_path: Path) -> None:
    for kind, message in run_ranks(compare_drafters, tmp_path):
        assert kind == "ValueError"
        assert "['b'] are not the same on all 2" in message


def gather_uneven() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(15.0).view(5, 3)  # 3 rows on one rank, 2 on the other
    dtype, device = torch.float32, torch.device("cpu")
    return [
        whole(distribute_tensor(full, mesh, [placement]), dtype=dtype, device=device)
        for placement in (Shard(0), Shard(1), Replicate())
    ]


def test_uneven_shards_are_put_together_in_order(tmp_path: Path) -> None:
    for tensors in run_ranks(gather_uneven, tmp_path):
        for tensor in tensors:
            assert torch.equal(tensor, torch.arange(15.0).view(5, 3))
