import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ardor.errors import TextError
from ardor.text.chat import CHATML, ChatTemplate, checked, prompt_ids, supervise, terminator
from ardor.text.example import Example
from ardor.text.tokenizer import Tokenizer

Templates = Callable[[str], ChatTemplate]

KEEPS_CONTENT = ("chatml", "macro", "set block")
ALL = (*KEEPS_CONTENT, "trims", "spaced", "forgetful", "plain")

# Contents with control tokens, spaces at the ends, line ends and any unicode.
CONTENT = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from(["<|im_end|>", "<|pad|>", " ", "\n\n", "hello"])
    ),
    max_size=4,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    """Perhaps a system message, then turns, ending with an answer."""
    system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 3))
    roles = ("user", "assistant") * turns
    return system + [{"role": role, "content": draw(CONTENT)} for role in roles]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def trained(rows: list[Example]) -> list[list[int]]:
    """The runs of supervised tokens, in order."""
    runs: list[list[int]] = []
    for row in rows:
        for i, (token, on) in enumerate(zip(row.tokens, row.supervised, strict=True)):
            if on and (i == 0 or not row.supervised[i - 1]):
                runs.append([])
            if on:
                runs[-1].append(token)
    return runs


def starts(row: Example) -> list[int]:
    """Where supervised runs begin."""
    before = (False, *row.supervised)
    return [i for i, on in enumerate(row.supervised) if on and not before[i]]


# Templates


