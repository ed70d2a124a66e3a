"""What a model's files say of its tokens, for people to read: nothing here is judged."""

from collections.abc import Iterator

from ardor.doctor.checkpoint import Checkpoint, template_of_rows
from ardor.doctor.ids import written_by_template
from ardor.text.tokenizer import Tokenizer


def facts_of(it: Checkpoint) -> tuple[tuple[str, str], ...]:
    """(what, how it is) of tokens, rows, template and limits, as far as they were understood."""
    return tuple(_facts(it))


def _facts(it: Checkpoint) -> Iterator[tuple[str, str]]:
    tokenizer = it.tokenizer
    if tokenizer is None:
        return
    named = [
        f"{tokenizer.token(id)} ({id}): {', '.join(sources)}"
        for id, sources in it.stops.sources.items()
    ]
    yield "ends", "; ".join([*named, *map(repr, it.stops.strings)]) or "none: no text would end"
    before = [str(tokenizer.token(id)) for id in tokenizer.prefix]
    yield "begins with", " ".join(before) or "nothing"
    yield "padding", _padding(it, tokenizer)
    if it.rows is not None:
        spare = it.rows - tokenizer.vocab_rows
        rest = f"; {spare:,} rows belong to no token: never shrink it to these" if spare > 0 else ""
        yield "ids", f"{tokenizer.vocab_rows:,} of the tokenizer, {it.rows:,} rows{rest}"
    if it.template is not None:
        writes = sorted(written_by_template(tokenizer, it.template))
        tokens = " ".join(str(tokenizer.token(id)) for id in writes) or "no control tokens"
        yield "template", f"{it.template.fingerprint[:12]}, writes {tokens}"
    else:
        yield "template", "none" + _stand_in(it)
    yield "limits", _limits(it)


def _stand_in(it: Checkpoint) -> str:
    """What the rows were read with instead."""
    template = None if it.data is None else template_of_rows(it)
    return "" if template is None else f"; conversations would be learnt in {template.name}"


def _padding(it: Checkpoint, tokenizer: Tokenizer) -> str:
    """Which of the known choices is in force, and what it is safe for."""
    pad = tokenizer.special.pad
    if pad is None:
        return "none, and none is needed: padding is a length here"
    name = f"{tokenizer.token(pad)} ({pad})"
    if pad in it.stops.ids:
        return f"{name}, also an end: safe where masks come from lengths, as here"
    if pad == tokenizer.special.unk:
        safe = "not safe" if tokenizer.reaches_unk else "safe, no text becomes it"
        return f"{name}, also unknown: {safe}"
    return f"{name}, of its own: safe while no text holds it"


def _limits(it: Checkpoint) -> str:
    generation = it.generation or {}
    said = [f"{k}={generation[k]}" for k in ("max_new_tokens", "max_length") if generation.get(k)]
    positions = None if it.spec is None else it.spec.max_positions
    known = [f"{positions:,} positions"] if positions is not None else []
    return ", ".join([*known, *said]) or "none stated"
