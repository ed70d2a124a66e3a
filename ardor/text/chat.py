"""Conversations to token ids: what inference is given, and what training is given, the same way.

A template's own text is encoded with its control tokens counted; what people wrote is encoded as
content, where a spelled-out control token stays text. A training row is the ids of the prompt, then
the ids of the answer, then the stop token: ids are joined, never strings, so the row begins exactly
with what inference would be given.
"""

import re
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from ardor.errors import TextError
from ardor.text.example import EMPTY, Example
from ardor.text.messages import (
    Messages,
    TrainOn,
    call_name,
    checked,
    text_of,
    trained_turns,
)
from ardor.text.named import CHATML as CHATML_SOURCE
from ardor.text.provenance import Conversation, Piece, after, before
from ardor.text.special import Place
from ardor.text.template import ChatTemplate
from ardor.text.tokenizer import Tokenizer

CHATML = ChatTemplate(CHATML_SOURCE, name="ChatML")

__all__ = [
    "CHATML",
    "ChatTemplate",
    "Messages",
    "TrainOn",
    "checked",
    "prompt_ids",
    "supervise",
    "terminator",
]

# A prompt that has opened what the answer is to go on in, such as a thought.
_OPENED = re.compile(r"<(?P<name>[A-Za-z][\w-]*)>(?P<space>\s*)$")
# One that has opened and closed it: a thought that is not wanted.
_CLOSED = re.compile(r"<(?P<name>[A-Za-z][\w-]*)>\s*</(?P=name)>\s*$")
# The end of a thought that stands in a content, with the white space after it.
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>(?P<space>\s*)")


def prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> list[int]:
    """What a model is given to answer the conversation: ids up to where its answer begins.

    With `continue_final_message`, up to the end of the last message, which it goes on with. Control
    tokens count in the template's text only; BOS is there if the template writes it. Equal to
    transformers' `apply_chat_template` ids unless somebody spells a control token, or an earlier
    answer would have merged with the text before it. `variables` as for `ChatTemplate.render`.

    Raises: TextError for malformed or refused messages, and for control tokens where they cannot be
    kept as text: in a role, or where the template rewrites what spells them.
    """
    if not messages:
        raise TextError("there are no messages; give at least one")
    encoder = _Encoder(tokenizer, template, checked(messages), variables)
    if continue_final_message:
        return encoder.continued()
    return encoder.prompt(len(messages))[1]


