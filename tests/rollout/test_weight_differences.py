"""Differences counted in chunks and parts, against a plain comparison of whole tensors."""

import pytest
import torch

from fastrl.rollout import weight_differences
from fastrl.rollout.weight_differences import Comparison, WeightDifference, added, described


def differences(served: dict[str, torch.Tensor], published: dict[str, torch.Tensor]):
    comparison = Comparison()
    for name, tensor in published.items():
        comparison.expect(name)
        if name in served:
            comparison.compare(name, served[name], tensor)
    return comparison.differences()


@pytest.mark.parametrize("chunk_numbers", [1, 7, 2**24])
def test_counts_are_those_of_whole_tensors(monkeypatch, chunk_numbers):
    monkeypatch.setattr(weight_differences, "_CHUNK_NUMBERS", chunk_numbers)
    generator = torch.Generator().manual_seed(0)
    published = {
        "matrix": torch.rand(9, 5, generator=generator),
        "vector": torch.rand(11, generator=generator),
        "scalar": torch.rand((), generator=generator),
        "same": torch.rand(4, 3, generator=generator),
    }
    served = {name: tensor.clone() for name, tensor in published.items()}
    for name in ("matrix", "vector", "scalar"):
        changed = torch.rand(served[name].shape, generator=generator) < 0.5
        changed.view(-1)[0] = True
        served[name][changed] += 1
    expected = {
        name: int((served[name] != published[name]).sum())
        for name in ("matrix", "vector", "scalar")
    }
    found = differences(served, published)
    assert {one.name: one.num_different for one in found} == expected
    assert {one.name: one.num_compared for one in found} == {
        "matrix": 45,
        "vector": 11,
        "scalar": 1,
    }


def test_each_kind_of_failure_is_called_by_its_name():
    published = {name: torch.ones(2, 3) for name in ("stale", "zeroed", "lost")}
    published["zero"] = torch.zeros(3)
    served = {"stale": torch.ones(2, 3), "zeroed": torch.zeros(2, 3), "zero": torch.zeros(3)}
    served["stale"][1, 2] = 2
    assert described(differences(served, published)) == (
        "lost: no weight of the engine's model takes this name; "
        "stale: 1 of 6 numbers differ; zeroed: all zero"
    )


def test_numbers_that_are_none_differ_from_themselves():
    broken = torch.tensor([1.0, torch.nan])
    (found,) = differences({"a": broken.clone()}, {"a": broken})
    assert found.num_different == 1


def test_they_are_compared_in_the_dtype_that_is_served():
    published = torch.tensor([1.0, 1.0 + 2**-20])
    assert differences({"a": published.bfloat16()}, {"a": published}) == []


def test_parts_of_a_weight_count_as_one():
    published = torch.arange(12.0).view(4, 3)
    comparison = Comparison()
    comparison.compare("a", torch.zeros(2, 3), published[:2])
    comparison.compare("a", published[2:].clone(), published[2:])
    (found,) = comparison.differences()
    assert (found.num_compared, found.num_different, found.num_nonzero) == (12, 5, 6)


def test_devices_add_up():
    def one(name, **counts):
        return WeightDifference(name=name, **counts)

    first = [one("a", num_compared=4, num_different=4, num_nonzero=0)]
    second = [
        one("a", num_compared=4, num_different=1, num_nonzero=3),
        one("b", num_compared=2, num_different=2, num_nonzero=0),
    ]
    found = added([first, second])
    assert described(found) == "a: 5 of 8 numbers differ; b: all zero"


def test_of_many_differences_the_first_are_named():
    published = {f"w{number:02}": torch.ones(1) for number in range(13)}
    text = described(differences({}, published))
    assert text.count("takes this name") == 10
    assert text.endswith("w09: no weight of the engine's model takes this name; and 3 more")


def test_parts_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"a: the engine serves a part of shape \(2, 3\)"):
        Comparison().compare("a", torch.zeros(2, 3), torch.zeros(3, 2))
