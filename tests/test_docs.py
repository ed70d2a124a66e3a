"""What the documents say can be typed is what the command line and the library take.

Commands are parsed by the real parser and not run; Python is compiled and its names looked up.
"""

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ardor
from ardor.cli.config import field_help, parse
from ardor.cli.main import VERBS
from ardor.errors import ArdorError, ConfigError
from ardor.load import Model

ROOT = Path(__file__).parents[1]
LOG = ROOT / "docs" / "LOG.md"  # of what once was
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.remove(LOG)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"^(?:torchrun .* -m |(?:\.venv/bin/)?(?:python -m )?)ardor (?=\S)")
OF_BENCHMARKS = {"--rounds", "--threads"}
FILLER = "X"  # an argument that a mention of a command leaves out


class Snippet(NamedTuple):
    place: str  # file:line
    text: str


# --- what a document holds ---


def lines_of_code(text: str) -> Iterator[tuple[int, str]]:
    """(offset, line) in fences that are not another language's, and in indented blocks."""
    for fence in FENCE.finditer(text):
        if fence[1] in ("", "sh", "bash"):
            at = fence.start(2)
            for line in fence[2].splitlines(keepends=True):
                yield at, line
                at += len(line)
    for line in re.finditer(r"^ {4}.*\n?", text, re.MULTILINE):
        yield line.start(), line[0]


def commands_in(text: str, name: str) -> list[Snippet]:
    """Each `ardor ...` of a block or a span, on one line; synopses go on with an option."""
    found: list[Snippet] = []
    open_ended = False
    for at, line in lines_of_code(text):
        said = line.strip()
        if found and (open_ended or said.startswith("[--")):
            last = found.pop()
            found.append(last._replace(text=f"{last.text.removesuffix(chr(92))} {said}"))
        elif begins := COMMAND.match(said):
            place = f"{name}:{text.count(chr(10), 0, at) + 1}"
            found.append(Snippet(place, said[begins.end() :]))
        else:
            continue
        open_ended = said.endswith("\\")
    for span, place in spans_in(text, name):
        if begins := COMMAND.match(span):
            found.append(Snippet(place, span[begins.end() :]))
    return found


