"""Rules about token ids, and the rows of the embedding and the head."""

import torch

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.doctor.ids import ids_of, written_by_template
from ardor.doctor.tables import tables, untrained
from ardor.text.tokenizer import lacks_rows


def vocabulary(it: Checkpoint) -> Findings:
    """The embedding has a row for every id that a text can become."""
    if it.tokenizer is None or it.spec is None:
        return
    rows = it.spec.vocab
    if problem := lacks_rows(it.tokenizer, rows):
        said, _, fix = problem.partition("; ")
        yield Finding("E", "the tokenizer has ids that the embedding lacks", said, fix)
    elif it.tokenizer.vocab_rows > rows:
        over = sorted((id, text) for text, id in it.tokenizer.added.items() if id >= rows)
        yield Finding(
            "I",
            f"{many(len(over), 'added token')} beyond the embedding's {rows:,} rows",
            listed([f"{text!r} (id {id})" for id, text in over]),
            "keep them out of texts: they are refused where they occur",
        )


KINDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(it: Checkpoint) -> Findings:
    """The ids of special tokens in the config files are ids that the model has.

    An error where no text would end. A warning for BOS and padding, and for negative ids, by which
    the first Llamas' files say "none" (pad_token_id=-1). No error, although programs that look up
    the padding's row fail at it: here the tokenizer says what begins a text, padding is a length
    and no row is looked up, what is fine-tuned names a padding token of its own, and an error would
    keep those Llamas from being fine-tuned at all.
    """
    if it.spec is None:
        return
    for file, held in (("config.json", it.config), ("generation_config.json", it.generation)):
        for key in KINDS:
            ids = ids_of((held or {}).get(key))
            wrong = [id for id in ids if not 0 <= id < it.spec.vocab]
            if not wrong:
                continue
            ends = key == "eos_token_id" and wrong == ids
            yield Finding(
                "E" if ends and wrong[0] >= 0 else "W",
                f"{key} in {file} names no token of the model"
                + (": no text would end by it" if ends else ""),
                f"{key}={(held or {})[key]}, and the ids are 0 to {it.spec.vocab - 1}",
                "correct it; null says that there is none",
            )


def untrained_tokens(it: Checkpoint) -> Findings:
    """The rows of the control tokens that the template writes, and of the ends, were trained.

    An error: such a model never learns to end unless these rows are trained. A warning if that is
    what is about to happen. Compared are the rows of added tokens, and some others for the scale.
    """
    tokenizer, found = it.tokenizer, dict[int, str]()
    for table, matrix in tables(it):
        for id, why in untrained_rows(it, matrix).items():
            found.setdefault(id, f"{why} in {table}")
    if tokenizer is None or not found:
        return
    training = it.training
    trains = training is not None and training.trains_control_rows(it.template_added)
    yield Finding(
        "W" if trains else "E",
        f"{many(len(found), 'control token')} of the chat that the model was never trained on",
        listed([f"{tokenizer.token(id)} ({id}): {why}" for id, why in sorted(found.items())]),
        "they are trained now"
        if trains
        else "fine-tune with --train-control-tokens yes, or every weight; doctor --fix starts "
        "their rows from the mean",
    )


def untrained_rows(it: Checkpoint, matrix: torch.Tensor) -> dict[int, str]:
    """Which rows of an embedding or head a chat needs and nobody trained, and how it shows."""
    if it.tokenizer is None:
        return {}
    rows = len(matrix)
    used = (written_by_template(it.tokenizer, it.template) | it.stops.ids) - it.untrained
    others = (id for id in it.tokenizer.added.values() if id < rows)
    return untrained(matrix, [id for id in used if 0 <= id < rows], [*others])


def tied_head(it: Checkpoint) -> Findings:
    """A head that config.json ties to the embedding, and that is stored too, is the embedding.

    Merging an adapter that trained one of the two leaves such a checkpoint: whoever reads it takes
    the embedding for the head.
    """
    if it.files is None or it.account is None or not it.tied_copy:
        return
    head, embedding = it.tied_copy
    one, other = it.files.read(head), it.files.read(embedding)
    if one.shape == other.shape and torch.equal(one, other):
        return
    yield Finding(
        "E",
        "config.json ties the head to the embedding, and the stored head is another",
        f"{head} {list(one.shape)} differs from {embedding} {list(other.shape)}",
        "set tie_word_embeddings to false, if the stored head is the right one",
    )


RULES: Registry = {
    "vocabulary": vocabulary,
    "special-ids": special_ids,
    "untrained-tokens": untrained_tokens,
    "tied-head": tied_head,
}
