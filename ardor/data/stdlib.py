"""Real text that every machine with Python already has: the standard library's own words.

It feeds the quickstart, offline: documents to pre-train on, and question-answer pairs to
fine-tune on. Files are parsed with `ast`, never imported.
"""

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.data.readers import Row
from ardor.errors import DataError

# Tests and bundled copies repeat other text; the codecs are tables; topics.py is read on its own.
SKIPPED = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__phello__"),
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
        *("encodings", "pydoc_data"),
    )
)
TOPICS = "pydoc_data.topics"  # the module name that language topics carry

_FUNCTION_QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {signature}.",
    "Explain `{signature}`.",
    "What does the function {name} do?",
    "In Python, what does {signature} do?",
    "Describe {name} in one sentence.",
    "I found {name} in the {module} module. What does it do?",
    "Tell me about {name}.",
    "What happens when I call {signature}?",
)
_CLASS_QUESTIONS = (
    "What is {name}?",
    "What is the class {name}?",
    "Explain the class {name}.",
    "What do {name} objects represent?",
    "Describe {name} in one sentence.",
    "What is `{name}` in Python?",
    "Tell me about the class {name}.",
    "When would I use {name}?",
)
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)\.(?=\s|$)")
_SHORTEST, _LONGEST = 20, 160  # characters of an answer
_LONGEST_SIGNATURE = 80  # beyond it a question shows only the name


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    module: str  # dotted name of the module that it is from


