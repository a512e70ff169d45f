"""Lets torchvision's wheel, which is built for CUDA, be imported beside a torch that is not.

It registers Python parts of two operators whose definitions its own library would bring.
"""

import importlib.abc
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DefineBeforeTorchvision(importlib.abc.MetaPathFinder):
    def __init__(self):
        self._library = None  # the definitions live as long as it does

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self._library is None:
            import torch

            self._library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                self._library.define(operator)
        return None  # the next finder finds the package


sys.meta_path.insert(0, _DefineBeforeTorchvision())