def test_chatml_writes_what_everyone_calls_chatml():
    messages = [user("hi"), assistant("yes"), user("no")]
    assert CHATML.render(messages, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_has_what_transformers_gives_it():
    source = (
        "{{ {'a': ['<ü>']} | tojson }} {{ {'a': 1} | tojson(indent=1) }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
        "{% endfor %}{{ strftime_now('%Y-%m') }} {{ tools is none }} {{ bos_token }}"
    )
    clock = lambda: datetime(2024, 5, 17)  # noqa: E731
    template = ChatTemplate(source, tokens={"bos_token": "<s>"}, clock=clock)
    expected = '{"a": ["<ü>"]} {\n "a": 1\n}hi2024-05 True <s>'
    assert template.render([user("hi"), user("unseen")]) == expected
    assert template.render([user("hi")], bos_token="<b>").endswith("<b>")


def test_a_template_s_errors_name_their_line():
    with pytest.raises(TextError, match=r"chat template, line 2: .*the line is '\{% endfor %\}'"):
        ChatTemplate("hello\n{% endfor %}\n")
    refusing = ChatTemplate("a\n\n{{ raise_exception('roles must alternate') }}", name="t.jinja")
    with pytest.raises(TextError, match=r"t\.jinja, line 3: roles must alternate; the line is"):
        refusing.render([user("hi")])
    for line in ("{{ messages[0].absent.absent }}", "{{ 1 + messages }}", "{{ 1 // 0 }}"):
        with pytest.raises(TextError, match="line 2: "):
            ChatTemplate("\n" + line).render([user("hi")])


def test_a_template_cannot_reach_out_of_its_sandbox_or_change_the_messages():
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(TextError, match="line 1: "):
            ChatTemplate(source).render([user("hi")])


def test_messages_are_checked_and_the_wrong_one_is_named():
    for wrong, reason in [
        ("hi", "message 2 of 2 is str; expected an object"),
        ({"role": "user"}, r"message 2 of 2 has no 'content' \(it has role\)"),
        ({"role": "user", "content": None}, "message 2 of 2: 'content' is null"),
        ({"role": 1, "content": "x"}, "message 2 of 2: 'role' is int"),
    ]:
        with pytest.raises(TextError, match=reason):
            CHATML.render([user("hi"), wrong])
    assert checked([{**user("hi"), "tool_calls": None}]) == [user("hi")]


def test_the_jinja_file_wins_over_the_config_and_a_named_template_can_be_chosen(tmp_path: Path):
    assert ChatTemplate.from_directory(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one{{ eos_token }}", "eos_token": "</s>"}))
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None
    assert found.render([user("hi")]) == "one</s>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    for name, text in (("default", "plain"), ("tool_use", "tools")):
        found = ChatTemplate.from_directory(tmp_path, name=name)
        assert found is not None
        assert found.render([user("hi")]) == text
    with pytest.raises(TextError, match="templates named default, tool_use, but none named 'rag'"):
        ChatTemplate.from_directory(tmp_path, name="rag")
    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None
    assert found.render([user("hi")]) == "file"
    assert found.fingerprint != ChatTemplate("plain").fingerprint


# Prompts


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_no_control_token_comes_from_a_content(
    tokenizer: Tokenizer, template: Templates, messages: list[dict[str, str]]
):
    for name in (*KEEPS_CONTENT, "trims", "spaced"):
        ids = prompt_ids(tokenizer, template(name), messages)
        empty = [message | {"content": ""} for message in messages]
        expected = prompt_ids(tokenizer, template(name), empty)
        of_template = [id for id in expected if id in tokenizer.control]
        assert [id for id in ids if id in tokenizer.control] == of_template


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_a_prompt_reads_back_as_the_rendering(
    tokenizer: Tokenizer, template: Templates, messages: list[dict[str, str]]
):
    for name in (*KEEPS_CONTENT, "trims", "spaced", "plain"):
        ids = prompt_ids(tokenizer, template(name), messages)
        assert tokenizer.decode(ids) == template(name).render(messages, True)


def test_the_naive_way_does_take_a_content_for_a_control_token(tokenizer: Tokenizer):
    messages = [user("a<|im_end|>b")]
    end = tokenizer.added["<|im_end|>"]
    assert tokenizer.encode_template(CHATML.render(messages, True)).count(end) == 2
    assert prompt_ids(tokenizer, CHATML, messages).count(end) == 1


def test_a_template_that_rewrites_contents_refuses_control_tokens_in_them(tokenizer: Tokenizer):
    escapes = ChatTemplate("{% for m in messages %}{{ m.content | tojson(true) }}{% endfor %}")
    assert prompt_ids(tokenizer, escapes, [user("hí")]) == tokenizer.encode_template('"h\\u00ed"')
    messages = [user("hi"), user("í<|pad|>")]
    with pytest.raises(TextError, match=r"message 2 of 2 spells the control token '<\|pad\|>'"):
        prompt_ids(tokenizer, escapes, messages)
    # What is no longer the token after rewriting does no harm.
    upper = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert prompt_ids(tokenizer, upper, messages) == tokenizer.encode_template("HIÍ<|PAD|>")


def test_a_template_that_reads_contents_is_encoded_as_it_writes_them(tokenizer: Tokenizer):
    source = CHATML.source + "{% if 'why' in messages[0].content %} (a question){% endif %}"
    template = ChatTemplate(source)
    for content in ("why", "yes"):
        expected = tokenizer.encode_template(template.render([user(content)], True))
        assert prompt_ids(tokenizer, template, [user(content)]) == expected


@pytest.mark.parametrize("template_writes", [True, False])
@pytest.mark.parametrize("tokenizer_adds", [True, False])
def test_bos_is_there_once_if_the_template_writes_it(
    tokenizer: Tokenizer, bos_tokenizer: Tokenizer, template_writes: bool, tokenizer_adds: bool
):
    each = bos_tokenizer if tokenizer_adds else Tokenizer(tokenizer._backend, bos_tokenizer.names)
    source = ("{{ bos_token }}" if template_writes else "") + CHATML.source
    template = ChatTemplate(source)
    bos = bos_tokenizer.prefix[0]
    ids = prompt_ids(each, template, [user("hi")])
    assert ids.count(bos) == int(template_writes)
    # Also for someone who renders first and encodes then.
    text = template.render([user("hi")], True, **each.names)
    assert each.encode(text).count(bos) == int(template_writes or tokenizer_adds)
    assert each.encode(text, bos=True).count(bos) == 1


def test_a_dated_template_reads_its_clock_once_per_prompt(tokenizer: Tokenizer):
    ticks = iter(range(1, 50))
    template = ChatTemplate(
        "{{ strftime_now('%S') }}" + CHATML.source,
        clock=lambda: datetime(2024, 1, 1, 0, 0, next(ticks)),
    )
    # With two readings the marked rendering would differ, and the content would be refused.
    assert prompt_ids(tokenizer, template, [user("<|im_end|>")])


# Terminators


@pytest.mark.parametrize("name", [name for name in ALL if name != "plain"])
def test_the_terminator_is_what_follows_an_answer(
    tokenizer: Tokenizer, template: Templates, name: str
):
    assert terminator(tokenizer, template(name)) == tokenizer.added["<|im_end|>"]


def test_a_terminator_written_only_between_turns_is_found(tokenizer: Tokenizer):
    between = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    )
    assert terminator(tokenizer, between) == tokenizer.added["<|im_end|>"]


def test_the_opening_of_the_next_turn_is_no_terminator(tokenizer: Tokenizer, template: Templates):
    opened = ChatTemplate("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    assert terminator(tokenizer, opened) is None
    assert terminator(tokenizer, template("plain")) is None
    assert terminator(tokenizer, ChatTemplate("{{ raise_exception('no') }}")) is None


# Training rows


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
@pytest.mark.sweep
def test_training_sees_exactly_what_inference_is_given(
    tokenizer: Tokenizer, template: Templates, messages: list[dict[str, str]]
):
    if not any(m["content"] for m in messages if m["role"] == "assistant"):
        messages[-1]["content"] = "yes"
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for name in (*KEEPS_CONTENT, "trims", "spaced", "plain"):
        rows = supervise(tokenizer, template(name), messages)
        begins = [row.tokens[:start] for row in rows for start in starts(row)]
        prompts = [prompt_ids(tokenizer, template(name), messages[:i]) for i in turns]
        assert begins == [tuple(prompt) for prompt in prompts]


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
@pytest.mark.sweep
def test_the_trained_tokens_are_the_answers_and_their_stop_token(
    tokenizer: Tokenizer, template: Templates, messages: list[dict[str, str]]
):
    if not any(m["content"].strip() for m in messages if m["role"] == "assistant"):
        messages[-1]["content"] = "yes"
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    frames: dict[str, Callable[[str], str]] = dict.fromkeys(KEEPS_CONTENT, str)
    frames |= {"trims": str.strip, "spaced": lambda text: f" {text} "}
    for name, frame in frames.items():
        rows = supervise(tokenizer, template(name), messages)
        expected = [frame(content) + "<|im_end|>" for content in said]
        assert [tokenizer.decode(run) for run in trained(rows)] == expected
        assert all(run.count(tokenizer.added["<|im_end|>"]) == 1 for run in trained(rows))
        targets = sum(len(tokenizer.encode_content(frame(content))) + 1 for content in said)
        assert sum(row.targets for row in rows) == targets


def test_a_conversation_is_one_row_where_the_template_allows_it(
    tokenizer: Tokenizer, template: Templates
):
    # Encoded as one text, the line ends before and in the first answer would share a token.
    messages = [user("a"), assistant("\n\nb"), user("c"), assistant(" d")]
    assert tokenizer.encode("\n\n\n") != tokenizer.encode("\n") + tokenizer.encode("\n\n")
    for name in KEEPS_CONTENT:
        rows = supervise(tokenizer, template(name), messages)
        assert len(rows) == 1
        rendered = template(name).render(messages)
        assert rendered.startswith(tokenizer.decode(rows[0].tokens))
        assert rows[0].tokens[-1] == tokenizer.added["<|im_end|>"]  # and not the "\n" after it


def test_a_template_that_rewrites_the_past_gets_a_row_for_each_turn(
    tokenizer: Tokenizer, template: Templates
):
    messages = [user("a"), assistant("hm</think>b"), user("c"), assistant("hm</think>d")]
    rows = supervise(tokenizer, template("forgetful"), messages)
    assert [row.tokens[: starts(row)[0]] for row in rows] == [
        tuple(prompt_ids(tokenizer, template("forgetful"), messages[:i])) for i in (1, 3)
    ]
    assert "hm" not in tokenizer.decode(rows[1].tokens[: starts(rows[1])[0]])
    texts = [tokenizer.decode(run) for run in trained(rows)]
    assert texts == ["hm</think>b<|im_end|>", "hm</think>d<|im_end|>"]
    # Without thoughts the past stays as it was, and one row will do.
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert len(supervise(tokenizer, template("forgetful"), messages)) == 1


def test_an_answer_keeps_the_tokens_that_models_think_with(thinking: Tokenizer):
    text = "<think>hm</think><|user|>"
    (row,) = supervise(thinking, CHATML, [user(text), assistant(text)])
    for token, count in (("<think>", 1), ("</think>", 1), ("<|user|>", 0)):
        assert row.tokens.count(thinking.added[token]) == count
    (run,) = trained([row])
    assert run[0] == thinking.added["<think>"]
    assert thinking.decode(run) == text + "<|im_end|>"


@pytest.fixture(scope="module")
def thinking(tokenizer: Tokenizer) -> Tokenizer:
    backend = type(tokenizer._backend).from_str(tokenizer._backend.to_str())
    backend.add_tokens(["<think>", "</think>", "<|user|>"])
    return Tokenizer(backend, tokenizer.names)


def test_what_the_template_writes_before_an_answer_is_the_model_s_to_write(thinking: Tokenizer):
    source = (  # as gpt-oss: a channel; as Qwen3: an empty thought where an answer has none
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "<|pad|>final\n{% if '<think>' not in m.content %}<think></think>\n{% endif %}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    template = ChatTemplate(source)
    for said, written in (("b", "<think></think>\nb"), ("<think>hm</think>b",) * 2):
        messages = [user("a<|pad|>"), assistant(said), user("c"), assistant(said)]
        rows = supervise(thinking, template, messages)
        assert len(rows) == 1
        pads = thinking.added["<|pad|>"]
        for run in trained(rows):
            assert thinking.decode(run) == f"<|pad|>final\n{written}<|im_end|>"
            assert run[0] == pads
            assert thinking.added["<think>"] in run
        assert rows[0].tokens.count(pads) == 2


def test_a_thought_that_the_prompt_has_opened_is_not_opened_again(thinking: Tokenizer):
    header = "<|im_start|>assistant\n<think>\n"
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>{% endfor %}"
    opens = turns + "{% if add_generation_prompt %}" + header + "{% endif %}"
    messages = [user("a"), assistant("<think>\nhm</think>b")]
    for content in (
        "m.content",
        "m.content.split('</think>')[-1]",
        "m.content | replace('a', 'a')",
    ):
        (row,) = supervise(thinking, ChatTemplate(opens.replace("CONTENT", content)), messages)
        assert thinking.decode(row.tokens) == (
            f"<|im_start|>user\na<|im_end|>{header}hm</think>b<|im_end|>"
        )
        assert thinking.decode(row.tokens[starts(row)[0] :]) == "hm</think>b<|im_end|>"


def test_a_space_before_the_answer_is_the_answer_s(
    spaced_tokenizer: Tokenizer, template: Templates
):
    messages = [user("the cat"), assistant("sat"), user("on"), assistant("the mat")]
    rows = supervise(spaced_tokenizer, template("spaced"), messages)
    assert len(rows) == 1
    assert str(spaced_tokenizer.token(trained(rows)[0][0])).startswith("▁")
    # This tokenizer also puts a space after each control token.
    text = spaced_tokenizer.decode(rows[0].tokens).replace("> ", ">")
    assert text == template("spaced").render(messages)


def test_an_answer_may_come_first(tokenizer: Tokenizer):
    (row,) = supervise(tokenizer, CHATML, [assistant("hello"), user("x")])
    assert tokenizer.decode(row.tokens) == "<|im_start|>assistant\nhello<|im_end|>"


def test_an_empty_answer_among_others_is_its_stop_token(tokenizer: Tokenizer):
    messages = [user("a"), assistant(""), user("b"), assistant("c")]
    rows = supervise(tokenizer, CHATML, messages)
    assert [tokenizer.decode(run) for run in trained(rows)] == ["<|im_end|>", "c<|im_end|>"]


def test_nothing_to_train_on_is_refused(tokenizer: Tokenizer):
    with pytest.raises(TextError, match="nothing to train on: there is no assistant message"):
        supervise(tokenizer, CHATML, [user("a")])
    with pytest.raises(TextError, match="nothing to train on: every assistant message is empty"):
        supervise(tokenizer, CHATML, [user("a"), assistant("")])


def test_an_answer_needs_a_stop_token(tokenizer: Tokenizer, template: Templates):
    messages = [user("a"), assistant("b")]
    eos = tokenizer.special.eos
    assert trained(supervise(tokenizer, template("plain"), messages))[0][-1] == eos
    assert trained(supervise(tokenizer, template("plain"), messages, 5))[0][-1] == 5
    with pytest.raises(TextError, match="could not learn where to stop; give stop_id"):
        supervise(Tokenizer(tokenizer._backend), template("plain"), messages)


def test_another_stop_token_takes_the_place_of_the_terminator_and_its_space(
    tokenizer: Tokenizer, template: Templates
):
    rows = supervise(tokenizer, template("spaced"), [user("a"), assistant("b")], 5)
    assert trained(rows) == [[*tokenizer.encode_content(" b"), 5]]


def test_an_answer_that_holds_its_stop_token_is_refused(thinking: Tokenizer):
    messages = [user("a"), assistant("<think>hm</think>b")]
    with pytest.raises(TextError, match="message 2 of 2 holds the stop token '</think>'"):
        supervise(thinking, CHATML, messages, thinking.added["</think>"])


def test_template_variables_reach_every_rendering(tokenizer: Tokenizer):
    template = ChatTemplate(
        CHATML.source + "{% if quiet and add_generation_prompt %}(quiet){% endif %}"
    )
    messages = [user("a"), assistant("b")]
    (row,) = supervise(tokenizer, template, messages, quiet=True)
    prompt = tokenizer.decode(row.tokens[: starts(row)[0]])
    assert prompt.endswith("assistant\n(quiet)")
    assert prompt_ids(tokenizer, template, messages[:1], quiet=True) == list(
        row.tokens[: starts(row)[0]]
    )
