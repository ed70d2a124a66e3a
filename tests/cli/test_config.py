"""One dataclass gives flags, help, YAML and the saved file; every mistake is one ConfigError."""

import re
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest

from ardor.cli.config import field_help, parse, to_yaml
from ardor.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Base:
    output: Path | None = None
    """Folder
    of the run."""
    learning_rate: float = 1e-4  # peak
    seed: int | None = None
    # What happens
    # to long rows.
    max_length: int = 512


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    """Tune a model."""

    model: str
    """Hub id or directory."""
    data: str
    """Rows to learn."""
    method: Literal["full", "lora", "qlora"] = "qlora"
    """What is trained."""
    target_modules: tuple[str, ...] = ("all-linear",)
    load_in_4bit: bool = False
    adapter: str | None = None


DEFAULT = Config(model="m", data="d")


def read(*args):
    return parse(Config, args, "tune")


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_verb_then_model_then_data():
    assert read("m", "d") == DEFAULT
    assert read("--data", "d", "--model", "m") == DEFAULT


@pytest.mark.parametrize(
    ("args", "change"),
    [
        (("--learning-rate", "3e-4"), {"learning_rate": 3e-4}),
        (("--learning_rate=3e-4",), {"learning_rate": 3e-4}),
        (("-o", "runs/a"), {"output": Path("runs/a")}),
        (("--method", "full"), {"method": "full"}),
        (("--load-in-4bit",), {"load_in_4bit": True}),
        (("--no-load_in_4bit",), {"load_in_4bit": False}),
        (("--seed", "-1"), {"seed": -1}),
        (("--seed", "none"), {"seed": None}),
        (("--target-modules", "q_proj", "v_proj", "--seed", "1"), {"seed": 1} | {
            "target_modules": ("q_proj", "v_proj")}),
    ],
)  # fmt: skip
def test_a_flag_sets_its_field(args, change):
    assert read("m", "d", *args) == replace(DEFAULT, **change)


def test_yaml_holds_everything_and_flags_override_it(yaml):
    path = yaml(
        "model: m\ndata: d\nlearning_rate: 1e-5\nload-in-4bit: true\noutput: null\n"
        "target_modules: [q_proj, v_proj]\nseed: 7\n"
    )
    expected = replace(
        DEFAULT,
        learning_rate=1e-5,  # PyYAML alone reads 1e-5 as a string
        load_in_4bit=True,
        target_modules=("q_proj", "v_proj"),
        seed=7,
    )
    assert read("--config", path) == expected
    override = ("--seed", "8", "--target-modules", "k_proj", "--no-load-in-4bit", "--config", path)
    assert read("other", *override) == replace(
        expected, model="other", seed=8, target_modules=("k_proj",), load_in_4bit=False
    )


