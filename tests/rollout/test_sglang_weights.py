"""Publication to a hand-written fake of the engine's process: SGLang is not needed."""

import pickle
from collections.abc import Callable

import pytest
import torch

from fastrl.rollout.sglang_weights import (
    WeightPublisher,
    check_every_weight_is_reached,
    policy_skeleton,
)


class FakeProcess:
    """Keeps what it is sent; as SGLang does, it ignores names that it does not know."""

    has_ended = False

    def __init__(self, **models: dict[str, torch.Tensor]) -> None:
        self.models = models
        self.requests: list[str] = []
        self.bucket_bytes: list[int] = []

    def send_bucket(
        self, request: str, role: str, next_payloads: Callable, timeout_s: float
    ) -> bool:
        if (payloads := next_payloads()) is None:
            return False
        self.requests.append(request)
        for payload in payloads:
            bucket = pickle.loads(payload)
            self.bucket_bytes.append(sum(tensor.nbytes for _, tensor in bucket))
            model = self.models[role]
            model.update((name, tensor.clone()) for name, tensor in bucket if name in model)
        return True

    def call(self, request: str, timeout_s: float, **arguments: object) -> object:
        self.requests.append(request)
        if request == "checksums":
            return [
                {
                    prefix + name: str(tensor.double().sum())
                    for role, prefix in (("target", ""), ("draft", "draft."))
                    for name, tensor in self.models.get(role, {}).items()
                }
            ]
        return None


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((10, 10), 1.0 + number) for number, name in enumerate(names)}


def publisher(process, role="target", names=("a", "b", "c"), bucket_bytes=2**20, **changes):
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "bucket_mib": 1} | changes
    skeleton = {name: torch.empty(10, 10, device="meta") for name in names}
    result = WeightPublisher(process, role, skeleton, **settings)
    result._bucket_bytes = bucket_bytes
    return result


def test_all_weights_arrive_in_buckets_of_the_size_allowed():
    process = FakeProcess(target=weights("a", "b", "c"))
    given = {name: tensor + 5 for name, tensor in weights("a", "b", "c").items()}
    publisher(process, bucket_bytes=900).publish(given.items())
    assert process.models["target"].keys() == given.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(process.models["target"][name], tensor)
    assert process.bucket_bytes == [800, 400]
    assert process.requests == ["begin_update", "update", "update", "end_update"]


def test_tensors_are_taken_one_by_one_as_buckets_leave():
    process = FakeProcess(target=weights("a", "b", "c"))
    sent_before = []

    def gathered():
        for name, tensor in weights("a", "b", "c").items():
            sent_before.append(len(process.bucket_bytes))
            yield name, tensor

    publisher(process, bucket_bytes=400).publish(gathered())
    assert sent_before == [0, 0, 1]


def test_they_are_cast_to_the_engines_dtype_and_the_trainers_stay_where_they_are():
    process = FakeProcess(target=weights("a"))
    given = {"a": torch.rand(10, 10)}
    publisher(process, names=("a",), dtype=torch.bfloat16).publish(given.items())
    assert process.models["target"]["a"].dtype == torch.bfloat16
    publisher(process, names=("a",)).publish(given.items())
    torch.testing.assert_close(process.models["target"]["a"], given["a"])
    assert not given["a"].is_shared()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": (10, 10), "b": (10, 10)}, r"missing \['c'\], unknown \[\], misshapen \[\]"),
        ({"a": (10, 10), "B": (10, 10), "c": (10, 10)}, r"missing \['b'\], unknown \['B'\]"),
        ({"a": (10, 10), "b": (5, 10), "c": (10, 10)}, r"misshapen \['b \(5, 10\) instead of"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_sent(given, message):
    process = FakeProcess(target=weights("a", "b", "c"))
    tensors = {name: torch.zeros(shape) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        publisher(process).publish(tensors.items())
    assert process.requests == ["begin_update", "end_update"]


def test_after_a_misfit_every_tensor_is_still_asked_for():
    """Ranks that gather shards must all do so, or those that go on wait for ever."""
    asked = []

    def gathered():
        for name, tensor in weights("x", "a", "b", "c").items():
            asked.append(name)
            yield name, tensor

    process = FakeProcess(target=weights("a", "b", "c"))
    with pytest.raises(ValueError, match=r"unknown \['x'\]"):
        publisher(process, bucket_bytes=400).publish(gathered())
    assert asked == ["x", "a", "b", "c"]
    assert process.bucket_bytes == []


def test_weights_that_no_name_reaches_are_found():
    process = FakeProcess(target=weights("a", "b", "c", "internal"))
    with pytest.raises(ValueError, match=r"model: \['internal'\]"):
        check_every_weight_is_reached(process, publisher(process), None)


def test_drafter_weights_that_no_name_reaches_are_found():
    process = FakeProcess(target=weights("a"), draft=weights("d", "internal"))
    with pytest.raises(ValueError, match=r"model: \['draft.internal'\]"):
        check_every_weight_is_reached(
            process,
            publisher(process, names=("a",)),
            publisher(process, role="draft", names=("d",)),
        )


def test_a_drafter_with_an_embedding_of_its_own_is_found():
    process = FakeProcess(
        target=weights("a"), draft=weights("d") | {"model.embed_tokens.weight": torch.zeros(3)}
    )
    with pytest.raises(ValueError, match=r"\['draft.model.embed_tokens.weight'\]"):
        check_every_weight_is_reached(
            process,
            publisher(process, names=("a",)),
            publisher(process, role="draft", names=("d",)),
        )


def test_models_whose_weights_are_all_reached_pass():
    process = FakeProcess(target=weights("a"), draft=weights("d"))
    check_every_weight_is_reached(
        process,
        publisher(process, names=("a",)),
        publisher(process, role="draft", names=("d",)),
    )
    assert process.requests.count("checksums") == 3


def test_the_skeleton_has_the_names_of_what_a_policy_publishes(target_model):
    skeleton = policy_skeleton(target_model.config)
    published = dict(target_model.named_parameters())
    assert {name: tensor.shape for name, tensor in skeleton.items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    assert all(tensor.is_meta for tensor in skeleton.values())