def terminator(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The control token that the template writes right after an answer, or None.

    None also for a template that refuses a plain question and answer.
    """
    return _turn(tokenizer, template).stop


def supervise(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    stop_id: int | None = None,
    *,
    train_on: TrainOn = "all",
    given: int = 0,
    **variables: Any,
) -> list[Example]:
    """Training rows of a conversation: answers and the stop token after each, nothing else.

    Trained on are "all" answers or the "last" one, after the first `given` messages, and as the
    messages say themselves (see `trained_turns`). Before each stand exactly the `prompt_ids` of its
    turn. Turns share a row while the template lets them; where it writes the past differently from
    what was said (Qwen3 drops thoughts), the turn gets a row of its own. What the template writes
    between the prompt and the answer, or between the answer and its terminator, is trained on with
    it, since the model has to write it: a space in Llama 2, an empty thought in Qwen3. A thought
    that the template leaves out of what it writes is put before its answer, as the model would
    write it. `stop_id` defaults to what the template writes after this answer, then to its
    terminator, then to EOS.

    Raises: TextError if there is nothing to train on, no stop token, a call or thought to be
    trained on that the template does not write, or as for `prompt_ids`.
    """
    messages = checked(messages)
    turns = trained_turns(messages, train_on, given)
    _require_something(messages, turns)
    encoder = _Encoder(tokenizer, template, messages, variables)
    rows: list[Example] = []
    for i in turns:
        text, prompt = encoder.prompt(i)
        answer, end = encoder.answer(i, text)
        ends = (stop_id, end, encoder.stop, tokenizer.special.eos)
        stop = next((id for id in ends if id is not None), None)
        if stop is None:
            raise TextError(
                f"{template.name} writes no control token after an answer and the tokenizer has no "
                "EOS token, so a model could not learn where to stop; give stop_id, or set "
                "eos_token in tokenizer_config.json"
            )
        ids = encoder.join(answer.body if stop != end else answer.body + answer.trail, "middle")
        if stop in ids:
            raise TextError(
                f"message {i + 1} of {len(messages)} holds the stop token "
                f"{tokenizer.token(stop)!r} inside its answer; remove it from the content"
            )
        shared = len(rows[-1].tokens) if rows else 0
        if rows and tuple(prompt[:shared]) == rows[-1].tokens:
            row = rows.pop().then(prompt[shared:], supervised=False)
        else:
            row = EMPTY.then(prompt, supervised=False)
        rows.append(row.then([*ids, stop], supervised=True))
    return rows


def _require_something(messages: list[dict[str, Any]], turns: list[int]) -> None:
    """Raises: TextError unless a message of `turns` says anything."""
    if any(text_of(messages[i]) or messages[i].get("tool_calls") for i in turns):
        return
    answers = [message for message in messages if message["role"] == "assistant"]
    if turns:
        which = "" if len(turns) == len(answers) else " that is trained on"
        what = f"every assistant message{which} is empty"
    elif answers:
        what = "no assistant message is to be trained on"
    else:
        what = "there is no assistant message"
    raise TextError(f"nothing to train on: {what}; drop the conversation or mend it")


class _Turn(NamedTuple):
    glue: str = ""  # plain text of the template that comes after the prompt, next to the answer
    stop: int | None = None


class _Answer(NamedTuple):
    body: list[Piece]
    trail: list[Piece]  # white space that the template writes between it and its own stop token


class _Encoder:
    """The renderings of one conversation: with the same variables and clock reading for each."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
    ) -> None:
        template = template.choose(variables.get("tools"))
        self.tokenizer, self.template = tokenizer, template
        self.messages = messages
        values = template.prepared({**tokenizer.names, **variables})
        self.said = Conversation(tokenizer, template, template.readable(messages), values)
        self.answers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
        self.glue, self.stop = _turn(tokenizer, template)
        # Each turn of a conversation repeats those before it.
        self.encode = cache(
            lambda text, tags, place: tokenizer.encode_content(text, tags=tags, place=place)
        )

    def prompt(self, count: int) -> tuple[str, list[int]]:
        """The text and the ids that the model is given to go on from the first `count` messages."""
        text = self.said.text(count, True)
        asked = any(message["role"] == "user" for message in self.messages[:count])
        tools = self.said.variables.get("tools") if asked else None
        if tools and not any(str(call_name(tool)) in text for tool in tools):
            raise TextError(
                f"{self.template.name} does not write the tools that it is given, so the model "
                "would not know of them; leave them out, or choose a chat template that does"
            )
        return text, self.join(self.said.pieces(count, text, True), "start")

    def continued(self) -> list[int]:
        """The ids that the model is given to go on with the last message."""
        count = len(self.messages)
        begun = self.template.write_continued(self.said.messages, self.said.variables)
        text = self.said.text(count, False)
        if not text.startswith(begun):
            raise TextError(
                f"{self.template.name} writes a last message that is gone on with in another way "
                "than one that is whole, so it cannot be continued; ask for a new answer"
            )
        return self.join(before(self.said.pieces(count, text, False), len(begun)), "start")

    def answer(self, number: int, prompt: str) -> tuple[_Answer, int | None]:
        """What the model should write after `prompt` to give message `number`, and the control
        token that the template writes there, which is not in it."""
        text = self.said.text(number + 1, False)
        pieces = self.said.pieces(number + 1, text, False)
        message = self.messages[number]
        opened = _OPENED.search(prompt)
        if text.startswith(prompt):
            tail = after(pieces, len(prompt))
            thought = _lost_thought(message, tail, None)
        elif opened and text.startswith(prompt[: opened.start()]):
            tail, thought = self._in_thought(message, pieces, opened)
        elif (closed := _CLOSED.search(prompt)) and text.startswith(prompt[: closed.start()]):
            tail, thought = after(pieces, closed.start()), ""
            if _text(tail).startswith(f"<{closed['name']}>"):
                raise self._refuse(number, "a thought, and the prompt says that there is none")
        elif (elsewhere := self._after_header(number, prompt, text, pieces)) is not None:
            tail, thought = elsewhere, _lost_thought(message, elsewhere, None)
        elif message.get("tool_calls") and (own := self._to_its_question(number)) is not None:
            tail, thought = own, _lost_thought(message, own, None)
        else:
            if message.get("tool_calls") or "reasoning_content" in message:
                raise TextError(
                    f"message {number + 1} of {len(self.messages)} holds calls or a thought, and "
                    f"{self.template.name} writes them after another text than its own generation "
                    "prompt, so no prompt leads to them; leave the message out of training with "
                    '"train": false, or choose another chat template'
                )
            framed, end = self._end(pieces, number)
            content = text_of(message)
            if opened and content.startswith(tag := f"<{opened['name']}>"):
                content = content.removeprefix(tag).removeprefix(opened["space"])
            return _Answer([Piece(content, number)], framed.trail), end
        found, end = self._end(tail, number)
        self._require_written(number, _text(found.body) + thought)
        body = [Piece(thought, number), *found.body] if thought else found.body
        return _Answer(body, found.trail), end

    def _after_header(
        self, number: int, prompt: str, text: str, pieces: list[Piece]
    ) -> list[Piece] | None:
        """What follows the answer's header, where the template writes what came before the answer
        in another way than in the prompt: documents or a system message that move."""
        bare = self.said.text(number, False)
        header = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        ends = accumulate(len(piece.text) for piece in pieces)
        earlier = range(number)
        begin = max(
            (end for end, piece in zip(ends, pieces, strict=True) if piece.owner in earlier),
            default=0,
        )
        if not header.strip() and number:  # a prompt that ends with the question's own frame
            asked = self.said.pieces(number, prompt, True)
            last = max((i for i, p in enumerate(asked) if p.owner == number - 1), default=None)
            header = "" if last is None else _text(asked[last + 1 :])
            at = begin if header and text.startswith(header, begin) else -1
        else:
            at = text.find(header, begin) if header.strip() else -1
        return None if at < 0 else after(pieces, at + len(header))

    def _to_its_question(self, number: int) -> list[Piece] | None:
        """The answer as the template writes it after its own generation prompt, to the last
        question alone: DeepSeek's leaves the head of calls out once calls were made before."""
        messages = self.said.messages
        asked = [i for i in range(number) if messages[i]["role"] == "user"][-1:]
        short = [messages[i] for i in (*asked, number)]
        said = Conversation(self.tokenizer, self.template, short, self.said.variables)
        try:
            prompt, text = said.text(len(asked), True), said.text(len(short), False)
        except TextError:
            return None
        if not asked or not text.startswith(prompt) or _OPENED.search(prompt):
            return None
        tail = after(said.pieces(len(short), text, False), len(prompt))
        return [p._replace(owner=number) if p.owner == len(asked) else p for p in tail]

    def _in_thought(
        self, message: dict[str, Any], pieces: list[Piece], opened: re.Match[str]
    ) -> tuple[list[Piece], str]:
        """What comes after a prompt that has opened a thought, where history is written otherwise:
        the template's own text, and the rest of the thought before it."""
        tail = after(pieces, opened.start())
        tag = f"<{opened['name']}>"
        if not _text(tail).startswith(tag):
            return tail, _lost_thought(message, tail, opened)
        tail = after(tail, len(tag))
        space = opened["space"]
        return after(tail, len(space)) if _text(tail).startswith(space) else tail, ""

    def _end(self, tail: list[Piece], number: int) -> tuple[_Answer, int | None]:
        """The answer in what the template writes from its beginning on, and its stop token.

        That is the terminator, or else the control token that the text ends with. Where there is
        neither, the answer ends with the content.
        """
        last = max((i for i, piece in enumerate(tail) if piece.owner == number), default=-1)
        calls = bool(self.messages[number].get("tool_calls"))
        end = None
        for i, piece in enumerate(tail):
            if i <= last or piece.owner is not None:
                continue
            at = 0
            for part in self.tokenizer.split(piece.text):
                if not isinstance(part, int):
                    at = piece.text.index(part, at) + len(part)
                    continue
                token = self.tokenizer.token(part) or ""
                start = max(piece.text.find(token, at), at)
                at = start + len(token)
                closes = (
                    part not in self.tokenizer.tags
                    and not (piece.text[at:] + _text(tail[i + 1 :])).strip()
                )
                if part == self.stop or closes:
                    end = part
                    kept = [*tail[:i], Piece(piece.text[:start], None)]
                    return _split_trail(kept, last), end
        if last >= 0 and not calls:
            return _Answer(tail[: last + 1], []), None
        return _Answer(before(tail, len(_text(tail).rstrip())), []), None

    def _require_written(self, number: int, written: str) -> None:
        message = self.messages[number]
        for call in message.get("tool_calls", ()):
            if call_name(call) not in written:
                raise self._refuse(number, f"a call of {call_name(call)!r}")
        if message.get("reasoning_content", "").strip() not in written:
            raise self._refuse(number, "a thought in 'reasoning_content'")

    def _refuse(self, number: int, what: str) -> TextError:
        return TextError(
            f"message {number + 1} of {len(self.messages)} holds {what}, which "
            f"{self.template.name} does not write, so it cannot be trained on; take it out, or "
            "choose a chat template that does"
        )

    def join(self, pieces: list[Piece], place: Place) -> list[int]:
        """The ids of `pieces`: plain text is encoded in runs between control tokens, as if typed.

        A run is cut where an answer begins: a model that answers starts with a new token there.
        """
        ids: list[int] = []
        run, owner = "", None

        def cut(next_place: Place, next_owner: int | None = None) -> None:
            nonlocal run, place, owner
            ids.extend(self.encode(run, owner in self.answers, place))
            run, place, owner = "", next_place, next_owner

        for piece in _with_glue(pieces, self.answers, self.glue):
            if piece.owner is None:
                for part in self.tokenizer.split(piece.text):
                    if isinstance(part, int):
                        cut("segment")
                        ids.append(part)
                    else:
                        run += part
                continue
            if piece.owner != owner and (piece.owner in self.answers or owner in self.answers):
                cut("middle", piece.owner)
            run += piece.text
        cut("middle")
        return ids


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _split_trail(pieces: list[Piece], last: int) -> _Answer:
    """White space at the end that is the template's belongs to its stop token."""
    head, tail = pieces[: last + 1], pieces[last + 1 :]
    if last >= 0 and not _text(tail).strip():
        return _Answer(head, tail)
    return _Answer(pieces, [])


