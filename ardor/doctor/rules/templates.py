"""Rules about chat templates: do training and inference see the same, and where do answers end."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.lexer import get_lexer
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ardor.doctor.checkpoint import TOKENIZER_CONFIG, Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed
from ardor.doctor.ids import rendered
from ardor.errors import TextError
from ardor.text.chat import ChatTemplate, prompt_ids
from ardor.text.tokenizer import Tokenizer

QUESTION, ANSWER = ({"role": r, "content": c} for r, c in (("user", "Qx"), ("assistant", "Ax")))
NEXT, LAST = ({"role": r, "content": c} for r, c in (("user", "Qy"), ("assistant", "Ay")))
THOUGHT = {"role": "assistant", "content": "<think>\nTx\n</think>\n\nAx"}
SYSTEM, TOOL = {"role": "system", "content": "Sx"}, {"role": "tool", "content": "Rx"}
DATES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 9, 8, 7))
OPEN, CLOSE = "\ue000", "\ue001"  # written where a generation block begins and ends
MARKED_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def template_file(it: Checkpoint) -> Findings:
    """The chat template is valid, and renders a question and its answer."""
    if problem := it.problems.get("template"):
        yield Finding("E", "the chat template cannot be read", problem, "mend or replace it")
    elif it.template is not None and (problem := _refusal(it, QUESTION, ANSWER)):
        fix = "mend it, or fine-tune with another --chat-template"
        yield Finding("E", "the chat template refuses a plain question and answer", problem, fix)


def template_copies(it: Checkpoint) -> Findings:
    """chat_template.jinja and tokenizer_config.json hold the same template."""
    if it.text_path is None:
        return
    file, held = it.text_path / "chat_template.jinja", it.tokenizer_config.get("chat_template")
    if file.is_file() and isinstance(held, str) and it.template is not None:
        if held.strip() != it.template.source.strip():
            yield Finding(
                "W",
                f"chat_template.jinja and {TOKENIZER_CONFIG} hold different chat templates",
                f"first difference: {_difference(it.template.source, held)}",
                "keep one: the jinja file wins here and in transformers 5, the other before that",
            )
    elif isinstance(held, list):
        names = [entry.get("name") for entry in held if isinstance(entry, Mapping)]
        yield Finding(
            "I",
            f"{len(names)} chat templates, of which Ardor takes 'default'",
            listed(names),
            "none; other programs take 'tool_use' where tools are given",
        )


def double_bos(it: Checkpoint) -> Findings:
    """A rendered conversation begins with one BOS: the template's, or the tokenizer's.

    Ardor encodes what a template writes as it is, so BOS is there once if the template writes it.
    None where the tokenizer would add one is a warning: the base model has always seen it. One from
    each is for information: so are Llama 3 and Gemma, and only who renders first and encodes the
    text afterwards has two.
    """
    tokenizer, text = it.tokenizer, _render(it, QUESTION, prompts=True)
    if tokenizer is None or text is None or tokenizer.special.bos is None:
        return
    bos, ids = tokenizer.special.bos, tokenizer.encode_template(text)
    shown = f"a question is {[tokenizer.token(id) for id in ids[:4]]} ..."
    if ids[:2] == [bos, bos]:
        fix = "take one bos_token out of the template"
        yield Finding("E", "the chat template writes BOS twice", shown, fix)
    elif ids[:1] == [bos] and bos in tokenizer.prefix:
        yield Finding(
            "I",
            "the chat template writes BOS, and the tokenizer puts one before every text",
            shown,
            "none here; elsewhere encode rendered text with add_special_tokens=False",
        )
    elif bos in tokenizer.prefix and bos not in ids:
        yield Finding(
            "W",
            "the chat template writes no BOS, which the tokenizer puts before every other text",
            shown,
            "begin the template with {{ bos_token }}, unless the model was trained without",
        )


def template_end(it: Checkpoint) -> Findings:
    """The template ends the last answer with a control token.

    Ardor trains each answer to its terminator, or to EOS, whatever the template leaves out; without
    either it cannot, which is an error.
    """
    tokenizer, text = it.tokenizer, _render(it, QUESTION, ANSWER)
    if tokenizer is None or text is None:
        return
    _, _, after = text.rpartition(ANSWER["content"])
    if any(isinstance(part, int) for part in tokenizer.split(after)):
        return
    nowhere = it.terminator is None and tokenizer.special.eos is None
    between = "" if it.terminator is None else f", and {tokenizer.token(it.terminator)} between"
    yield Finding(
        "E" if nowhere else "W",
        "the chat template writes no end after the last answer",
        f"after it stands {after!r}{between}",
        "write {{ eos_token }} after each assistant content (doctor --fix adds it at the end): "
        "other trainers teach the model not to stop",
    )


def generation_prompt(it: Checkpoint) -> Findings:
    """With add_generation_prompt the prompt reaches to where the answer begins."""
    tokenizer = it.tokenizer
    prompt, whole = _render(it, QUESTION, prompts=True), _render(it, QUESTION, ANSWER)
    if tokenizer is None or prompt is None or whole is None:
        return
    if not whole.startswith(prompt):
        yield Finding(
            "W",
            "the prompt of a question is not how the rendered conversation begins",
            f"first difference: {_difference(prompt, whole)}",
            "mend add_generation_prompt; Ardor trains on the prompt that inference gives",
        )
        return
    between = whole[len(prompt) :].partition(ANSWER["content"])[0]
    parts = tokenizer.split(between)
    if any(isinstance(part, int) and part not in tokenizer.tags for part in parts):
        yield Finding(
            "W",
            "add_generation_prompt does not write the header of the answer",
            f"the model itself would have to write {between!r}",
            "write it in the template where add_generation_prompt is true",
        )


def keeps_past(it: Checkpoint) -> Findings:
    """What the model was given at one turn is how the next turn begins.

    For information: Qwen3 and others drop earlier thoughts. Ardor gives each such turn a row of its
    own, as inference sees it; elsewhere one rendering of the whole is trained on.
    """
    for first in (ANSWER, THOUGHT):
        begun, whole = _render(it, QUESTION, first), _render(it, QUESTION, first, NEXT, LAST)
        shorter = None if begun is None else begun.rstrip()
        if shorter is not None and whole is not None and not whole.startswith(shorter):
            yield Finding(
                "I",
                "the chat template writes earlier turns differently once others follow",
                f"first difference: {_difference(shorter, whole)}",
                "none here: such a turn is trained in a row of its own",
            )
            return


def generation_tag(it: Checkpoint) -> Findings:
    """A template that marks its answers for trainers marks them whole, and where they see it."""
    if it.template is None or it.tokenizer is None:
        return
    inside = _blocks_around_tag(it.template.source)
    if inside is None:
        return
    hidden = [kind for kind in inside if kind in ("macro", "set", "call", "filter")]
    if hidden:
        yield Finding(
            "W",
            f"{{% generation %}} stands inside a {hidden[0]} block",
            f"blocks around it: {' > '.join(inside)}",
            "move it to the top level: transformers puts the mask elsewhere; Ardor needs no tag",
        )
    elif outside := _end_outside_tag(it):
        yield Finding(
            "W",
            "the end of an answer stands outside {% generation %}",
            f"after the tag the template writes {outside!r}",
            "move the end inside: trainers that go by the tag never teach it; Ardor does",
        )


def roles(it: Checkpoint) -> Findings:
    """What system, user, assistant and tool say appears in the prompt, or is refused aloud.

    That a template refuses a role is for information: Gemma's and Mistral's first do.
    """
    cases = {
        "system": (SYSTEM, QUESTION),
        "user": (QUESTION,),
        "assistant": (QUESTION, ANSWER, NEXT),
        "tool": (QUESTION, ANSWER, TOOL),
    }
    if it.template is None or _refusal(it, QUESTION, ANSWER):
        return
    lost, refused = [], []
    for role, messages in cases.items():
        if _refusal(it, *messages) is not None:
            refused.append(role)
            continue
        said = next(m["content"] for m in messages if m["role"] == role)
        if said not in (_render(it, *messages) or ""):
            lost.append(role)
    if lost:
        worst = "E" if {*lost} & {"user", "assistant"} else "W"
        what = f"the chat template leaves out what {' and '.join(lost)} says"
        fix = "mend the template, or leave that role out of the data"
        yield Finding(worst, what, "its content does not appear in the rendering", fix)
    if refused:
        what = f"the chat template refuses the role {' and '.join(refused)}"
        fix = "put that text into a user message"
        yield Finding("I", what, _refusal(it, *cases[refused[0]]) or "", fix)


def injection(it: Checkpoint) -> Findings:
    """What people write stays text, even where it spells the template's own control tokens.

    Ardor encodes contents apart from the template's text; a template that rewrites them leaves no
    such seam, and then a content that spells a control token is refused.
    """
    tokenizer, stop = it.tokenizer, it.terminator
    if tokenizer is None or it.template is None or stop is None:
        return
    spelled = f"a {tokenizer.token(stop)} b"
    try:
        ids = prompt_ids(tokenizer, it.template, [{"role": "user", "content": spelled}])
    except TextError as error:
        yield Finding(
            "I",
            "contents that spell a control token are refused: the template rewrites contents",
            str(error).partition(";")[0],
            "write contents as they are in the template; elsewhere they become the token",
        )
        return
    plain = prompt_ids(tokenizer, it.template, [{"role": "user", "content": "a b"}])
    if ids.count(stop) > plain.count(stop):
        yield Finding(
            "E",
            "a user can write the token that ends a turn",
            f"{spelled!r} becomes {ids}",
            "mark it as an added token in tokenizer.json",
        )


def time_dependent(it: Checkpoint) -> Findings:
    """The same messages are rendered to the same prompt on any day."""
    template = it.template
    if template is None:
        return
    texts = []
    for date in DATES:
        source = ChatTemplate(
            template.source, name=template.name, tokens=template.tokens, clock=lambda at=date: at
        )
        texts.append(_text(it.tokenizer, source, (QUESTION,), True))
    if texts[0] != texts[1] and None not in texts:
        yield Finding(
            "I",
            "the chat template writes today's date",
            f"first difference: {_difference(str(texts[0]), str(texts[1]))}",
            "give the date as a template variable where prompts must be the same every day",
        )


def _text(
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    messages: Sequence[dict[str, Any]],
    prompts: bool,
) -> str | None:
    if template is None or tokenizer is None:
        return None
    try:
        return rendered(template, tokenizer, messages, prompts=prompts)
    except TextError:
        return None


def _render(it: Checkpoint, *messages: dict[str, Any], prompts: bool = False) -> str | None:
    """None where there is no template, or it refuses the messages."""
    return _text(it.tokenizer, it.template, messages, prompts)


def _refusal(it: Checkpoint, *messages: dict[str, Any]) -> str | None:
    """Why the template refuses messages; None if it renders them."""
    if it.template is None or it.tokenizer is None:
        return None
    try:
        rendered(it.template, it.tokenizer, messages, prompts=False)
    except TextError as error:
        return str(error)
    return None


def _difference(one: str, other: str) -> str:
    """Where two texts first differ, with a few characters before and after."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, at - 12)
    return f"{one[start : at + 24]!r} and {other[start : at + 24]!r}"


