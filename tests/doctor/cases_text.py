"""What is wrong with special tokens and templates, and what only looks alike.

All start from a model that chats in ChatML: <|endoftext|> is 276, <|pad|> 277, <|im_start|> 278,
<|im_end|> 279.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ardor.text.chat import CHATML_SOURCE

from .damage import EMBED, Case, Change, edit, flag, template, together, tokenizer, value, weights

BLOCK = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BETWEEN = (
    "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_END_ASK = NO_END + "{% if add_generation_prompt %}assistant: {% endif %}"
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
END_OUTSIDE = TAGGED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
IN_MACRO = (
    "{% macro answer(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% endmacro %}"
    + TAGGED.replace(
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", "{{ answer(m) }}"
    )
)
IN_SET = TAGGED.replace("{% generation %}", "{% set x %}{% generation %}").replace(
    "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ x }}"
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    + ASK
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
)
REWRITES = BLOCK.replace("m.content", "m.content.split('|>')[-1]") + ASK
BOS_TWICE = "{{ bos_token }}{{ bos_token }}" + BLOCK + ASK
BOS_ONCE = "{{ bos_token }}" + BLOCK + ASK


def around(before: str | None = None, after: str | None = None) -> Change:
    """tokenizer.json puts these tokens around a text."""
    pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<|endoftext|>": 276, "<|im_start|>": 278}
    pieces = [{"SpecialToken": {"id": before, "type_id": 0}}, *pieces] if before else pieces
    pieces = [*pieces, {"SpecialToken": {"id": after, "type_id": 0}}] if after else pieces
    special = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (before, after) if name
    }
    post = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    return tokenizer(lambda held: held.update(post_processor=post))


def named(**names: Any) -> Change:
    """In both files that name special tokens."""
    return together(
        *(edit(f, **names) for f in ("tokenizer_config.json", "special_tokens_map.json"))
    )


def bos(name: str = "<|endoftext|>") -> Change:
    return together(around(before=name), edit("tokenizer_config.json", bos_token=name))


def unigram(model: Path) -> None:
    """A vocabulary without bytes, whose unknown token also pads."""

    def change(held: dict[str, Any]) -> None:
        held["pre_tokenizer"] = None
        held["model"]["unk_token"] = "<|pad|>"
        held["model"]["vocab"] |= {one["content"]: one["id"] for one in held["added_tokens"]}

    tokenizer(change)(model)
    edit("tokenizer_config.json", unk_token="<|pad|>")(model)


def same_rows(held: dict[str, Any]) -> None:
    held[EMBED][279] = held[EMBED][278]


CONFIGS = ("config.json", "generation_config.json")
ENDS_TEXT = together(*(edit(file, eos_token_id=276) for file in CONFIGS))
BANNED = edit("generation_config.json", suppress_tokens=[5, 279])
IDLE = edit("generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
TRUNCATION = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

CASES: Mapping[str, list[Case]] = {
    "ends": [
        Case(edit("generation_config.json", eos_token_id=[276, 5]), "I", ("5, 276",)),
        Case(edit("generation_config.json", eos_token_id=5), "W", ("none of them in all", ": 5")),
        Case(together(*(edit(f, eos_token_id=279) for f in CONFIGS)), "W", ("tokenizer: 276",)),
    ],
    "stop-token": [Case(ENDS_TEXT, "W", ("no file calls <|im_end|> an end", "(276)"))],
    "stop-reachable": [
        Case(edit("config.json", eos_token_id=[279, 276, 300]), "W", ("ids end at 279", "300"))
    ],
    "stop-banned": [
        Case(BANNED, "W", ("suppress_tokens", "279")),
        Case(edit("generation_config.json", bad_words_ids=[[276]]), "W", ("bad_words", "276")),
        Case(edit("generation_config.json", min_length=9, max_length=9), "W", ("at least 9",)),
    ],
    "pad-in-stops": [
        Case(named(pad_token="<|endoftext|>"), "I", ("tokenizer: 276",)),
        Case(edit("generation_config.json", pad_token_id=279), "I", ("generation_config.json",)),
    ],
    "pad-is-unknown": [Case(unigram, "E", ("neither bytes nor", "<|pad|>"))],
    "begin-and-pad": [
        Case(edit("config.json", pad_token_id=3), "W", ("PAD", "config.json: 3", "tokenizer: 277")),
        Case(together(bos(), edit("config.json", bos_token_id=9)), "W", ("BOS", "tokenizer: 276")),
    ],
    "token-files": [
        Case(
            edit("special_tokens_map.json", eos_token="<|im_end|>"),
            "W",
            ("'<|endoftext|>' in tokenizer_config", "'<|im_end|>' in special_tokens_map"),
        )
    ],
    "start-flags": [
        Case(edit("tokenizer_config.json", add_bos_token=True), "W", ("puts nothing before",)),
        Case(
            together(bos(), edit("tokenizer_config.json", add_bos_token=False)),
            "W",
            ("puts a token before", "['<|endoftext|>']"),
        ),
        Case(around(after="<|endoftext|>"), "W", ("after every text",)),
        Case(
            together(
                around(before="<|im_start|>"),
                edit("tokenizer_config.json", bos_token="<|endoftext|>"),
            ),
            "W",
            ("begins with '<|im_start|>'", "bos_token is '<|endoftext|>'"),
        ),
    ],
    "padding-block": [
        Case(tokenizer(lambda held: held.update(truncation=TRUNCATION)), "W", ("truncation",)),
    ],
    "token-strips": [Case(flag("<|im_end|>", rstrip=True), "I", ("'<|im_end|>' (rstrip)",))],
    "token-flags": [Case(flag("<|im_end|>", special=False), "I", ("special=false",))],
    "length-limit": [
        Case(edit("tokenizer_config.json", model_max_length=4096), "I", ("4,096", "48 positions"))
    ],
    "generation-settings": [Case(IDLE, "W", ("temperature=0.6, top_p=0.9", "do_sample=false"))],
    "untrained-tokens": [
        Case(value(EMBED, 279, 1e-18), "E", ("<|im_end|> (279): a row of almost zeros", EMBED)),
        Case(weights(same_rows), "E", ("2 control tokens", "the same row as token 278")),
    ],
    "template-file": [
        Case(template("{% for m in %}"), "E", ("line 1",)),
        Case(template("{{ raise_exception('never') }}"), "E", ("never", "refuses a plain")),
    ],
    "template-copies": [
        Case(edit("tokenizer_config.json", chat_template=BLOCK), "W", ("first difference",)),
        Case(
            together(
                lambda model: (model / "chat_template.jinja").unlink(),
                edit(
                    "tokenizer_config.json",
                    chat_template=[
                        {"name": name, "template": CHATML_SOURCE}
                        for name in ("default", "tool_use")
                    ],
                ),
            ),
            "I",
            ("2 chat templates", "tool_use"),
        ),
    ],
    "double-bos": [
        Case(together(bos(), template(BOS_TWICE)), "E", ("writes BOS twice",)),
        Case(together(bos(), template(BOS_ONCE)), "I", ("and the tokenizer puts one",)),
        Case(bos(), "W", ("writes no BOS",)),
    ],
    "template-end": [
        Case(template(NO_END_ASK), "W", ("no end after the last answer",)),
        Case(template(BETWEEN), "W", ("<|im_end|> between",)),
        Case(
            together(template(NO_END_ASK), named(eos_token=None)),
            "E",
            ("no end after",),
        ),
    ],
    "generation-prompt": [
        Case(template(BLOCK), "W", ("would have to write '<|im_start|>assistant",)),
        Case(
            template(BLOCK + ASK + "{% if add_generation_prompt %}!{% endif %}"),
            "W",
            ("first difference", "!'"),
        ),
    ],
    "keeps-past": [Case(template(FORGETS), "I", ("<think>",))],
    "generation-tag": [
        Case(template(END_OUTSIDE), "W", ("outside {% generation %}", "<|im_end|>")),
        Case(template(IN_MACRO), "W", ("inside a macro",)),
        Case(template(IN_SET), "W", ("inside a set",)),
    ],
    "roles": [
        Case(template(DROPS), "W", ("leaves out what system says",)),
        Case(template(BLOCK.replace("m.content", "'x'") + ASK), "E", ("user and assistant",)),
        Case(template(REFUSES + BLOCK + ASK), "I", ("refuses the role system", "no system role")),
    ],
    "injection": [Case(template(REWRITES), "I", ("rewrites contents",))],
    "time-dependent": [Case(template(DATED + BLOCK + ASK), "I", ("03 Feb 2001",))],
}

WELL: Mapping[str, Change] = {
    "ends": edit("config.json", eos_token_id=[276, 279]),
    "stop-token": edit("config.json", eos_token_id=276),
    "stop-reachable": edit("config.json", eos_token_id=[276, 0]),
    "stop-banned": edit("generation_config.json", suppress_tokens=[5], bad_words_ids=[[276, 5]]),
    "pad-in-stops": edit("generation_config.json", pad_token_id=None),
    "pad-is-unknown": edit("tokenizer_config.json", unk_token="<|pad|>"),  # bytes: never reached
    "begin-and-pad": edit("config.json", pad_token_id=-1),
    "token-files": edit("special_tokens_map.json", eos_token={"content": "<|endoftext|>"}),
    "start-flags": together(bos(), edit("tokenizer_config.json", add_bos_token=True)),
    "padding-block": tokenizer(lambda held: held.update(truncation=None, padding=None)),
    "token-strips": flag("<|pad|>", rstrip=True),  # the template does not write it
    "token-flags": flag("<|im_start|>", special=False),  # ends nothing
    "length-limit": edit("tokenizer_config.json", model_max_length=1e30),
    "generation-settings": edit("generation_config.json", do_sample=True, temperature=0.6),
    "untrained-tokens": value(EMBED, 277, 0.0),  # padding: in no text
    "template-file": template(BLOCK + ASK),
    "template-copies": edit("tokenizer_config.json", chat_template=CHATML_SOURCE + "\n"),
    "double-bos": edit("tokenizer_config.json", bos_token="<|endoftext|>"),
    "template-end": template(BLOCK + ASK),
    "generation-prompt": template(BLOCK + ASK),
    "keeps-past": template(BLOCK + ASK),
    "generation-tag": template(TAGGED),
    "roles": template(BLOCK + ASK),
    "injection": template(BLOCK + ASK),
    "time-dependent": template(BLOCK + ASK + "{# strftime_now #}"),
}
