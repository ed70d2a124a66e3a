"""Chat templates by name, from a file, and for models that come without one."""

from difflib import get_close_matches
from pathlib import Path

from ardor.errors import TextError
from ardor.files.json import read_text
from ardor.text.chat import CHATML, ChatTemplate
from ardor.text.named import NAMED
from ardor.text.tokenizer import Tokenizer

# Headings in plain text: every base model can read them, and no token has to be added. The answer
# ends with the EOS token that the base model has learned to end documents with.
HEADINGS_SOURCE = (
    "{%- for message in messages -%}\n"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}\n"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}\n"
    "{{ '\\n\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}"
)


def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML where the tokenizer has its control tokens, else headings that end with EOS.

    Raises: TextError if the tokenizer has neither, so that no answer could end.
    """
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.added.keys():
        return CHATML
    if tokenizer.special.eos is None:
        raise TextError(
            "this tokenizer has no EOS token, so a model could not learn where an answer ends; "
            "set eos_token in tokenizer_config.json, or give a chat_template"
        )
    return ChatTemplate(HEADINGS_SOURCE, name="headings", tokens=tokenizer.names)


def template_named(name: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
    """A template of NAMED, "headings", or that of a jinja file.

    Raises: TextError for an unknown name, with those that are known; for one whose control tokens
    the tokenizer lacks; or for a file that is not valid.
    """
    if name == "headings":
        return ChatTemplate(HEADINGS_SOURCE, name="headings", tokens=tokenizer.names)
    if str(name) in NAMED:
        return _of_family(str(name), tokenizer)
    path = Path(name).expanduser()
    if path.is_file():
        return ChatTemplate(read_text(path), name=str(path), tokens=tokenizer.names)
    known = ("headings", *NAMED)
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}? Known are" if near else "known are"
    raise TextError(
        f"chat_template={str(name)!r} is neither a file that exists nor a template's name; {hint} "
        f"{', '.join(known)}"
    )


def _of_family(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    source, control = NAMED[name]
    needed = [token for token in ("bos_token", "eos_token") if token in source]
    missing = [token for token in needed if token not in tokenizer.names]
    missing += [token for token in control if token not in tokenizer.added]
    if missing:
        raise TextError(
            f"chat_template={name} needs the tokens {', '.join(missing)}, which this tokenizer "
            "lacks; take the template that the model was trained on, or headings, which needs none"
        )
    return ChatTemplate(source, name=name, tokens=tokenizer.names)
