"""The layers of the package (docs/method.md): what a module may import, by itself or through others."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "glmamba_monai"


def imports(file):
    """Dotted names of all that a file imports, within functions, too; no import of the package is relative."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def parts():
    """``{module or folder of the package: dotted names of what it imports}``."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), set()).update(imports(file))
    return found


def reached(part):
    """The parts of the package that one needs, itself among them."""
    known, needed, new = parts(), set(), {part}
    while new:
        needed |= new
        names = {name.split(".")[1] for p in new for name in known[p] if name.startswith("glmamba_monai.")}
        new = (names & known.keys()) - needed
    return needed


@pytest.mark.parametrize(
    "part, above",
    [
        ("ops", {"networks", "transforms", "data", "engines", "bundle", "experiments"}),
        ("networks", {"transforms", "data", "engines", "bundle", "experiments"}),
        ("transforms", {"ops", "networks", "data", "engines", "bundle", "experiments"}),
        ("data", {"ops", "networks", "engines", "bundle", "experiments"}),
        ("engines", {"bundle", "experiments"}),
        ("bundle", {"experiments"}),
        ("experiments", set()),
    ],
)
def test_a_layer_needs_none_above_it(part, above):
    programs = {"inference", "label_app", "label_server", "onnx_export", "report", "__main__"}
    assert not reached(part) & (above | programs)


@pytest.mark.parametrize("part", ["files", "losses", "metrics", "dice", "errors"])
def test_a_part_that_stands_alone(part):
    assert reached(part) == {part}


def test_engines_open_no_configs():
    for part in reached("engines"):
        assert not [name for name in parts()[part] if name.startswith("monai.bundle")], part
