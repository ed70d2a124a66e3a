"""Importing does nothing. Counted in modules, not in seconds (those are in docs/LOG.md)."""

import json
import subprocess
import sys

import pytest

import ardor
from ardor.cli.main import VERBS

HEAVY = ("torch", "datasets", "transformers", "tokenizers", "numpy", "jinja2", "huggingface_hub")


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that ran `code`."""
    code = f"import sys\n{code}\nimport json\njson.dump(sorted(sys.modules), sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return modules & set(HEAVY)


def test_import_ardor_loads_nothing_heavy():
    modules = modules_after("import ardor")
    assert not heavy(modules)
    assert {name for name in modules if name.startswith("ardor")} == {"ardor"}


def test_the_probe_sees_a_heavy_import():
    assert heavy(modules_after("import numpy")) == {"numpy"}


def test_help_loads_neither_torch_nor_a_parser():
    modules = modules_after("from ardor.cli.main import main\nassert main(['--help']) == 0")
    assert not heavy(modules)
    assert "cyclopts" not in modules


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_no_torch(verb):
    modules = modules_after(f"from ardor.cli.main import main\nassert main(['{verb}', '-h']) == 0")
    assert not heavy(modules)
    assert "cyclopts" in modules


def test_all_names_every_public_name():
    assert sorted(ardor.__all__) == sorted(ardor.PUBLIC)
    assert set(ardor.__all__) <= set(dir(ardor))


@pytest.mark.parametrize("name", ardor.PUBLIC)
def test_a_public_name_is_what_its_module_defines(name):
    assert getattr(ardor, name) is getattr(sys.modules[ardor.PUBLIC[name]], name)


@pytest.mark.parametrize("first", ["import ardor.load", "from ardor.lm import LM", "pass"])
@pytest.mark.sweep
def test_load_stays_a_function_whatever_was_imported_before(first):
    """Python binds a submodule on its package, and ours has the name of the function."""
    modules_after(f"import ardor\n{first}\nassert type(ardor.load).__name__ == 'function'")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ardor.lode  # noqa: B018
