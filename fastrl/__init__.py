"""FastRL: reinforcement learning of reasoning LLMs, fast, by lossless speculative rollouts."""

from importlib.metadata import version

__version__ = version("fastrl")
