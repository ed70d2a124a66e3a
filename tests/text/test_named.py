"""Templates by name: each writes its family's format, ends answers, and round-trips its prompts."""

from pathlib import Path

import pytest
import tokenizers

from ardor.errors import TextError
from ardor.text.chat import prompt_ids, supervise, terminator
from ardor.text.named import NAMED
from ardor.text.templates import template_named
from ardor.text.tokenizer import Tokenizer

from .conftest import TEXTS
from .wild import CONTROL, TAGS

S, U, A, V = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
IM, END = "<|im_start|>", "<|im_end|>\n"
H, E, EOT = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
T, TE = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
ROLE, ER = "<|start_of_role|>", "<|end_of_role|>"
STOP = "<｜end▁of▁sentence｜>"

# What [system, user, assistant, user] is, with the header of the next answer. As the models' cards
# tell it.
FORMATS = {
    "chatml": f"{IM}system\nS{END}{IM}user\nU{END}{IM}assistant\nA{END}{IM}user\nV{END}"
    f"{IM}assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "llama3": f"<s>{H}system{E}S{EOT}{H}user{E}U{EOT}{H}assistant{E}A{EOT}{H}user{E}V{EOT}"
    f"{H}assistant{E}",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
    "mistral-v1": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
    "mistral-v3": "<s>[INST] U[/INST] A</s>[INST] S\n\nV[/INST]",
    "mistral-v3-tekken": "<s>[INST]U[/INST]A</s>[INST]S\n\nV[/INST]",
    "mistral-v7-tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U[/INST]A</s>[INST]V[/INST]",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>"
    "\n<|assistant|>\n",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A<|im_end|><|im_start|>user<|im_sep|>V<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n"
    "<|assistant|>\n",
    "vicuna": "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n"
    "### Response:\n",
    "command-r": f"<s>{T}<|SYSTEM_TOKEN|>S{TE}{T}<|USER_TOKEN|>U{TE}{T}<|CHATBOT_TOKEN|>A{TE}"
    f"{T}<|USER_TOKEN|>V{TE}{T}<|CHATBOT_TOKEN|>",
    "qwen2.5": f"{IM}system\nS{END}{IM}user\nU{END}{IM}assistant\nA{END}{IM}user\nV{END}"
    f"{IM}assistant\n",
    "qwen3": f"{IM}system\nS{END}{IM}user\nU{END}{IM}assistant\nA{END}{IM}user\nV{END}"
    f"{IM}assistant\n",
    "deepseek-v3": f"<s>S<｜User｜>U<｜Assistant｜>A{STOP}<｜User｜>V<｜Assistant｜>",
    "deepseek-r1": f"<s>S<｜User｜>U<｜Assistant｜>A{STOP}<｜User｜>V<｜Assistant｜><think>\n",
    "granite": f"{ROLE}system{ER}S<|end_of_text|>\n{ROLE}user{ER}U<|end_of_text|>\n"
    f"{ROLE}assistant{ER}A<|end_of_text|>\n{ROLE}user{ER}V<|end_of_text|>\n{ROLE}assistant{ER}",
    "olmo2": "<s><|system|>\nS\n<|user|>\nU\n<|assistant|>\nA</s>\n<|user|>\nV\n<|assistant|>\n",
}


@pytest.fixture(scope="module")
def rich() -> Tokenizer:
    trained = Tokenizer.train(TEXTS, vocab_size=420, special_tokens=CONTROL)
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.add_tokens(list(TAGS))
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_s_format_is_what_its_card_says(name, rich):
    assert template_named(name, rich).render([S, U, A, V], True) == FORMATS[name]


def test_every_name_has_its_format_here_or_a_reason():
    assert set(NAMED) - set(FORMATS) == {"llama3.1"}  # dated: below


def test_the_page_on_chat_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "CHAT.md").read_text()
    assert [name for name in ("headings", *NAMED) if f"`{name}`" not in page] == []


def test_llama_31_tells_the_date_and_what_it_is_given(rich):
    template = template_named("llama3.1", rich)
    text = template.render([S, U], True, date_string="26 Jul 2024")
    assert text == (
        f"<s>{H}system{E}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS{EOT}"
        f"{H}user{E}U{EOT}{H}assistant{E}"
    )
    assert template.render([U], True, tools=[{"name": "f"}]).count('"name": "f"') == 1


def test_defaults_where_no_system_message_is(rich):
    assert template_named("vicuna", rich).render([U]).startswith(f"<s>{VICUNA} USER: U")
    assert "You are Qwen, created by" in template_named("qwen2.5", rich).render([U])
    assert "system" not in template_named("qwen3", rich).render([U])


@pytest.mark.parametrize("name", NAMED)
def test_every_format_says_where_an_answer_ends(name, rich):
    template = template_named(name, rich)
    stop = terminator(rich, template)
    assert stop is not None
    rows = supervise(rich, template, [U, A, V, A])
    for row in rows:
        assert row.tokens[-1] == stop
        bos = rich.special.bos
        assert row.tokens[:2] != (bos, bos)
        assert row.tokens.count(bos) == (name == "llama2") + (
            "bos_token" in NAMED[name].source
        )  # Llama 2 begins each exchange with one
    asked = prompt_ids(rich, template, [U])
    assert list(rows[0].tokens[: len(asked)]) == asked


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral-v1", "vicuna", "alpaca"])
def test_roles_out_of_order_are_refused_where_the_format_has_none(name, rich):
    for messages in ([A, U], [U, U], [U, A, S], []):
        template = template_named(name, rich)
        if not messages:
            with pytest.raises(TextError, match="there are no messages"):
                prompt_ids(rich, template, messages)
            continue
        with pytest.raises(TextError, match=f"{name}, line .*roles must be user, assistant"):
            template.render(messages)


def test_a_tokenizer_that_lacks_the_tokens_is_refused(tokenizer):
    for name, missing in [
        ("llama3", r"bos_token, <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"),
        ("phi4", r"<\|im_sep\|>"),
        ("zephyr", ""),
    ]:
        if not missing:
            assert template_named(name, tokenizer).name == name
            continue
        with pytest.raises(TextError, match=f"chat_template={name} needs the tokens {missing}, w"):
            template_named(name, tokenizer)
