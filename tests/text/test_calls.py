"""Tools from files, and calls in the forms that released models write them in."""

import json
from pathlib import Path

import pytest

from ardor.errors import ArdorError
from ardor.text.calls import read_calls, read_tools
from ardor.text.named import NAMED
from ardor.text.template import ChatTemplate

WEATHER = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


@pytest.mark.parametrize("wrapped", [True, False])
def test_both_shapes_of_a_function_are_taken(tmp_path: Path, wrapped: bool):
    path = tmp_path / "tools.json"
    whole = {"type": "function", "function": WEATHER}
    path.write_text(json.dumps([whole if wrapped else WEATHER]))
    assert read_tools(path) == [whole]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "tools.json is no file"),
        ("[{]", "tools.json is not valid JSON: .* at line 1, column 3"),
        ("{}", "holds a JSON dict; expected a list of functions"),
        ("[]", "holds an empty list; expected"),
        ('[{"name": "f"}, 3]', "entry 2 of 2 is 3; expected an object as in"),
        ('[{"type": "function", "function": {}}]', "entry 1 of 1 is .*expected an object"),
    ],
)
def test_a_file_with_anything_else_is_refused(tmp_path: Path, text: str | None, told: str):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArdorError, match=told):
        read_tools(path)


@pytest.mark.parametrize("shown", [True, False])  # decoding may leave special tokens out
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "mistral-v3", "llama3.1"])
def test_a_call_is_read_as_the_format_s_template_writes_it(name: str, shown: bool):
    template = ChatTemplate(NAMED[name].source, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    question = {"role": "user", "content": "hi"}
    asked = {"id": "call00001", "type": "function", "function": CALL}
    answer = {"role": "assistant", "content": "", "tool_calls": [asked]}
    prompt = template.render([question], add_generation_prompt=True)
    text = template.render([question, answer]).removeprefix(prompt)
    gone = ("<|im_end|>", "</s>", "<|eot_id|>", *(() if shown else ("[TOOL_CALLS]",)))
    for token in (*gone, "<think>\n\n</think>\n\n"):
        text = text.replace(token, "")
    assert read_calls(text) == ("", [asked])


def test_several_calls_beside_words_and_numbers_of_calls():
    body = json.dumps(CALL)
    said, calls = read_calls(
        f"Wait.\n<tool_call>\n{body}\n</tool_call>\n<tool_call>{body}</tool_call>", 3
    )
    assert said == "Wait." and [call["id"] for call in calls] == ["call00003", "call00004"]


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "",
        "[1, 2]",
        '{"a": 1}',
        '{"name": "f"}',
        "<tool_call>\n{broken\n</tool_call>",
        "[]",
    ],
)
def test_what_is_no_call_is_said(text: str):
    assert read_calls(text) == (text, [])