def _lost_thought(
    message: dict[str, Any], written: list[Piece], opened: re.Match[str] | None
) -> str:
    """The thought of an answer that the template leaves out, as the model would write it."""
    content, text = text_of(message), _text(written)
    found = _THOUGHT_END.search(content)
    if found and found[0].strip() not in text:
        space = found["space"]  # which some templates keep before the answer
        thought = content[: found.end()]
        thought = thought.removesuffix(space) if text.startswith(space) else thought
        if opened and thought.startswith(tag := f"<{opened['name']}>"):
            thought = thought.removeprefix(tag).removeprefix(opened["space"])
        return thought
    if opened is None or found:
        return ""
    # The model has to close what the prompt has opened, be there a thought or none.
    thought = message.get("reasoning_content", "").strip("\n")
    return f"{thought}\n</{opened['name']}>\n\n" if thought not in text or not thought else ""


def _with_glue(pieces: list[Piece], answers: set[int], glue: str) -> list[Piece]:
    """The same text, with the glue before an answer counted as the answer's."""
    moved = list(pieces)
    for i, piece in enumerate(pieces[1:]):
        said = pieces[i].text
        if glue and piece.owner in answers and pieces[i].owner is None and said.endswith(glue):
            moved[i] = Piece(said.removesuffix(glue), None)
            moved[i + 1] = Piece(glue + piece.text, piece.owner)
    return moved