def test_the_saved_file_reads_back_as_the_same_run(yaml):
    config = replace(DEFAULT, output=Path("runs/a b"), learning_rate=3e-7, adapter="[x]: #y")
    text = to_yaml(config, header="ardor tune\nresolved")
    assert text.startswith("# ardor tune\n# resolved\noutput: runs/a b\n")
    assert read("--config", yaml(text)) == config
    assert all(field.name in text for field in fields(config))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "missing MODEL; give it here or in --config; see `ardor tune --help`"),
        (("m",), "missing DATA"),
        (("m", "d", "--sed", "1"), "unknown flag --sed; did you mean --seed?"),
        (("m", "d", "--learning_rat=1"), "unknown flag --learning_rat; did you mean --learning-r"),
        (("m", "d", "--zzz"), "unknown flag --zzz; see"),
        (("m", "d", "--seed"), "--seed needs a value"),
        (("m", "d", "--seed", "1.5"), "--seed: found '1.5', expected a whole number"),
        (("m", "d", "--max-length", "none"), "--max-length: found 'none', expected a whole number"),
        (("m", "d", "--learning-rate", "fast"), '--learning-rate: unable to convert "fast"'),
        (("m", "d", "--method", "lorra"), 'Did you mean "lora"?'),
        (("m", "d", "--load-in-4bit", "true"), "switches are --NAME and --no-NAME"),
        (("m", "d", "e"), "did not expect 'e' here"),
        (("m", "d", "--config", "none.yaml"), "no such file: none.yaml"),
    ],
)
def test_a_wrong_command_line_is_explained(args, message):
    with pytest.raises(ConfigError) as caught:
        read(*args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rat: 1", "line 2: unknown key 'learning_rat'; did you mean"),
        ("seed: 1\nseed: 2", "run.yaml, line 2: 'seed' was already given on line 1"),
        (
            "max_length: 1\nmax-length: 2",
            "'max-length' was already given on line 1, as 'max_length'",
        ),
        ("config: other.yaml", "line 1: unknown key 'config'"),
        ("seed: fast", "found 'fast', expected a whole number in "),
        ("seed: 1.5", "found '1.5', expected a whole number in "),
        ("learning_rate: [1, 2]", 'unable to convert "[1, 2]" into float'),
        ("learning_rate: null", 'unable to convert "null" into float'),
        ("load_in_4bit: 3", 'unable to convert "3" into bool'),
        ("seed: 1\nmodel: [a\n", "run.yaml, line 3, column 1: this is not valid YAML"),
        ("- a\n", "found a list, expected `name: value`"),
        ("1: a", "line 1: unknown key '1'"),
    ],
)
def test_a_wrong_yaml_file_is_explained(yaml, text, message):
    with pytest.raises(ConfigError) as caught:
        read("m", "d", "--config", yaml(text))
    assert message in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_an_empty_file_changes_nothing(yaml):
    assert read("m", "d", "--config", yaml("# nothing yet\n")) == DEFAULT


def test_help_shows_fields_with_their_texts_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "ardor tune [OPTIONS] MODEL DATA\n\nTune a model." in shown
    assert "Hub id or directory. [required]" in shown
    assert re.search(r"--output -o PATH +Folder of the run", shown)
    assert re.search(r"--learning-rate FLOAT +peak \[default: 0.0001\]", shown)
    assert re.search(r"choices: full, lora, qlora\]", shown)
    assert "--no-load-in-4bit" in shown
    assert "--config PATH" in shown


def test_help_shows_tags_and_quotes_as_they_are_written(capsys):
    @dataclass(frozen=True)
    class Tagged:
        token: str = ""
        """Such as <tool>, in `*these*` or [those]."""

    with pytest.raises(SystemExit):
        parse(Tagged, ["--help"], "tag")
    assert "Such as <tool>, in `*these*` or [those]." in capsys.readouterr().out


def test_help_is_the_string_below_or_the_comment_beside_or_above():
    assert field_help(Config) == {
        "output": "Folder of the run.",
        "learning_rate": "peak",
        "max_length": "What happens to long rows.",
        "model": "Hub id or directory.",
        "data": "Rows to learn.",
        "method": "What is trained.",
    }


def test_kw_only_divides_optional_arguments_from_flags():
    @dataclass(frozen=True)
    class Chat:
        model: str
        question: str = ""
        _: KW_ONLY
        temperature: float = 0.0

    assert parse(Chat, ["m", "why?", "-t", "0.5"], "chat") == Chat("m", "why?", temperature=0.5)
    assert parse(Chat, ["m"], "chat") == Chat("m")


def test_a_refusal_of_the_dataclass_itself_passes_through():
    @dataclass(frozen=True)
    class Strict:
        rank: int = 4

        def __post_init__(self):
            if self.rank < 1:
                raise ConfigError(f"rank is {self.rank}; give 1 or more")

    with pytest.raises(ConfigError, match="rank is 0; give 1 or more"):
        parse(Strict, ["--rank", "0"], "strict")
