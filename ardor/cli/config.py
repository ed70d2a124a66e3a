"""One dataclass per verb gives its flags, their help, its YAML file and its saved run file.

Required fields are positional, in order (`ardor finetune MODEL DATA`), and the others are flags; or
`_: KW_ONLY` divides them, for positional fields with a default (`ardor chat MODEL [QUESTION]`).
Help is the string under a field, or else the comment beside or right above it.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter, Token
from cyclopts.config import Dict
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from ardor.cli.console import results
from ardor.data.choices import Datasets, Part
from ardor.errors import ConfigError
from ardor.files.yaml import YamlFile, read_yaml, to_yaml

if TYPE_CHECKING:
    from cyclopts.argument import ArgumentCollection

__all__ = ["parse", "to_yaml"]

C = TypeVar("C")

STDIN = "(standard input)"  # stands for a lone "-", which cyclopts takes for a flag

SHORT = {"output": "-o", "max_new_tokens": "-n", "temperature": "-t", "purpose": "--for"}
ONE_EACH = ("adapter",)  # given again for each value, so that MODEL may follow; others take several
ARGUMENTS = Group("Arguments", sort_key=0)
OPTIONS = Group("Options", sort_key=1)


def parse(config_class: type[C], args: Sequence[str], verb: str) -> C:
    """The verb's configuration: its defaults, then `--config FILE.yaml`, then flags.

    Prints help and raises SystemExit(0) for -h and --help.

    Raises: ConfigError for anything that cannot be honoured, with the nearest right name.
    """
    signature = _signature(config_class)

    def build(**values: Any) -> None: ...

    build.__signature__ = signature  # type: ignore[attr-defined]
    build.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    app = App(
        name=f"ardor {verb}",
        help=_first_paragraph(config_class),
        help_flags=["--help", "-h"],
        version_flags=[],
        group_arguments=ARGUMENTS,
        group_parameters=OPTIONS,
        config=_from_yaml,
        console=results(),
        help_format="plaintext",  # else a <tag> in a text is taken for markup, and not shown
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    )
    app["--help"].group = OPTIONS
    app["--help"].help = "Show this page and exit."
    app.default(build)
    try:
        tokens = [STDIN if arg == "-" else arg for arg in args]
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise ConfigError(f"{_explain(error, signature)}; see `ardor {verb} --help`") from error
    if command is not build:
        command(*bound.args, **bound.kwargs)
        raise SystemExit(0)
    values = {k: "-" if v == STDIN else v for k, v in bound.arguments.items() if k != "config"}
    return config_class(**values)


def narrowed(config: Any, kind: type[C]) -> C:
    """The fields of `config` that `kind` has: without what only the command line knows."""
    names = [field.name for field in fields(cast(type, kind))]
    return kind(**{name: getattr(config, name) for name in names})


def _signature(config_class: type) -> inspect.Signature:
    hints = get_type_hints(config_class, include_extras=True)
    help_of = field_help(config_class)
    settable = [field for field in fields(config_class) if field.init]
    leading = _positional(settable)
    flags = [field for field in settable if field not in leading]
    parameters = []
    for field in [*leading, *flags]:
        leads = field in leading
        kind: Any = TYPED.get(hints[field.name], hints[field.name])
        note = Parameter(
            help=help_of.get(field.name, ""),
            alias=SHORT.get(field.name, ()),
            group=ARGUMENTS if leads else OPTIONS,
            converter=CONVERTERS.get(hints[field.name]),
            consume_multiple=field.name not in ONE_EACH,
            show_default=_shown if isinstance(_default(field), tuple) else None,
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if leads
                else inspect.Parameter.KEYWORD_ONLY,
                default=_default(field),
                annotation=Annotated[kind, note],
            )
        )
    note = Parameter(help="YAML file with any of these settings; flags override it.", group=OPTIONS)
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, note],
        )
    )
    return inspect.Signature(parameters)


def _shown(values: tuple[object, ...]) -> str:
    """A default of several values as one would type it."""
    return " ".join(map(str, values)) or "none"


def _positional(settable: list[Field[Any]]) -> list[Field[Any]]:
    divided = {field.kw_only for field in settable} == {True, False}
    if divided:
        return [field for field in settable if not field.kw_only]
    return [field for field in settable if _default(field) is inspect.Parameter.empty]


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """cyclopts itself would round 1.5 to 2."""
    token = tokens[0]
    try:
        return int(token.value)
    except ValueError:
        where = f" in {token.source}" if token.source != "cli" else ""
        message = f"found {token.value!r}, expected a whole number{where}"
        raise CoercionError(msg=message, token=token) from None


def _whole_or_none(kind: Any, tokens: Sequence[Token]) -> int | None:
    return None if tokens[0].value.lower() in ("none", "null") else _whole(kind, tokens)


TYPED: dict[Any, Any] = {Datasets: tuple[str, ...]}  # where less can be typed than Python takes
CONVERTERS = {int: _whole, int | None: _whole_or_none}


def field_help(config_class: type) -> dict[str, str]:
    """Field name -> the string below the field, else the comment beside it or right above it."""
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if "__dataclass_fields__" in vars(cls):
            found |= _help_in_source(dedent(inspect.getsource(cls)))
    return found


def _help_in_source(source: str) -> dict[str, str]:
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {n for n, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found[node.target.id] = inspect.cleandoc(text).replace("\n", " ")
                continue
        if node.end_lineno in comments:
            found[node.target.id] = comments[node.end_lineno]
            continue
        above = node.lineno
        while above - 1 in alone:
            above -= 1
        if above < node.lineno:
            found[node.target.id] = " ".join(comments[n] for n in range(above, node.lineno))
    return found


def _first_paragraph(config_class: type) -> str:
    own = vars(config_class).get("__doc__") or ""
    # A dataclass without a docstring gets its signature as one.
    return "" if own.startswith(f"{config_class.__name__}(") else inspect.cleandoc(own)


def _from_yaml(app: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
    given = next((a for a in arguments if a.name == "--config" and a.tokens), None)
    if given is None:
        return
    path = Path(given.tokens[0].value)
    file = read_yaml(path)
    names = {a.name.removeprefix("--").replace("-", "_") for a in arguments} - {"config"}
    _refuse_unknown_keys(path, file, names)
    values = {key.replace("-", "_"): value for key, value in file.values.items()}
    values |= {key: _datasets(values[key]) for key in ("data", "eval_data") if key in values}
    Dict(values, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def _datasets(value: Any) -> Any:
    """Datasets as they are typed on a command line, where a YAML file has mappings."""
    if isinstance(value, dict):
        return str(Part.of(value))
    return [_datasets(one) for one in value] if isinstance(value, list) else value


def _refuse_unknown_keys(path: Path, file: YamlFile, names: set[str]) -> None:
    spelled: dict[str, str] = {}
    for key in file.values:
        if (first := spelled.setdefault(key.replace("-", "_"), key)) != key:
            raise ConfigError(
                f"{path}, line {file.lines[key]}: {key!r} was already given on line "
                f"{file.lines[first]}, as {first!r}; keep one"
            )
        if key.replace("-", "_") not in names:
            raise ConfigError(
                f"{path}, line {file.lines.get(key, 1)}: unknown key {key!r}"
                + nearest(key.replace("-", "_"), names)
            )


def nearest(word: str, known: Sequence[str] | set[str] | dict[str, Any]) -> str:
    """ "; did you mean X?", or the list of what is known when nothing is near."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _explain(error: CycloptsError, signature: inspect.Signature) -> str:
    shown = error.argument.name if error.argument else ""
    match error:
        case UnknownOptionError():
            flag = (error.token.keyword or error.token.value).split("=")[0]
            names = [f"--{name.replace('_', '-')}" for name in signature.parameters]
            close = get_close_matches(flag.replace("_", "-"), names, n=1)
            return f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "")
        case UnusedCliTokensError():
            extra = (error.unused_tokens or ["?"])[0]
            if extra.lower() in ("true", "false"):
                return f"did not expect {extra!r} here; switches are --NAME and --no-NAME"
            return f"did not expect {extra!r} here; options start with --, texts need quotes"
        case MissingArgumentError() if error.keyword or (error.argument and error.argument.tokens):
            return f"{error.keyword or shown} needs a value after it"
        case MissingArgumentError():
            return f"missing {shown.removeprefix('--').upper()}; give it here or in --config"
        case _:
            text = str(error).strip().rstrip(".")
            return text[:1].lower() + text[1:]