@dataclass(frozen=True, slots=True)
class Pair:
    question: str
    answer: str
    module: str  # dotted name of the module that it is about

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The pair as a conversation."""
        return (
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        )

    @property
    def row(self) -> Row:
        """The pair as a dataset row, in the "messages" format."""
        values: dict[str, Any] = {"messages": list(self.messages)}
        return Row(values, where=f"stdlib:{self.module}", file="stdlib")


@dataclass(frozen=True, slots=True)
class _Entity:
    name: str  # qualified: textwrap.TextWrapper.fill
    signature: str
    doc: str
    kind: str  # "function" or "class"


@dataclass(frozen=True, slots=True)
class _Module:
    name: str
    path: Path
    doc: str
    entities: tuple[_Entity, ...]  # public, documented, in file order


def stdlib_documents(
    limit_bytes: int | None = None, *, exclude_modules: Collection[str] = ()
) -> Iterator[Document]:
    """Documents of Python's documentation and source, prose first, in a fixed mixed order.

    The prose is the language topics of `help()`, and one page per module with the signatures and
    docstrings of what it holds; then comes each module's source. Stops short of `limit_bytes` of
    UTF-8, leaving out documents that no longer fit.

    A package named in `exclude_modules` is left out with everything below it. Pass the packages
    held out by `split_by_module`: a loss measured on their pairs then measures no text that
    pre-training could have memorised (short stock phrases that other modules share remain).

    Raises: DataError if this Python comes without its source files.
    """
    excluded = {package(name) for name in exclude_modules}
    modules = [found for found in _modules() if package(found.name) not in excluded]
    prose = [Document(text, TOPICS) for text in _topics()]
    prose += [Document(page, found.name) for found in modules if (page := _page(found))]
    prose.sort(key=lambda document: _hash(document.module, document.text[:80]))
    modules.sort(key=lambda found: _hash("source", found.name))
    written = 0

    def fits(document: Document) -> bool:
        nonlocal written
        size = len(document.text.encode())
        if limit_bytes is not None and written + size > limit_bytes:
            return False
        written += size
        return True

    yield from filter(fits, prose)
    for found in modules:
        text = (_source(found.path) or "").strip()
        if text and fits(document := Document(text, found.name)):
            yield document


def stdlib_pairs() -> list[Pair]:
    """A question and a one-sentence answer for each public, documented function, class or method.

    The answer is the first sentence of the docstring: one line of 20 to 160 ASCII characters that
    ends with a period. Docstrings that share an answer give one pair, the first. The wording of a
    question is chosen by a hash of the name, so the list is the same in every run of one Python.

    Raises: DataError if this Python comes without its source files.
    """
    pairs: list[Pair] = []
    answers: set[str] = set()
    for found in _modules():
        for entity in found.entities:
            answer = first_sentence(entity.doc)
            if answer is None or answer.lower() in answers:
                continue
            answers.add(answer.lower())
            pairs.append(Pair(_question(entity, found.name), answer, found.name))
    return pairs


def split_by_module(
    pairs: Sequence[Pair], heldout_fraction: float, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs with no package on both sides: json goes with json.decoder.

    Whole packages are held out until about `heldout_fraction` of the pairs are.

    Raises: DataError if the fraction is not between 0 and 1 or there is only one package.
    """
    if not 0 < heldout_fraction < 1:
        raise DataError(f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 1")
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[package(pair.module)] = sizes.get(package(pair.module), 0) + 1
    if len(sizes) < 2:
        raise DataError(f"{len(pairs)} pairs from {len(sizes)} package(s) cannot be split by them")
    wanted = heldout_fraction * len(pairs)
    heldout: set[str] = set()
    held = 0
    for name in sorted(sizes, key=lambda name: _hash(str(seed), name)):
        if held + sizes[name] <= wanted:
            heldout.add(name)
            held += sizes[name]
    heldout = heldout or {min(sizes, key=lambda name: (sizes[name], name))}
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[package(pair.module) in heldout].append(pair)
    return sides


def package(module: str) -> str:
    """The first part of a dotted module name."""
    return module.partition(".")[0]


def first_sentence(doc: str) -> str | None:
    """The docstring's first sentence on one line, or None if it would make a poor answer."""
    paragraph = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    end = _SENTENCE.search(paragraph)
    if end:
        sentence = paragraph[: end.end()]
    elif paragraph[-1:].isalnum() or paragraph.endswith((")", "'", '"')):
        sentence = paragraph + "."  # a summary line written without its period
    else:
        return None
    poor = (
        not _SHORTEST <= len(sentence) <= _LONGEST
        or not sentence.isascii()
        or not sentence.isprintable()
        or ">>>" in sentence
        or not sentence[0].isalpha()
        or re.match(r"[\w.]+\(", sentence)  # a signature, not a sentence
    )
    return None if poor else sentence[0].upper() + sentence[1:]


def _question(entity: _Entity, module: str) -> str:
    forms = _CLASS_QUESTIONS if entity.kind == "class" else _FUNCTION_QUESTIONS
    form = forms[int(_hash("question", entity.name)[:8], 16) % len(forms)]
    signature = entity.signature if len(entity.signature) <= _LONGEST_SIGNATURE else entity.name
    return form.format(name=entity.name, signature=signature, module=module)


def _page(found: _Module) -> str:
    parts = [found.name, found.doc] if found.doc else [found.name]
    for entity in found.entities:
        head = f"class {entity.signature}" if entity.kind == "class" else entity.signature
        body = "\n".join(f"    {line}".rstrip() for line in entity.doc.splitlines())
        parts.append(f"{head}\n{body}")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _modules() -> tuple[_Module, ...]:
    """Every module with its documented public names, by name; parsed once per process."""
    found = []
    for path in sorted(_root().rglob("*.py")):
        parts = path.relative_to(_root()).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if SKIPPED & set(parts) or not all(part.isidentifier() for part in parts):
            continue
        if name.startswith("_sysconfigdata"):  # this machine's build flags
            continue
        tree = _parse(path)
        if tree is None:
            continue
        entities = () if _private(name) else tuple(_entities(tree, name))
        found.append(_Module(name, path, ast.get_docstring(tree) or "", entities))
    if not found:
        raise DataError(
            f"no readable Python sources under {_root()}; this Python comes without its standard "
            "library's source files: use one from python.org, uv or your system, or pass your own "
            "text and pairs"
        )
    return tuple(found)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _source(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None  # unreadable here, or a file that is broken on purpose


def _parse(path: Path) -> ast.Module | None:
    text = _source(path)
    if text is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def _entities(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[_Entity]:
    in_class = isinstance(parent, ast.ClassDef)
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield _Entity(name, name + _class_arguments(node), doc, "class")
            yield from _entities(node, name)
        elif doc:
            yield _Entity(name, name + _arguments(node, in_class), doc, "function")


def _class_arguments(node: ast.ClassDef) -> str:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _arguments(member, True)
    return ""


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    text = ast.unparse(node.args)
    if "property" in decorators:
        return ""
    if method and "staticmethod" not in decorators:
        text = text.partition(", ")[2]  # self or cls
        text = text.removeprefix("/, ").removeprefix("/")
    return f"({text})"


def _topics() -> list[str]:
    """The pages of `help("assert")` and the like; none if this Python has no such file."""
    path = _root() / "pydoc_data" / "topics.py"
    tree = _parse(path) if path.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [text.strip() for text in ast.literal_eval(node.value).values()]
    return []