def spans_in(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(text, place) of each piece of code within a sentence or a table."""
    prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for span in SPAN.finditer(prose):
        said = " ".join(span[1].replace("\\|", "|").split())
        yield said, f"{name}:{prose.count(chr(10), 0, span.start()) + 1}"


def flags_in(text: str, name: str) -> list[Snippet]:
    """Spans that are options without their command, such as those in tables."""
    return [Snippet(place, span) for span, place in spans_in(text, name) if span.startswith("--")]


def python_in(text: str, name: str) -> list[Snippet]:
    return [
        Snippet(f"{name}:{text.count(chr(10), 0, fence.start()) + 1}", fence[2])
        for fence in FENCE.finditer(text)
        if fence[1] == "python"
    ]


# --- whether it holds ---


def readings(command: str) -> Iterator[list[str]]:
    """The commands that a synopsis stands for: every option is given, each choice once."""
    if " [-" in command:
        command = re.sub(r"(?<!\w)\[(?=-)|\](?=\s|\]|$)", "", command)
        command = command.replace("]", "")
    words = ["1" if word == "N" else word for word in shlex.split(command, comments=True)]
    choices = [word.split("|") if re.fullmatch(r"[\w|-]+", word) else [word] for word in words]
    longest = max(map(len, choices))
    for turn in range(longest):
        yield [options[turn % len(options)] for options in choices]


def understood(verb: str, args: list[str]) -> None:
    """Parse as the command line does; what a mere mention leaves out is filled in.

    Raises: ConfigError for what cannot be honoured.
    """
    config = import_module(VERBS[verb][0]).Config
    for _ in range(4):
        try:
            parse(config, args, verb)
            return
        except SystemExit:  # --help
            return
        except ConfigError as error:
            if str(error).startswith("missing "):
                args = [FILLER, *args]
            elif "needs a value after it" in str(error):
                args = args[:-1]
            else:
                raise
    raise ConfigError(f"{verb} {args} asks for ever more")


def check_command(command: str) -> None:
    """Raises: ConfigError where `ardor command` is none."""
    for verb, *args in readings(command):
        if verb == "VERB" or verb.startswith("-"):
            continue
        if verb not in VERBS:
            raise ConfigError(f"unknown verb {verb!r}")
        understood(verb, args)


@cache
def flags_of(verb: str) -> frozenset[str]:
    config = import_module(VERBS[verb][0]).Config
    named = {f"--{field.name.replace('_', '-')}" for field in fields(config)}
    return frozenset(named | {f"--no-{name[2:]}" for name in named} | {"--for", "--config"})


def wanted_by(verb: str) -> int:
    """How many arguments it cannot do without."""
    settings = fields(import_module(VERBS[verb][0]).Config)
    return sum(field.default is MISSING and field.default_factory is MISSING for field in settings)


def check_flags(options: str) -> None:
    """Raises: ConfigError where no verb takes these options."""
    for args in readings(options):
        given = {word.split("=")[0] for word in args if word.startswith("--")}
        if given <= {"--help", "--version"} or given & OF_BENCHMARKS:
            continue
        refused = "no verb has it"
        for verb in VERBS:
            if given <= flags_of(verb):
                try:
                    if len(args) > 1:  # without a value there is no more to see
                        understood(verb, [FILLER] * wanted_by(verb) + args)
                    break
                except ConfigError as error:
                    refused = str(error)
        else:
            raise ConfigError(refused)


def check_python(source: str) -> None:
    """Raises: SyntaxError, ImportError, AttributeError or TypeError where it would at once."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ardor"):
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and (called := dotted(node.func)):
            _check_keywords(called, [word.arg for word in node.keywords if word.arg])
        elif (name := dotted(node)) and name.startswith(("ardor.", "lm.")):
            resolve(name)


