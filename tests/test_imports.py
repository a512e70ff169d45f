"""Imports point one way: docs/architecture.md, "Imports"."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastrl"
APART = ("modules", "callbacks", "datamodules")
"""Folders of which none imports another."""


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", [*APART, "rollout"])
def test_a_folder_imports_none_that_is_beside_or_above_it(folder):
    forbidden = {f"fastrl.{other}" for other in (*APART, "cli") if other != folder}
    if folder == "rollout":
        forbidden |= {"lightning", "pytorch_lightning"}
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = {
            name
            for name in imported(path)
            if any(name == one or name.startswith(f"{one}.") for one in forbidden)
        }
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"
