"""DESIGN section 2, "Who may import whom", as a dict that is enforced, lazy imports included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ardor"

LAYER_0 = ("errors", "precision")
LAYER_1 = ("arch", "loss", "kernels", "files", "text")
LAYER_2 = ("families", "quant", "adapters", "parallel", "memory")
LAYER_3 = ("bridge", "place", "packing", "form", "load", "save", "data", "outline")
LAYER_3 += ("vocabulary", "chat_format")
LAYER_4 = ("generate", "score", "train", "doctor", "inspect")
LAYER_5 = ("serve", "lm", "quantize", "merge", "quickstart", "plan", "preview", "tuning")
BELOW_3 = LAYER_0 + LAYER_1 + LAYER_2
BELOW_4 = BELOW_3 + LAYER_3
BELOW_5 = BELOW_4 + LAYER_4

# Unit -> what it may import of ours beside itself. A dotted name allows that module only.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "precision": ("errors",),
    "arch": (*LAYER_0, "kernels"),
    "loss": (*LAYER_0, "kernels"),
    "kernels": LAYER_0,
    "files": LAYER_0,
    "text": (*LAYER_0, "files"),
    "families": (*LAYER_0, "arch.spec"),
    "quant": (*LAYER_0, "arch.linear", "kernels"),
    "adapters": (*LAYER_0, "arch.linear", "arch.experts", "kernels", "files"),
    "parallel": (*LAYER_0, "arch.linear", "kernels"),
    # Not layer 4: a decoder's size is asked for before it is loaded, and by whoever trains it.
    "memory": ("errors", "arch.spec"),
    "bridge": BELOW_3,
    "place": BELOW_3,
    "packing": BELOW_3,
    "form": (*BELOW_3, "packing"),
    "load": (*BELOW_3, "bridge", "form", "packing", "place"),
    # The Model that load assembled is what these change, and what save takes apart.
    "vocabulary": (*BELOW_3, "form", "load"),
    "chat_format": (*BELOW_3, "load", "vocabulary"),
    "save": (*BELOW_3, "form", "load", "packing", "vocabulary"),
    "data": BELOW_3,
    "outline": BELOW_3,
    "generate": BELOW_4,
    "score": BELOW_4,
    # To evaluate, and to look at model and data before a step is taken.
    "train": (*BELOW_4, "generate", "score", "doctor"),
    "doctor": (*BELOW_4, "generate"),  # to see whether a model stops
    "inspect": BELOW_4,
    "serve": tuple(unit for unit in BELOW_5 if unit != "train"),
    "lm": tuple(unit for unit in BELOW_5 if unit != "train"),
    "quantize": tuple(unit for unit in BELOW_5 if unit != "train"),
    "merge": (*(unit for unit in BELOW_5 if unit != "train"), "quantize"),
    "quickstart": (*BELOW_5, "lm"),
    "tuning": (*BELOW_5, "lm"),
    "plan": BELOW_5,  # presets are train's
    "preview": BELOW_5,  # it shows what train would be given
    "cli": (*BELOW_5, *LAYER_5, "__init__"),
    "__init__": (*BELOW_5, *LAYER_5),
    "__main__": ("cli",),
}

# Unit -> what it must not import of others.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "errors": ("torch", "numpy"),
    "arch": ("torch.distributed",),
    "loss": ("torch.distributed",),
    "kernels": ("torch.distributed",),
    "files": ("transformers",),
    "text": ("torch",),
    "families": ("torch.nn", "torch.distributed"),
}
PEERS = ("transformers", "peft", "trl", "accelerate", "bitsandbytes")  # for tests only, but:
BRIDGED = {"bridge": ("transformers",)}  # runs what we do not implement


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, a module of `package`, at any depth.

    `from a import b` counts as `a.b`, which is right for modules and harmless for names.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = [*up, node.module] if node.level else [node.module or ""]
            base = ".".join(part for part in start if part)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, path: Path) -> list[str]:
    """What `path` (relative to the package) imports against the table."""
    package = ".".join(["ardor", *path.parts[:-1]])
    unit = path.parts[0].removesuffix(".py")
    if unit not in ALLOWED:
        return [f"{path}: {unit!r} has no row in the table; give it a layer"]
    allowed = (unit, *ALLOWED[unit])
    wrong = []
    for line, name in imports(source, package):
        if name == "ardor.__version__":
            continue  # a value that any record may carry
        if _within(name, "ardor"):
            ours = name.removeprefix("ardor").lstrip(".") or "__init__"
            first = ours.split(".")[0]
            ours = ours if first in ALLOWED else "__init__"  # a public name, such as LM
            if not any(_within(ours, one) for one in allowed):
                wrong.append(f"{path}:{line}: {unit} must not import {name}")
        elif any(_within(name, one) for one in (*FORBIDDEN.get(unit, ()), *PEERS)) and not any(
            _within(name, one) for one in BRIDGED.get(unit, ())
        ):
            wrong.append(f"{path}:{line}: {unit} must not import {name}")
    return wrong


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def test_every_module_keeps_to_its_layer():
    files = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
    assert files
    wrong = [line for path in files for line in violations((ROOT / path).read_text(), path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("arch/norm.py", "import ardor.files.weights"),
        ("arch/norm.py", "from torch.distributed import all_reduce"),
        ("arch/norm.py", "def late():\n    from ardor.families import llama"),  # lazily too
        ("arch/deep/norm.py", "from ...files import weights"),
        ("families/llama.py", "from ardor.arch.decoder import Decoder"),
        ("families/llama.py", "from ardor.arch import decoder"),
        ("families/llama.py", "from torch import nn"),
        ("quant/bnb4.py", "from ardor.adapters.lora import add_lora"),
        ("text/stops.py", "import torch"),
        ("train/trainer.py", "from ardor.cli.console import Progress"),
        ("serve/engine.py", "from ardor.train import trainer"),
        ("load.py", "import transformers.models"),
        ("bridge/foreign.py", "import peft"),
        ("bridge/foreign.py", "from ardor import load"),
        ("load.py", "from ardor import lm"),
        ("load.py", "import ardor"),
        ("load.py", "from ardor import LM"),
        ("novelty/file.py", ""),
    ],
)
def test_a_forbidden_import_is_caught(path, source):
    assert violations(source, Path(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("arch/norm.py", "import torch\nfrom ardor.errors import ShapeError"),
        ("arch/norm.py", "from .linear import Linear"),
        ("families/llama.py", "from ardor.arch import spec\nfrom ardor.arch.spec import Rope"),
        ("cli/main.py", "from ardor import LM\nfrom ardor.lm import load"),
        ("train/run.py", "from ardor import __version__"),
        ("bridge/foreign.py", "from transformers import DynamicCache"),
        ("train/trainer.py", "import transformational"),  # a prefix of a name is not the name
    ],
)
def test_an_allowed_import_is_not_caught(path, source):
    assert not violations(source, Path(path))
