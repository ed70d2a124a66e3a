"""DESIGN principle 16: a budget keeps it small."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "ardor"

FILE, FUNCTION = 600, 60  # lines
TIGHTER = {"arch/decoder.py": 500}
FAMILY = 150
SHARED_BY_FAMILIES = {"__init__", "blocks", "family", "hf_config", "names", "rope", "rules"}
SHARED_BY_FAMILIES |= {"contradictions", "spec_data"}


def over_budget(source: str, path: str) -> list[str]:
    """What in `source`, the file `path` of the package, is longer than it may be."""
    wrong = []
    lines, most = len(source.splitlines()), allowance(path)
    if lines > most:
        wrong.append(f"{path}: {lines} lines, at most {most}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION:
                wrong.append(
                    f"{path}:{node.lineno}: {node.name}() has {length} lines of {FUNCTION}"
                )
    return wrong


def allowance(path: str) -> int:
    parent, _, name = path.rpartition("/")
    if parent == "families" and name.removesuffix(".py") not in SHARED_BY_FAMILIES:
        return FAMILY
    return TIGHTER.get(path, FILE)


def test_no_file_and_no_function_outgrows_its_budget():
    files = sorted(ROOT.rglob("*.py"))
    assert files
    wrong = [
        line
        for path in files
        for line in over_budget(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    assert not wrong, "\n".join(wrong)


def test_one_line_more_than_the_budget_is_caught():
    for path, most in [("load.py", 600), ("arch/decoder.py", 500), ("families/new.py", 150)]:
        assert not over_budget("x = 1\n" * most, path)
        assert over_budget("x = 1\n" * (most + 1), path)
    body = "def f():\n" + "    x = 1\n" * 59
    assert not over_budget(body, "load.py")
    assert over_budget(body + "    x = 1\n", "load.py")
    assert over_budget(
        "class C:\n    async " + body.replace("\n", "\n    ") + "    x = 1", "load.py"
    )