@lru_cache(maxsize=8)
def _turn(tokenizer: Tokenizer, template: ChatTemplate) -> _Turn:
    """How the template frames an answer, read off a small conversation."""
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    turns = template.readable([question, answer, question])
    said = Conversation(tokenizer, template, turns, template.prepared(tokenizer.names))

    def literals(count: int) -> list[str]:
        pieces = said.cut(count, said.text(count, False), False) or []
        return [piece.text for piece in pieces if piece.owner is None]

    try:
        prompt = said.text(1, True)
        once = literals(2)
    except TextError:
        return _Turn()
    if len(once) != 3:
        return _Turn()
    asked = once[0] + question["content"] + once[1]
    lead = asked[len(prompt) :] if asked.startswith(prompt) else ""
    *_, glue = ("", *tokenizer.split(lead))
    glue = glue if isinstance(glue, str) else ""
    stop = _ending(tokenizer, once[2])
    if stop is None:
        # Some write it only between turns. There the token that opens the next turn follows too.
        try:
            twice = literals(3)
        except TextError:
            return _Turn(glue)
        opening = {part for part in tokenizer.split(once[0]) if isinstance(part, int)}
        stop = _ending(tokenizer, twice[2]) if len(twice) == 4 else None
        if stop in opening:
            return _Turn(glue)
    return _Turn(glue, stop)


def _ending(tokenizer: Tokenizer, text: str) -> int | None:
    """The control token that `text` begins with, white space aside."""
    match tokenizer.split(text):
        case [int(stop), *_]:
            return stop
        case [str(space), int(stop), *_] if space.isspace():
            return stop
    return None
