"""Chat templates for models that come without one."""

from ardor.errors import TextError
from ardor.text.chat import CHATML, ChatTemplate
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
