"""Writes docs/FAMILIES.md from the registry and the cases: `make docs`."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from ardor.arch import spec as specs
from ardor.families import FAMILIES, family_of
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.native import NATIVE

from .cases import CASES
from .peer import Case
from .test_transformers import CASES as MORE
from .test_transformers import GPT2S, LLAMAS, SIZES

DOC = Path(__file__).parents[2] / "docs" / "FAMILIES.md"

PUBLISHED = [name for name, family in FAMILIES.items() if family is not NATIVE]
KEYS = {"llama": LLAMAS, "gpt2": GPT2S}  # of the cases in MORE

# Letter -> what is compared, and the test in test_families.py that does it.
CHECKS = {
    "L": ("logits, on both backends", "test_logits_are_those_of_transformers"),
    "C": (
        "one token at a time, with a cache",
        "test_one_token_at_a_time_gives_the_logits_of_the_whole_text_so_far",
    ),
    "R": (
        "left-padded rows there against plain rows here",
        "test_left_padded_rows_there_are_plain_rows_here",
    ),
    "P": ("packed documents against separate ones", "test_packed_documents_are_separate_ones"),
    "B": (
        "a batch of unequal prompts generates what each does alone",
        "test_a_batch_of_unequal_prompts_generates_what_each_does_alone",
    ),
    "G": (
        "the gradients of all parameters",
        "test_gradients_of_all_parameters_are_those_of_transformers",
    ),
    "S": ("saving, bit for bit", "test_what_is_loaded_is_saved_bit_for_bit"),
}

HEAD = """\
# Families

<!-- Written by `make docs` from ardor/families and tests/parity: change those, not this. -->

A checkpoint loads if the `model_type` of its config.json is below. For each there are tiny models
of transformers' own classes in `tests/parity`, compared in float32 at rtol = atol = 1e-5:

{checks}

Knobs are the fields of `ardor/arch/spec.py` in which the cases of a family differ from plain Llama.
Published config.json files are read in `tests/families/test_released_*.py`; most of them were
written down from memory.

| `model_type` | models | not plain Llama in | knobs in its cases | cases | checks |
|---|---|---|---|---|---|
"""
TAIL = """
{families} families under {names} names, {cases} cases. A second number is of configurations in
`tests/parity/test_transformers.py`, {more} in all: logits for each of them, and for some the rows,
gradients and saving.

Refused by name, with the list of what is known: every other `model_type`, and code in the
repository (`auto_map`), both without `trust_remote_code`; a family's own first publication is
accepted, but ours is what runs. Refused always: soft prompts, bidirectional attention
and whatever else a config.json asks for that nothing here honours exactly.

Weights may come in FP8 (E4M3, with a scale for each block of 128 x 128, or for a whole matrix), as
those of DeepSeek V3 and Qwen3-FP8 do, whatever the family. They are kept so, expanded to float32
for the moment of each product and rounded to its dtype, and saved bit for bit. Full fine-tuning
cannot change them; once an adapter is merged into some, all are saved in bfloat16.

`ardor` is one more: what `ardor train` makes of a spec that none of these can write. Anything in
`ardor/arch/spec.py` can be in it, and only Ardor reads it.

`ardor train --model FILE` makes a new model of any of them from the keys of its config.json
([TRAINING.md](TRAINING.md)), and saves it as that; but for `gemma3`, `RefinedWeb` and
`RefinedWebModel`, whose decoders are those of `gemma3_text` and `falcon`. A spec is written as the
first of `llama`, `gpt2`, `mistral`, `qwen2` and `qwen3` that can express it, and else as `ardor`.

## The rest, through transformers

With `trust_remote_code=True` (`--trust-remote-code`) and `pip install 'ardor[transformers]'`, a
model that is not above is run by transformers' own class, or by the code that its `auto_map` names.
First a line on stderr says which: the classes, the files of code and the commit. Code and weights
are of one commit; code in a second repository, pickled weights and weights that leave a parameter
unfilled are refused. No tokenizer's code and no generating code of the repository is run. Nothing
remembers the flag: a run or an adapter on such a model is loaded with it again, or refused.