def _blocks_around_tag(source: str) -> list[str] | None:
    """The kinds of the blocks that the first generation tag stands in; None if there is none."""
    lexer = get_lexer(ImmutableSandboxedEnvironment())
    stack: list[str] = []
    tokens = [(kind, text) for _, kind, text in lexer.tokeniter(source, None) if text.strip()]
    for i, (kind, _) in enumerate(tokens):
        if kind != "block_begin":
            continue
        name = tokens[i + 1][1]
        if name == "generation":
            return stack
        if name.startswith("end") and stack:
            stack.pop()
        elif name in ("for", "if", "macro", "call", "filter", "with", "block"):
            stack.append(name)
        elif name == "set":  # with an "=" it is no block
            end = next(j for j in range(i, len(tokens)) if tokens[j][0] == "block_end")
            if not any(text == "=" for _, text in tokens[i:end]):
                stack.append("set")
    return None


def _end_outside_tag(it: Checkpoint) -> str | None:
    """What the template writes after the tag's end, if the terminator is there."""
    assert it.template is not None and it.tokenizer is not None

    def mark(match: re.Match[str]) -> str:
        char = CLOSE if match[2] else OPEN
        return f"{{{{{match[1]} '{char}' {match[3]}}}}}"

    source = MARKED_TAG.sub(mark, it.template.source)
    marked = ChatTemplate(source, name=it.template.name, tokens=it.template.tokens)
    text = _text(it.tokenizer, marked, (QUESTION, ANSWER), False)
    if text is None or CLOSE not in text:
        return None
    inside, _, after = text[text.index(OPEN) + 1 :].partition(CLOSE)
    end = inside.rpartition(ANSWER["content"])[2]
    if any(isinstance(part, int) for part in it.tokenizer.split(end)):
        return None
    return after if any(isinstance(part, int) for part in it.tokenizer.split(after)) else None


RULES: Registry = {
    "template-file": template_file,
    "template-copies": template_copies,
    "double-bos": double_bos,
    "template-end": template_end,
    "generation-prompt": generation_prompt,
    "keeps-past": keeps_past,
    "generation-tag": generation_tag,
    "roles": roles,
    "injection": injection,
    "time-dependent": time_dependent,
}
