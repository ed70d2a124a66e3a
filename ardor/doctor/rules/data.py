"""Rules about the rows of a dataset, as one pass over them has counted."""

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.data import Found, Sample
from ardor.doctor.finding import Finding, many

FEW = 0.01  # share of the rows up to which something is a remark only
ALMOST_ALL = 0.95
CUT = 3  # answers of the same greatest length, at the least


def data_rows(it: Checkpoint) -> Findings:
    """Every row can be read, and encoded for this model."""
    if it.data and (rows := it.data.broken):
        what = f"{many(rows.count, 'row')} that cannot be trained on"
        yield Finding("E", what, str(rows), "mend or drop them: training refuses the first")


def row_ids(it: Checkpoint) -> Findings:
    """Every id of a row is one that the model has."""
    if it.data and (rows := it.data.outside):
        what = f"{_share(rows, it.data)} with ids that the model lacks"
        fix = "take these tokens out of the data, or take the tokenizer of this model"
        yield Finding("E", what, f"{rows}; the model has {it.rows:,} ids", fix)


def row_targets(it: Checkpoint) -> Findings:
    """Every row has something to predict, after the first token.

    A warning while others do: training leaves such rows out, and counts them.
    """
    if it.data and (rows := it.data.empty):
        all_of_them = rows.count == it.data.rows
        what = f"{_share(rows, it.data)} with nothing to predict"
        fix = "give each an answer that is not blank, or labels beyond the first token"
        yield Finding("E" if all_of_them else "W", what, str(rows), fix)


def row_stops(it: Checkpoint) -> Findings:
    """Every row ends with a token that ends a text, and is trained to.

    Rows that Ardor encodes do; what other software has encoded often does not.
    """
    if it.data and (rows := it.data.unstopped):
        what = f"{_share(rows, it.data)} whose last target ends no text: no end is learnt from them"
        fix = "end each with the model's stop token, and put it into the labels; or give the texts"
        yield Finding("E", what, str(rows), fix)
    if it.data and (rows := it.data.open_ended):
        what = f"{_share(rows, it.data)} of segments that are trained on without an end"
        yield Finding("W", what, str(rows), "let the last trained segment spell the stop token")
    if it.data and (rows := it.data.masked_ends):
        what = f"{_share(rows, it.data)} whose end stands in input_ids and is masked in labels"
        fix = "mask labels by length and not where the id is the pad id; or give the texts"
        yield Finding("E", what, str(rows), fix)


def labels_shifted(it: Checkpoint) -> Findings:
    """Labels stand where their tokens do: whoever trains shifts them, once."""
    if it.data and (rows := it.data.shifted):
        what = f"{_share(rows, it.data)} whose labels are shifted already"
        fix = (
            "give labels[i] = input_ids[i]: shifted twice, a model learns to skip every other token"
        )
        yield Finding("E", what, str(rows), fix)


def row_length(it: Checkpoint) -> Findings:
    """No row is longer than what the model will see of it. (A plain text is cut into pieces.)"""
    if it.data and (rows := it.data.over):
        longest = max(it.data.lengths)
        what = f"{_share(rows, it.data)} longer than {it.data.limit:,} tokens"
        fix = "raise --max-length to keep all; --over-length says what becomes of them: by default "
        fix += "prompts lose their start, and no answer its end"
        yield Finding("W", what, f"{rows}; the longest has {longest:,}", fix)


def pad_in_data(it: Checkpoint) -> Findings:
    """The padding token stands in no text. (One that is also an end does so rightly.)"""
    pad = None if it.tokenizer is None else it.tokenizer.special.pad
    if it.data and pad in it.data.named and pad not in it.stops.ids:
        rows = it.data.named[pad]
        what = f"{_share(rows, it.data)} with the padding token inside"
        fix = "choose another padding token: programs that mask by id hide it; or give the texts"
        yield Finding("E", what, str(rows), fix)


def control_in_content(it: Checkpoint) -> Findings:
    """No text spells a control token.

    Ardor keeps it as text. Often it is an end that was put there by hand, which is then written
    out letter by letter in every answer.
    """
    if it.data and (rows := it.data.control):
        what = f"{_share(rows, it.data)} whose text spells a control token"
        fix = "remove it: the end of an answer is added by itself, and here it stays mere text"
        yield Finding("W", what, str(rows), fix)