What transformers computes is what Ardor then gives: documents are never padded, and each row of a
batch is decoded alone. Before it is used, a model must not look ahead, and its cache must give what
reading the whole text gives; a cache that does not is left unused, with a note. `tests/bridge`
compares a repository with its own code and GPT-Neo, XGLM, CodeGen, BioGPT, OpenAI GPT, Mamba 1 and
2, RWKV, Helium, GLM-4-MoE and a BERT decoder with transformers at 1e-5: logits, packing, greedy
continuations, saving; and adapters with PEFT.

Not as good as for the models above: the loss holds the logits of a whole micro-batch, decoding does
not batch, losses of routers are left out, rows of single tokens cannot be trained, NF4 is made from
weights that are first loaded whole, and code that reads a linear's weight itself (RWKV's and
Mamba's for some) refuses an adapter on it.
"""


def document() -> str:
    """The whole file."""
    names: dict[int, list[str]] = {}
    for name in PUBLISHED:
        names.setdefault(id(FAMILIES[name]), []).append(name)
    rows = sorted(
        (sorted(held, key=lambda name: name != FAMILIES[held[0]].model_type))
        for held in names.values()
    )
    checks = "\n".join(f"- {letter}: {words}" for letter, (words, _) in CHECKS.items())
    return (
        HEAD.format(checks=checks)
        + "".join(_row(FAMILIES[held[0]], held) for held in rows)
        + TAIL.format(
            families=len(rows),
            names=len(PUBLISHED),
            cases=len(CASES),
            more=len(MORE),
        )
    )


def _row(family: Family, names: list[str]) -> str:
    cases = [case for case in CASES.values() if case.model_type in names]
    more = [Case(name, KEYS[name][case], sizes=SIZES[name]) for name, case in MORE if name in names]
    described = [*map(spec_of, cases), *(spec_of(case) for case in more)]
    found = {knob for spec in described for knob in knobs(spec)}
    cells = [
        ", ".join(f"`{name}`" for name in names),
        family.models,
        family.unlike,
        ", ".join(f"`{knob}`" for knob in sorted(found)),
        f"{len(cases)}" + (f" + {len(more)}" if more else ""),
        _passed(cases),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _passed(cases: list[Case]) -> str:
    """The letters of the checks; where some cases are left out of one, how many are in it."""
    batched = sum(case.batched for case in cases)
    counts = {letter: batched if letter == "R" else len(cases) for letter in CHECKS}
    return " ".join(
        letter if count == len(cases) else f"{letter} ({count} of {len(cases)})"
        for letter, count in counts.items()
        if count
    )


def spec_of(case: Case) -> specs.Decoder:
    config = case.config().to_dict()
    return family_of(config).spec(HFConfig(config, path="config.json"))


BARE = (specs.Decoder, specs.Layer, specs.Attention, specs.Experts)  # their fields go unqualified


def knobs(spec: Any) -> Iterator[str]:
    """The fields in which a spec differs from their defaults, and from plain Llama."""
    if isinstance(spec, specs.Decoder):
        yield from ["tied"] * spec.tied
        yield from ["layers differ"] * (len({*spec.layers}) > 1)
    if isinstance(spec, specs.Attention):
        yield from ["kv_heads"] * (spec.kv_heads < spec.heads)
        yield from ["rope=None"] * (spec.rope is None)
        yield from ["Rope.rotated"] * (
            spec.rope is not None and spec.rope.rotated < spec.head_width
        )
    if isinstance(spec, specs.Mlp):
        yield from [f"act={spec.act}"] * (spec.act != "silu")
    owner = "" if isinstance(spec, BARE) else type(spec).__name__ + "."
    for field in fields(spec):
        value = getattr(spec, field.name)
        changed = field.default is not MISSING and value != field.default
        if is_dataclass(value) or (isinstance(value, tuple) and value and is_dataclass(value[0])):
            if type(value) in (specs.LatentAttention, specs.Experts):
                yield type(value).__name__
            elif changed:
                yield field.name if field.name != "scaling" else type(value).__name__
            if field.name != "scaling":
                for part in value if isinstance(value, tuple) else (value,):
                    yield from knobs(part)
        elif changed:
            named = isinstance(value, str) or value is False
            yield owner + field.name + (f"={value}" if named else "")


if __name__ == "__main__":
    DOC.write_text(document(), encoding="utf-8")
