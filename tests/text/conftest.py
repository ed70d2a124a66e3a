"""Tiny tokenizers of the kinds that are in use, trained here, and chat templates of every shape."""

import json
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ardor.text.chat import ChatTemplate
from ardor.text.tokenizer import Tokenizer

TEXTS = [
    f"{start} {middle} {end}"
    for start in ("the cat sat", "Hello there,", "user\nassistant\n", "in 1984 and 2024,")
    for middle in ("on the mat", "the other day", "über den Wolken", "你好 世界", "x = f(y)\n\n")
    for end in ("again\n\nand again.", "hello the end", "<|im_end|> is text")
]

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    ),
    "trims": (  # as Llama 3
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "spaced": (  # as Llama 2: a space belongs to the answer, another to its end
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} <|im_end|>"
        "{% else %}<|im_start|>[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
    ),
    "macro": (  # where transformers' {% generation %} offsets go wrong
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "set block": (
        "{% for m in messages %}{% set body %}{{ m.content }}<|im_end|>{% endset %}"
        "<|im_start|>{{ m.role }}\n{{ body }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "forgetful": (  # as Qwen3: earlier thoughts are dropped, so rows cannot be shared
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last or m.role == 'user' %}"
        "{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (  # no control token at all: the tokenizer's EOS ends an answer
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


@pytest.fixture(scope="session")
def template() -> Callable[[str], ChatTemplate]:
    made = {name: ChatTemplate(source, name=name) for name, source in TEMPLATES.items()}
    return made.__getitem__


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary, with <|pad|> as a BOS that the post-processor puts before a text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    bos = ("<|pad|>", backend.token_to_id("<|pad|>"))
    backend.post_processor = processors.TemplateProcessing("<|pad|> $A", None, [bos])
    return Tokenizer(backend, {"bos_token": "<|pad|>", "eos_token": "<|endoftext|>"})


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    return with_bos(tokenizer)


@pytest.fixture(scope="session")
def spaced_tokenizer() -> Tokenizer:
    """As Llama 2's: a space put before every piece of text, bytes as <0x..> tokens, <s> in front.

    Its control tokens are entries of the model's own vocabulary too.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([prepend, replace])
    # Words apart while training only, as SentencePiece does.
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=control + all_bytes)
    backend.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(control)]
    spec["model"]["byte_fallback"] = True
    spec["pre_tokenizer"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="session")
def reachable_tokenizer() -> Tokenizer:
    """A Unigram model whose own vocabulary spells its control tokens, at the best of scores."""
    letters = [(char, -2.0) for char in "▁</s>ax|im_endtko"]
    words = [("<unk>", 0.0), ("</s>", 0.0), ("<think>", -0.1), ("<user>", -0.1)]
    backend = tokenizers.Tokenizer(models.Unigram([*words, *dict(letters).items()], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.add_tokens([AddedToken("<think>"), AddedToken("<user>"), AddedToken("  ")])
    return Tokenizer(backend, {"eos_token": "</s>", "unk_token": "<unk>"})