def unknown_characters(it: Checkpoint) -> Findings:
    """The tokenizer knows every character."""
    if it.data and (rows := it.data.unknown):
        rate = it.data.unknown_tokens / max(1, it.data.tokens)
        what = f"{_share(rows, it.data)} with characters that the tokenizer does not know"
        evidence = f"{rows}; {rate:.2%} of all tokens are the unknown token"
        yield Finding("W", what, evidence, "normalise the texts, or take another model")


def broken_characters(it: Checkpoint) -> Findings:
    """No text was decoded wrongly before it came here."""
    if it.data and (rows := it.data.replaced):
        what = f"{_share(rows, it.data)} with U+FFFD, which stands for bytes that were no UTF-8"
        yield Finding("W", what, str(rows), "read the source again in its own encoding")


def prompt_space(it: Checkpoint) -> Findings:
    """No prompt ends in a space: the word after it would begin with the space in other texts."""
    if it.data and (rows := it.data.spaced):
        what = f"{_share(rows, it.data)} whose prompt ends in a space"
        yield Finding("W", what, str(rows), "move the space to the start of the completion")


def boundary(it: Checkpoint) -> Findings:
    """Prompt and completion encoded together begin as the prompt alone does.

    For information: ids are joined, as at inference, so both are right here.
    """
    if it.data and (rows := it.data.merged):
        share = rows.count / max(1, it.data.completions)
        what = f"{share:.1%} of prompts merge with their completion where both are encoded as one"
        fix = "none here; elsewhere the end of the prompt is another than at inference"
        yield Finding("I", what, str(rows), fix)


def answers_cut(it: Checkpoint) -> Findings:
    """Answers were not cut where a generator's length limit was."""
    if it.data and it.data.cut.count >= CUT:
        rows = it.data.cut
        what = (
            f"{many(rows.count, 'answer')} of the same, greatest length, that end in mid-sentence"
        )
        yield Finding("W", what, str(rows), "drop them: a model learns from them to break off")


def duplicates(it: Checkpoint) -> Findings:
    """No row occurs twice."""
    if it.data and (rows := it.data.duplicates):
        level = "I" if rows.count <= FEW * it.data.rows else "W"
        what = f"{_share(rows, it.data)} that repeat another"
        fix = "drop the copies: they count double, and may be held out and trained on at once"
        yield Finding(level, what, str(rows), fix)


def held_out_leak(it: Checkpoint) -> Findings:
    """What is held out is not trained on."""
    if it.data and (rows := it.data.leaked):
        what = f"{many(rows.count, 'held-out row')} that are trained on too"
        yield Finding("W", what, str(rows), "drop them from one of the two: scores would flatter")
    if it.data and (rows := it.data.leaked_prompts):
        what = f"{many(rows.count, 'held-out row')} with a prompt that is trained on too"
        yield Finding("W", what, str(rows), "split by prompt")


def supervised_share(it: Checkpoint) -> Findings:
    """In a dataset of answers, not almost every token is a target."""
    data = it.data
    if data is None or not data.tokens:
        return
    share = data.targets / data.tokens
    if share > ALMOST_ALL and data.formats["tokenized"] + data.conversations == data.rows:
        what = f"{share:.1%} of all tokens are targets: prompts are trained on like answers"
        evidence = f"{data.targets:,} of {data.tokens:,} tokens"
        yield Finding("W", what, evidence, "mask prompts in labels with -100, or give messages")


def _share(rows: Found, data: Sample) -> str:
    of = f"{many(rows.count, 'row')} of {'the first ' if data.more else ''}{data.rows:,}"
    return f"{of} ({rows.count / max(1, data.rows):.1%})"


RULES: Registry = {
    "data-rows": data_rows,
    "row-ids": row_ids,
    "row-targets": row_targets,
    "row-stops": row_stops,
    "labels-shifted": labels_shifted,
    "row-length": row_length,
    "pad-in-data": pad_in_data,
    "control-in-content": control_in_content,
    "unknown-characters": unknown_characters,
    "broken-characters": broken_characters,
    "prompt-space": prompt_space,
    "boundary": boundary,
    "answers-cut": answers_cut,
    "duplicates": duplicates,
    "held-out-leak": held_out_leak,
    "supervised-share": supervised_share,
}
