"""Satisfies `import triton` and what stands at the top of modules; runs no kernel.

The real package is a gigabyte. A kernel that is launched all the same fails: it is a plain Python
function here, which cannot be subscripted with a grid.
"""

import importlib

import import_only

__version__ = "3.5.0"

import_only.any_submodule_of("triton")
jit = autotune = heuristics = import_only.decorator
Config = import_only.Anything


def cdiv(numerator, denominator):
    return -(numerator // -denominator)


def next_power_of_2(number):
    return 1 << (number - 1).bit_length()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[:1].isupper():
        return import_only.Anything
    return importlib.import_module(f"triton.{name}")
