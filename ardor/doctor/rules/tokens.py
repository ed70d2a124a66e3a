"""Rules about special tokens: which end a text, which begin one, which pad, and who says so."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from ardor.doctor.checkpoint import TOKENIZER, TOKENIZER_CONFIG, Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed
from ardor.doctor.ids import ids_of, written_by_template
from ardor.files.json import read_object
from ardor.text.special import read_names

SPECIAL_MAP = "special_tokens_map.json"
NO_LIMIT = 1e9  # transformers writes 1e30 for "none"


def ends(it: Checkpoint) -> Findings:
    """The files agree on which token ends a text.

    A warning even where they have none in common: Ardor stops at each of them, and so does what it
    writes. The tokenizer can name only one, so it agrees with a list that has it.
    """
    tokenizer = set(ids_of(it.tokenizer and it.tokenizer.special.eos))
    named = {
        "config.json": set(ids_of((it.config or {}).get("eos_token_id"))),
        "generation_config.json": set(ids_of((it.generation or {}).get("eos_token_id"))),
    }
    named = {source: ids for source, ids in named.items() if ids}
    if not all(tokenizer <= ids for ids in named.values()):
        named = {"tokenizer": tokenizer, **named}
    if len({frozenset(ids) for ids in named.values()}) > 1:
        apart = not set.intersection(*named.values())
        yield Finding(
            "W" if apart else "I",
            "the files name different end tokens" + (", none of them in all" if apart else ""),
            "; ".join(f"{source}: {listed(sorted(ids))}" for source, ids in named.items()),
            "Ardor stops at each of them; for other programs let generation_config.json list all",
        )


def stop_token(it: Checkpoint) -> Findings:
    """The token that the template writes after an answer is an end for the files too.

    A warning and no error: Ardor adds it to the ends, and writes it into the files of what it
    trains; and base models are published with a template whose terminator they do not yet stop at
    (Qwen2.5 base), which must not keep anyone from fine-tuning them.
    """
    stop, tokenizer = it.terminator, it.tokenizer
    if stop is None or tokenizer is None:
        return
    named = {id for id, sources in it.stops.sources.items() if len(sources) > 1}
    named |= it.stops.ids - {stop}
    if stop not in named:
        others = listed([f"{tokenizer.token(id)} ({id})" for id in sorted(named)]) or "none"
        yield Finding(
            "W",
            f"no file calls {tokenizer.token(stop)} an end, but the chat template ends answers so",
            f"terminator: {tokenizer.token(stop)} ({stop}); ends in the files: {others}",
            "list it in eos_token_id of generation_config.json: other programs run on past it",
        )


def stop_reachable(it: Checkpoint) -> Findings:
    """Every end that a file names is a token that the tokenizer has."""
    if it.tokenizer is None or it.rows is None:
        return
    for file, held in _files(it):
        ids = [id for id in ids_of(held.get("eos_token_id")) if 0 <= id < it.rows]
        gone = [id for id in ids if it.tokenizer.token(id) is None]
        if gone:
            yield Finding(
                "W",
                f"eos_token_id in {file} names ids without a token: no text ends by them",
                f"{listed(gone)}; the tokenizer's ids end at {it.tokenizer.vocab_rows - 1}",
                "remove them, and name the tokens that end a text",
            )


BANS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def stop_banned(it: Checkpoint) -> Findings:
    """No setting of generation keeps the model from ending."""
    generation = it.generation or {}
    for key in BANS:
        banned = generation.get(key)
        ids = (
            {id for one in banned if len(ids_of(one)) == 1 for id in ids_of(one)}
            if (isinstance(banned, list))
            else set()
        )
        if hit := sorted(ids & it.stops.ids):
            yield Finding(
                "W",
                f"{key} in generation_config.json bans tokens that end a text",
                f"banned ends: {listed(hit)}",
                "remove them from it; Ardor does not read it, other programs do",
            )
    least = [generation.get(key) for key in ("min_new_tokens", "min_length")]
    most = [generation.get(key) for key in ("max_new_tokens", "max_length")]
    low = max([n for n in least if type(n) is int], default=0)
    high = min([n for n in most if type(n) is int], default=None)
    if high is not None and low >= high:
        yield Finding(
            "W",
            "generation_config.json asks for at least as many tokens as it allows",
            f"at least {low}, at most {high}: no end can be written in time",
            "lower min_length or min_new_tokens",
        )


def pad_in_stops(it: Checkpoint) -> Findings:
    """The padding token ends no text.

    For information: Ardor's masks come from lengths, so it is harmless here; and models are
    published so (Qwen2.5, SmolLM2, Llama with pad = eos). Trainers that mask labels where the id is
    the pad id never teach such a model to stop.
    """
    if it.tokenizer is None:
        return
    named = {"tokenizer": it.tokenizer.special.pad}
    named |= {file: held.get("pad_token_id") for file, held in _files(it)}
    hit = [f"{file}: {id}" for file, id in named.items() if id is not None and id in it.stops.ids]
    if hit:
        yield Finding(
            "I",
            "the padding token is also an end: harmless here, where masks come from lengths",
            listed(hit),
            "elsewhere pass attention_mask, and never mask labels by comparing ids; or let doctor "
            "--fix choose an unused token",
        )


def pad_is_unknown(it: Checkpoint) -> Findings:
    """Padding is not the unknown token, where text can become that."""
    tokenizer = it.tokenizer
    if tokenizer is None or tokenizer.special.pad is None:
        return
    same = tokenizer.special.pad == tokenizer.special.unk
    if same and tokenizer.special.unk not in it.stops.ids and tokenizer.reaches_unk:
        yield Finding(
            "E",
            "the padding token is the unknown token, which characters of a text can become",
            f"pad_token = unk_token = {tokenizer.names['pad_token']!r}; the vocabulary has neither "
            "bytes nor a byte fallback",
            "choose another padding token: programs that mask by id hide real characters",
        )


def begin_and_pad(it: Checkpoint) -> Findings:
    """config.json, generation_config.json and the tokenizer name the same BOS and padding token."""
    if it.tokenizer is None:
        return
    for kind in ("bos", "pad"):
        tokenizer = getattr(it.tokenizer.special, kind)
        named = {file: ids_of(held.get(f"{kind}_token_id")) for file, held in _files(it)}
        others = {file: ids[0] for file, ids in named.items() if ids and ids[0] >= 0}
        if tokenizer is not None:
            others["tokenizer"] = tokenizer
        if len(set(others.values())) > 1:
            yield Finding(
                "W",
                f"the files name different {kind.upper()} tokens",
                "; ".join(f"{file}: {id}" for file, id in others.items()),
                "let all name the tokenizer's; Ardor goes by the tokenizer alone",
            )


def token_files(it: Checkpoint) -> Findings:
    """special_tokens_map.json says what tokenizer_config.json says."""
    if it.text_path is None or not (it.text_path / SPECIAL_MAP).exists():
        return
    legacy = it.attempt("tokenizer", lambda: read_object(it.text_path / SPECIAL_MAP)) or {}
    kinds = ("bos_token", "eos_token", "unk_token", "pad_token")
    texts = {
        kind: (_text(it.tokenizer_config.get(kind)), _text(legacy.get(kind))) for kind in kinds
    }
    apart = [
        f"{kind}: {ours!r} in {TOKENIZER_CONFIG}, {theirs!r} in {SPECIAL_MAP}"
        for kind, (ours, theirs) in texts.items()
        if ours is not None and theirs is not None and ours != theirs
    ]
    if apart:
        used = {kind: text for kind, text in read_names(it.text_path).items() if kind in kinds}
        yield Finding(
            "W",
            "two files name different special tokens, and programs differ in which they believe",
            "; ".join(apart),
            f"make them the same; here {', '.join(f'{k} is {v!r}' for k, v in used.items())}",
        )


def start_flags(it: Checkpoint) -> Findings:
    """tokenizer.json puts before and after a text what the flags beside it claim.

    What counts is what encoding does: transformers 5 passes the flags over, transformers 4 did not.
    """
    tokenizer = it.tokenizer
    if tokenizer is None:
        return
    begins, finishes = bool(tokenizer.prefix), bool(_suffix(it.tokenizer_json))
    for key, does, word in (
        ("add_bos_token", begins, "before"),
        ("add_eos_token", finishes, "after"),
    ):
        said = it.tokenizer_config.get(key)
        if isinstance(said, bool) and said != does:
            yield Finding(
                "W",
                f"{TOKENIZER_CONFIG} says {key}={str(said).lower()}, and tokenizer.json puts "
                f"{'a token' if does else 'nothing'} {word} a text",
                f"'' is encoded to {_around(it)}",
                "correct the flag; versions of transformers differ in which they go by",
            )
    if finishes and it.tokenizer_config.get("add_eos_token") is not True:
        yield Finding(
            "W",
            "tokenizer.json puts a token after every text, prompts too",
            f"'' is encoded to {_around(it)}",
            "take it out of the post_processor: other programs would continue after an end; "
            "Ardor puts nothing after a prompt",
        )
    bos = tokenizer.special.bos
    if bos is not None and tokenizer.prefix and bos not in tokenizer.prefix:
        yield Finding(
            "W",
            "tokenizer.json begins a text with another token than bos_token",
            f"begins with {listed([repr(tokenizer.token(i)) for i in tokenizer.prefix])}, and "
            f"bos_token is {tokenizer.token(bos)!r}",
            "correct bos_token, or the post_processor of tokenizer.json",
        )


def padding_block(it: Checkpoint) -> Findings:
    """tokenizer.json neither pads nor truncates by itself."""
    held = [key for key in ("truncation", "padding") if it.tokenizer_json.get(key) is not None]
    if held:
        yield Finding(
            "W",
            f"{TOKENIZER} sets {' and '.join(held)}, which other programs then do on every call",
            "; ".join(f"{key}: {str(it.tokenizer_json[key])[:80]}" for key in held),
            "set both to null; Ardor passes them over",
        )


def token_strips(it: Checkpoint) -> Findings:
    """No token of the template swallows the white space beside it.

    For information: Phi-3 is published so, and Ardor finds spans by tokens and never by lengths of
    strings. Trainers that count characters put the mask in the wrong place.
    """
    if it.tokenizer is None:
        return
    used = written_by_template(it.tokenizer, it.template)
    names = [
        f"{token['content']!r} ({', '.join(s for s in ('lstrip', 'rstrip') if token.get(s))})"
        for token in it.tokenizer_json.get("added_tokens", ())
        if token["id"] in used and (token.get("lstrip") or token.get("rstrip"))
    ]
    if names:
        yield Finding(
            "I",
            "tokens of the chat template swallow white space beside them",
            listed(names),
            "none here; where characters are counted, masks lie beside the answers",
        )


def token_flags(it: Checkpoint) -> Findings:
    """The tokens that end a text are special, and matched as they are written."""
    if it.tokenizer is None:
        return
    added = {token["id"]: token for token in it.tokenizer_json.get("added_tokens", ())}
    odd = []
    for id in sorted(it.stops.ids & added.keys()):
        flags = ["special=false"] if not added[id].get("special") else []
        flags += ["single_word=true"] if added[id].get("single_word") else []
        if flags:
            odd.append(f"{added[id]['content']!r} ({', '.join(flags)})")
    if odd:
        yield Finding(
            "I",
            "tokens that end a text are not marked as special",
            listed(odd),
            "set special to true: elsewhere skip_special_tokens leaves them in the answers",
        )


def length_limit(it: Checkpoint) -> Findings:
    """model_max_length is no longer than the model can read.

    For information: many models are published so, and Ardor never goes beyond the positions.
    """
    said, config = it.tokenizer_config.get("model_max_length"), it.config or {}
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(said, int | float) and type(most) is int and most < said < NO_LIMIT:
        yield Finding(
            "I",
            f"model_max_length in {TOKENIZER_CONFIG} is above the model's positions",
            f"model_max_length={said:,.0f}, and config.json has {most:,} positions",
            "none here; elsewhere truncation=True cuts too late",
        )


def generation_settings(it: Checkpoint) -> Findings:
    """No setting of generation_config.json is without effect.

    transformers 5 refuses to save a model whose file sets how to sample and not to sample.
    """
    generation = it.generation or {}
    idle = [f"{key}={generation[key]}" for key in idle_settings(generation)]
    if idle and generation.get("do_sample") is False:
        yield Finding(
            "W",
            "generation_config.json says how to sample, and do_sample=false",
            listed(idle),
            "set do_sample to true, or remove them; so it is greedy",
        )


NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}


def idle_settings(generation: Mapping[str, Any]) -> list[str]:
    """The keys that say how to sample, and not as everyone does by default."""
    found = ((key, generation.get(key)) for key in NEUTRAL)
    return [key for key, value in found if value is not None and value != NEUTRAL[key]]


def _files(it: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "config.json", it.config or {}
    yield "generation_config.json", it.generation or {}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _steps(post: Any) -> Iterator[dict[str, Any]]:
    if isinstance(post, dict):
        yield post
        for inner in post.get("processors", ()):
            yield from _steps(inner)


def puts_after(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the post-processor that put a special token after a text."""
    return [
        step
        for step in _steps(tokenizer.get("post_processor"))
        if step.get("single") and "SpecialToken" in step["single"][-1]
    ]


