"""Package metadata; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="fastrl",
    version="0.1.0",
    packages=find_packages(include=["fastrl", "fastrl.*"]),
    python_requires=">=3.11",
    install_requires=["torch>=2.11,<2.14", "lightning>=2.6.4"],
)