def _check_keywords(called: str, given: list[str]) -> None:
    if not called.startswith(("ardor.", "lm.")):
        return
    parameters = inspect.signature(resolve(called)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    lost = [word for word in given if word not in parameters and not takes_any]
    if lost:
        raise TypeError(f"{called} does not take {', '.join(lost)}")


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of an expression that is just that."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def resolve(name: str) -> Any:
    """What a dotted name means; `lm` is a loaded model. Raises: AttributeError, ImportError."""
    owner, _, last = name.rpartition(".")
    if name.startswith("lm.model."):
        if last not in (*Model.__dataclass_fields__, *dir(Model)):
            raise AttributeError(f"{name}: a Model has no {last}")
        return Model
    if owner == "lm":
        return Model if last == "model" else getattr(ardor.LM, last)
    found = import_module(owner)
    return getattr(found, last) if hasattr(found, last) else import_module(name)


def wrong(snippets: list[Snippet], check: Callable[[str], None]) -> list[str]:
    said = []
    for place, text in snippets:
        try:
            check(text)
        except (ArdorError, SyntaxError, ImportError, AttributeError, TypeError) as error:
            said.append(f"{place}: {text}: {error}")
    return said


# --- the documents ---


@pytest.fixture(autouse=True)
def _where_run_yaml_is(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request) -> tuple[str, str]:
    return request.param.read_text(encoding="utf-8"), request.param.name


def test_every_command_is_one_that_the_parser_takes(document):
    assert not wrong(commands_in(*document), check_command)


def test_every_option_is_one_that_some_verb_takes(document):
    assert not wrong(flags_in(*document), check_flags)


def test_python_compiles_and_its_names_are_there(document):
    assert not wrong(python_in(*document), check_python)
    text, name = document
    names = [
        Snippet(place, found[0])
        for span, place in spans_in(text, name)
        if (found := re.match(r"(?:ardor|lm)(?:\.[a-zA-Z_]\w*)+", span)) and span != "ardor.json"
    ]
    assert not wrong(names, resolve)


def test_every_target_of_make_is_in_the_makefile(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text, _ = document
    named = re.findall(r"(?:^ {4}|`)make (?:\w+=\S+ )*([a-z-]+)", text, re.MULTILINE)
    assert {*named} <= targets


def test_the_documents_hold_something_to_check():
    texts = [(path.read_text(encoding="utf-8"), path.name) for path in DOCUMENTS]
    counts = [
        sum(len(found(*each)) for each in texts) for found in (commands_in, flags_in, python_in)
    ]
    assert all(count >= least for count, least in zip(counts, (60, 100, 6), strict=True)), counts
    verbs = {words[0] for each in texts for _, c in commands_in(*each) for words in readings(c)}
    assert {*VERBS} <= verbs


def test_options_that_a_help_text_names_are_of_its_verb():
    for verb, (module, _) in VERBS.items():
        config = import_module(module).Config
        for field, text in field_help(config).items():
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
            others = {"--model"} if verb == "plan" else set()  # of `ardor train`
            assert named <= flags_of(verb) | others, f"{verb} --{field}"


# --- the probe itself ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```\nardor score MODEL DATA --adaptor x\n```\n", "unknown flag --adaptor"),
        ("    ardor finetune MODEL DATA \\\n        --learning-rat 1\n", "unknown flag --learning"),
        ("see `ardor plann MODEL`", "unknown verb 'plann'"),
        ("see `ardor generate --fast`", "unknown flag --fast"),
        ("| `ardor finetune MODEL DATA --method lorra` |", 'invalid value "lorra"'),
        ("    ardor finetune MODEL DATA --lora-r many\n", "found 'many', expected a whole number"),
        ("    ardor plan MODEL [--for generate|trian]\n", 'invalid value "trian"'),
        ("    ardor plan MODEL [--lora-r 16]\n        [--gpu 2x24GiB] [--json]\n", "flag --gpu"),
        ("    ardor chat MODEL twice\n", "did not expect 'twice'"),
        ("`torchrun --nproc-per-node 2 -m ardor trian x`", "unknown verb 'trian'"),
    ],
)
def test_a_command_that_is_none_is_found(text, says):
    (found,) = wrong(commands_in(text, "made-up.md"), check_command)
    assert says in found and found.startswith("made-up.md:")


def test_what_is_right_is_left():
    text = (
        "```\nardor merge RUN -o DIR [--onto 16bit|dequantized]  # plain\n```\n"
        "`ardor finetune`, `ardor train --model`, `ardor VERB --help`, `ardor chat --help`\n"
        "```yaml\nardor: nothing\n```\n"
    )
    assert len(commands_in(text, "x")) == 5 and not wrong(commands_in(text, "x"), check_command)


def test_an_option_of_no_verb_is_found():
    text = "`--lora-r 16`, `--lora-rang 16`, `--onto 8bit`, `--no-weights`, `--for train`"
    first, second = wrong(flags_in(text, "x"), check_flags)
    assert "--lora-rang" in first and "--onto 8bit" in second


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("lm = ardor.load(", SyntaxError),
        ("from ardor.data.formats import preference_side", ImportError),
        ("import ardor.nowhere", ImportError),
        ("lm = ardor.lode('x')", ImportError),
        ("lm = ardor.load('x', devices='cpu')", TypeError),
        ("lm.generat('x')", AttributeError),
        ("lm.combine_adapters('c', {}, ranks=3)", TypeError),
        ("lm.model.revisions", AttributeError),
    ],
)
def test_python_that_would_fail_is_found(source, error):
    with pytest.raises(error):
        check_python(source)
    check_python("import ardor\nlm = ardor.load('x', device_map='cpu')\nlm.model.revision\n")