def _suffix(tokenizer: Mapping[str, Any]) -> list[str]:
    """The special tokens that the post-processor puts after a text."""
    for step in puts_after(tokenizer):
        last = takewhile(lambda piece: "SpecialToken" in piece, reversed(step["single"]))
        return [piece["SpecialToken"]["id"] for piece in last][::-1]
    pairs = ("BertProcessing", "RobertaProcessing")
    steps = _steps(tokenizer.get("post_processor"))
    return [step["sep"][0] for step in steps if step.get("type") in pairs][:1]


def _around(it: Checkpoint) -> str:
    assert it.tokenizer is not None
    before = [it.tokenizer.token(id) for id in it.tokenizer.prefix]
    return str([*before, *_suffix(it.tokenizer_json)])


RULES: Registry = {
    "ends": ends,
    "stop-token": stop_token,
    "stop-reachable": stop_reachable,
    "stop-banned": stop_banned,
    "pad-in-stops": pad_in_stops,
    "pad-is-unknown": pad_is_unknown,
    "begin-and-pad": begin_and_pad,
    "token-files": token_files,
    "start-flags": start_flags,
    "padding-block": padding_block,
    "token-strips": token_strips,
    "token-flags": token_flags,
    "length-limit": length_limit,
    "generation-settings": generation_settings,
}
