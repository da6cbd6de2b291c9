"""No function of the package takes more than a screen, and no module more than ten."""

from __future__ import annotations

import ast
from pathlib import Path

import eupe

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LINES_OF_A_FUNCTION, LINES_OF_A_MODULE = 60, 600


def test_functions_and_modules_are_short() -> None:
    long = []
    modules = sorted(Path(eupe.__file__).parent.rglob("*.py"))
    assert len(modules) > 100
    for module in modules:
        text = module.read_text()
        if (lines := len(text.splitlines())) > LINES_OF_A_MODULE:
            long.append(f"{module}: {lines}")
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTION))
        for node in functions:
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > LINES_OF_A_FUNCTION:
                long.append(f"{module}, {node.name}: {lines}")
    assert long == []
