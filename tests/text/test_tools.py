"""A function's JSON schema, as transformers makes it."""

from enum import Enum
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from ardor.errors import TextError
from ardor.text.chat import CHATML, ChatTemplate
from ardor.text.tools import schema_of


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(
    place: str, unit: Unit, days: int = 1, detail: Literal["low", "high"] | None = None
) -> list[dict[str, float]]:
    """Tells the weather.

    In two paragraphs.

    Args:
        place: Where, such as
            "Paris, France".
        unit: The unit (choices: ["celsius", "fahrenheit"])
        days (int): How many days: a number.
        detail: How much.

    Returns:
        A list of days.

    Raises:
        ValueError: never.
    """
    return []


def mixed(a: int | str, b: list[int] | dict[str, Any], c: tuple[int, str], d: Any = None):
    """Anything.

    Args:
        a: one
        b: two
        c: three
        d: four
    """


class Tool:
    def call(self, text: str) -> None:
        """Calls.

        Args:
            text: What to say.
        """


@pytest.mark.parametrize("function", [weather, mixed, Tool().call])
def test_a_schema_is_what_transformers_makes(function):
    assert schema_of(function) == get_json_schema(function)


def undescribed(a: int):
    """Nothing about a."""


def untyped(a):
    """Args:
    a: something
    """


def foreign(a: Tool):
    """A tool.

    Args:
        a: something
    """


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: a, "has no docstring"),
        (undescribed, "argument 'a' is not described"),
        (untyped, "argument 'a' has no type"),
        (foreign, "no JSON schema is known for the type"),
    ],
)
def test_what_is_missing_is_named(function, reason):
    with pytest.raises(TextError, match=reason):
        schema_of(function)


def test_functions_are_tools():
    template = ChatTemplate("{{ tools[0].function.name }}")
    assert template.render([{"role": "user", "content": "x"}], tools=[weather]) == "weather"
    with pytest.raises(TextError, match="no place for tools"):
        CHATML.render([{"role": "user", "content": "x"}], tools=[weather])
