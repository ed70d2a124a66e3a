"""Tokens added to a model that is loaded, its padding token, and files that agree afterwards."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from peft import PeftModel
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ardor
from ardor.cli.main import main
from ardor.errors import ConfigError, TextError
from ardor.load import tokenizer_of
from ardor.text.chat import terminator
from ardor.text.tokenizer import Tokenizer
from ardor.train import finetune
from ardor.train.config import Finetune
from ardor.vocabulary import add_tokens, set_pad

from .tiny import sentences, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:.*tie_word_embeddings:UserWarning"
)

SPECIAL = ("<|endoftext|>",)


def made(folder: Path, *, tied: bool = True, rows: int | None = None, **names: Any) -> Path:
    """A tiny Llama without chat tokens; its tokenizer has EOS and nothing else unless `names`."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 4], 290, SPECIAL)
    extra = [AddedToken(text, special=True, normalized=False) for text in names.values()]
    tokenizer = tokenizer.adding(extra).naming(
        **{name: text for name, text in names.items() if not name.startswith("reserve")}
    )
    config = LlamaConfig(
        vocab_size=rows or tokenizer.vocab_rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.special.bos,
        eos_token_id=tokenizer.special.eos,
        pad_token_id=tokenizer.special.pad,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def opened(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_at_the_mean_and_the_old_ones_as_they_were(tmp_path: Path, tied: bool):
    lm = ardor.load(made(tmp_path / "m", tied=tied), dtype="float32")
    before = lm.model.decoder.embed_tokens.weight.detach().clone()
    head = None if tied else lm.model.decoder.lm_head.weight.detach().clone()
    old = lm.logits([[1, 2, 3]])
    known = lm.tokenizer.vocab_rows
    ids = lm.add_tokens(["<tool>", "zebra"])
    assert ids == {"<tool>": known, "zebra": known + 1}
    decoder = lm.model.decoder
    assert decoder.spec.vocab == 320 == len(decoder.embed_tokens.weight)  # a multiple of 64
    assert (decoder.lm_head is None) == tied
    for table, was in [(decoder.embed_tokens, before), (decoder.lm_head, head)]:
        if table is None or was is None:
            continue
        assert torch.equal(table.weight[:known], was)
        new = table.weight[known:].detach()
        torch.testing.assert_close(new, was.mean(0).expand_as(new), atol=1e-3, rtol=0)
        assert len(new.unique(dim=0)) == len(new)  # not one row many times
    torch.testing.assert_close(lm.logits([[1, 2, 3]])[..., :known], old)
    assert lm.score("the cat").nats > 0
    # No id beyond the tokenizer takes probability.
    hidden = decoder.hidden(torch.tensor([[1, 2, 3]]))
    assert decoder.token_logits(hidden).softmax(-1)[..., known + 2 :].sum() == 0
    assert decoder.logits(hidden).softmax(-1)[..., known + 2 :].sum() > 0
    # A token that is never read as text, or anywhere, depending on what it looks like.
    assert lm.tokenizer.encode_content("a zebra")[-1] == ids["zebra"]
    assert ids["<tool>"] not in lm.tokenizer.encode_content("<tool>")
    assert ids["<tool>"] in lm.tokenizer.encode_content("<tool>", tags=True)
    assert lm.add_tokens(["zebra"]) == {"zebra": known + 1}
    lm.save(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert theirs.config.vocab_size == 320 and theirs.config.tie_word_embeddings == tied
    tokens = torch.tensor([[1, ids["zebra"], ids["<tool>"]]])
    torch.testing.assert_close(theirs(tokens).logits, lm.logits(tokens), atol=1e-5, rtol=1e-5)
    text = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert text("<tool>zebra")["input_ids"] == [*ids.values()]
    assert ardor.load(tmp_path / "saved").tokenizer.id("zebra") == ids["zebra"]


def test_tables_never_shrink_and_reserve_rows_are_taken_first(tmp_path: Path):
    lm = ardor.load(made(tmp_path / "m", rows=384), dtype="float32")
    weight = lm.model.decoder.embed_tokens.weight.detach().clone()
    known = lm.tokenizer.vocab_rows
    lm.add_tokens(["<tool>"])
    table = lm.model.decoder.embed_tokens.weight
    assert len(table) == 384 and lm.model.config["vocab_size"] == 384
    changed = (table != weight).any(1).nonzero().flatten().tolist()
    assert changed == [known]  # from noise to the mean of what has tokens
    torch.testing.assert_close(table[known], weight[:known].mean(0), atol=1e-3, rtol=0)


def test_a_seed_repeats_the_rows(tmp_path: Path):
    folder, rows = made(tmp_path / "m"), []
    for seed in (1, 1, 2):
        lm = ardor.load(folder, dtype="bfloat16")
        lm.add_tokens(["a1"], seed=seed)
        rows.append(lm.model.decoder.embed_tokens.weight)
    assert rows[0].dtype == torch.bfloat16 and torch.equal(rows[0], rows[1])
    exact = ardor.load(folder, dtype="float32")
    exact.add_tokens(["a1"], seed=1)
    # Drawn in float32 and rounded once.
    mean = rows[0][:290].float().mean(0)
    torch.testing.assert_close(rows[0][290].float(), mean, atol=2e-3, rtol=1e-2)


def test_what_cannot_be_added_is_refused(tmp_path: Path):
    lm = ardor.load(made(tmp_path / "m"))
    with pytest.raises(TextError, match="no visible sign"):
        lm.add_tokens(["  "])
    with pytest.raises(TextError, match="is not in the vocabulary; add it first"):
        lm.tokenizer.naming(eos_token="<none>")


@pytest.mark.parametrize(
    ("names", "token", "why"),
    [
        ({"pad_token": "<own>"}, "<own>", "the model's own"),
        ({"reserve": "<|finetune_right_pad_id|>"}, "<|finetune_right_pad_id|>", "in reserve"),
        ({"reserve": "<|reserved_special_token_0|>"}, "<|reserved_special_token_0|>", "in reserve"),
        ({"unk_token": "<unk>"}, "<unk>", "no text becomes"),
        ({"pad_token": "<|endoftext|>"}, "<|endoftext|>", "also ends texts"),
        ({}, "<|endoftext|>", "stays a target"),
    ],
)
def test_auto_takes_what_pads_without_harm(tmp_path: Path, names, token: str, why: str):
    lm = ardor.load(made(tmp_path / "m", **names))
    assert why in lm.set_pad()
    lm.save(tmp_path / "saved")
    assert agreed(tmp_path / "saved")["pad"] == lm.tokenizer.id(token)
    assert lm.tokenizer.special.pad == lm.tokenizer.id(token)


OWN, RESERVE = {"pad_token": "<own>"}, {"reserve": "<|finetune_right_pad_id|>"}
OTHERS = {"reserve2": "<|reserved_special_token_0|>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("names", "held", "token", "why"),
    [
        (OWN | RESERVE, ["<own>"], "<|finetune_right_pad_id|>", "not '<own>', which the data"),
        (OWN | OTHERS, ["<own>", "<|reserved_special_token_0|>"], "<unk>", "not '<own>', which"),
        (RESERVE | OTHERS, [RESERVE["reserve"]], OTHERS["reserve2"], "not '<|finetune_right_pad"),
        ({"pad_token": "<unk>", "unk_token": "<unk>"}, ["<unk>"], "<|endoftext|>", "not '<unk>'"),
        ({"unk_token": "<unk>"}, ["<unk>"], "<|endoftext|>", "not '<unk>', which the data hold: r"),
        (OWN, [], "<own>", "the model's own"),
    ],
)
def test_auto_takes_nothing_that_the_data_hold_and_says_so(tmp_path, names, held, token, why):
    lm = ardor.load(made(tmp_path / "m", **names))
    rows = {lm.tokenizer.id(one): f"row {i}" for i, one in enumerate(held, 1)}
    said = set_pad(lm.model, occurs=rows.get)
    assert lm.tokenizer.token(lm.tokenizer.special.pad) == token and why in said
    assert ("the data hold: row 1" in said) is bool(held)


def agreed(folder: Path) -> dict[str, Any]:
    """The special tokens that every file of a checkpoint names; they must agree."""
    config, generation = opened(folder, "config.json"), opened(folder, "generation_config.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    for key in ("eos_token_id", "pad_token_id"):
        assert config[key] == generation[key], key
    eos = generation["eos_token_id"]
    first = eos[0] if isinstance(eos, list) else eos
    assert theirs.eos_token_id == first
    assert theirs.pad_token_id == generation["pad_token_id"]
    names = opened(folder, "tokenizer_config.json")
    legacy = opened(folder, "special_tokens_map.json")
    for name in ("eos_token", "pad_token"):
        assert names[name] == legacy[name]
    return {"eos": eos, "pad": generation["pad_token_id"]}


def test_unk_is_refused_where_data_or_texts_can_hold_it(tmp_path: Path):
    lm = ardor.load(made(tmp_path / "m", unk_token="<unk>"))
    unk = lm.tokenizer.special.unk
    with pytest.raises(ConfigError, match=r"the data hold it: d.jsonl, row 3; choose auto"):
        set_pad(lm.model, "unk", occurs={unk: "d.jsonl, row 3"}.get)
    assert "UNK" in lm.set_pad("unk") and lm.tokenizer.special.pad == unk
    with pytest.raises(ConfigError, match="has no UNK token; choose auto"):
        ardor.load(made(tmp_path / "none")).set_pad("unk")
    gpt2 = ardor.load(made(tmp_path / "gpt2", unk_token="<|endoftext|>"))
    with pytest.raises(ConfigError, match="also begins or ends texts"):
        gpt2.set_pad("unk")


def test_a_new_pad_has_a_row_and_is_never_written(tmp_path: Path):
    lm = ardor.load(made(tmp_path / "m"), dtype="float32")
    assert "new, with a row" in lm.set_pad("new")
    pad = lm.tokenizer.special.pad
    assert lm.tokenizer.token(pad) == "<|pad|>" and lm.model.decoder.spec.vocab == 320
    weight = lm.model.decoder.embed_tokens.weight
    with torch.no_grad():
        weight[pad] = 50 * weight[:pad].abs().max(0).values  # what any greedy model would choose
    for answer in lm.generate(["the cat", "mat"], max_new_tokens=20, temperature=2.0):
        assert pad not in answer.tokens
    lm.save(tmp_path / "saved")
    assert agreed(tmp_path / "saved")["pad"] == pad
    assert not lm.model.untrained


def test_eos_pads_and_still_stops(tmp_path: Path):
    lm = ardor.load(made(tmp_path / "m"))
    lm.set_pad("eos")
    assert lm.tokenizer.special.pad == lm.tokenizer.special.eos
    assert lm.model.stops.ids == {lm.tokenizer.special.eos}


def rows_of_chat(path: Path) -> Path:
    pairs = zip(sentences(12, 1), sentences(12, 2), strict=True)
    return write_rows(
        path,
        [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in pairs
        ],
    )


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_trains_and_keeps_just_the_new_rows(tmp_path: Path, tied: bool):
    """Through the files of PEFT and back: F7, F9."""
    base, data = made(tmp_path / "m", tied=tied), rows_of_chat(tmp_path / "d.jsonl")
    config = Finetune(
        model=str(base),
        data=str(data),
        output=tmp_path / "run",
        setup_chat_format=True,
        add_tokens=("<tool>",),
        max_steps=2,
        learning_rate=1e-2,
        lora_r=2,
        dtype="float32",
    )
    run = finetune.prepare(config)
    known = run.model.tokenizer.vocab_rows - 4  # the fourth is a padding token, never read
    start = run.model.decoder.embed_tokens.base_weight.clone()
    list(run.events())
    found = ardor.load(tmp_path / "run", dtype="float32")
    assert found.model.decoder.spec.vocab == 320
    moved = (found.model.decoder.embed_tokens.weight != start).any(1).nonzero().flatten().tolist()
    new = [*range(known, known + 3)]
    assert set(moved) <= set(new) and len(moved) >= 2  # <tool> is in no row of the data
    tokens = torch.tensor([[1, *new, 2]])
    torch.testing.assert_close(found.logits(tokens), run_logits(run, tokens), atol=1e-5, rtol=1e-5)
    checkpoint = found_checkpoint(tmp_path / "run")
    told = opened(checkpoint, "adapter_config.json")["trainable_token_indices"]
    assert told == (new if tied else {"embed_tokens": new, "lm_head": new})
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(320, mean_resizing=False)
    theirs = PeftModel.from_pretrained(theirs, checkpoint)
    wanted = theirs(tokens).logits[..., : known + 3]
    torch.testing.assert_close(found.logits(tokens)[..., : known + 3], wanted, atol=1e-4, rtol=1e-4)
    # Merged, the model is whole: config.json knows its rows, the head is tied as before.
    from ardor.adapters.merge import merge

    merge(found.model.decoder)
    found.save(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(whole(tokens).logits, found.logits(tokens), atol=1e-5, rtol=1e-5)
    assert agreed(tmp_path / "merged")["eos"][0] == found.tokenizer.id("<|im_end|>")


def run_logits(run: Any, tokens: torch.Tensor) -> torch.Tensor:
    decoder = run.model.decoder.eval()
    with torch.no_grad():
        return decoder.logits(decoder.hidden(tokens))


def found_checkpoint(run: Path) -> Path:
    return next(run.glob("checkpoint-*"))


def test_rows_that_were_added_are_never_left_untrained(tmp_path: Path):
    base, data = made(tmp_path / "m"), rows_of_chat(tmp_path / "d.jsonl")
    settings: dict[str, Any] = {"model": str(base), "data": str(data), "dtype": "float32"}
    config = Finetune(
        output=tmp_path / "r", setup_chat_format=True, train_control_tokens="no", **settings
    )
    with pytest.raises(ConfigError, match="would leave the rows of 2 added tokens"):
        finetune.prepare(config)
    with pytest.raises(ConfigError, match="lacks <.im_start.> or .*--setup-chat-format"):
        finetune.prepare(Finetune(output=tmp_path / "r", chat_template="chatml", **settings))
    with pytest.raises(ConfigError, match="chat_template and setup_chat_format both choose"):
        Finetune(chat_template="chatml", setup_chat_format=True, **settings)


def test_chatml_on_a_base_model_without_the_usual_defects(tmp_path: Path):
    """PITFALLS 2.2: pad is not EOS, nothing shrinks, no stop token is lost, BOS comes once."""
    folder = made(tmp_path / "m", rows=448, bos_token="<s>")
    spec = opened(folder, "tokenizer.json")
    tokenizer = Tokenizer.from_directory(folder)
    bos = tokenizer.special.bos
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    lm = ardor.load(folder)
    old_eos = lm.tokenizer.special.eos
    ids = ardor.setup_chat_format(lm)
    end = lm.tokenizer.id("<|im_end|>")
    assert ids == tuple(sorted((lm.tokenizer.id("<|im_start|>"), end)))
    assert lm.model.decoder.spec.vocab == 448
    assert lm.tokenizer.special.eos == end == terminator(lm.tokenizer, lm.model.template)
    assert lm.tokenizer.special.pad not in (None, end) and lm.tokenizer.special.bos == bos
    assert lm.model.stops.eos_token_id == [end, old_eos]
    lm.save(tmp_path / "saved")
    assert agreed(tmp_path / "saved")["eos"] == [end, old_eos]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "the cat"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt.count(bos) == 1 and prompt[0] == bos
    with pytest.raises(ConfigError, match="has a chat template"):
        ardor.setup_chat_format(ardor.load(tmp_path / "saved"))


def test_a_template_is_cloned_with_the_tokens_it_writes(tmp_path: Path):
    source = made(tmp_path / "s", reserve="<|turn|>", reserve2="<|end|>", reserve3="<|unused|>")
    template = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    Tokenizer.from_directory(source).save(source, template)
    lm = ardor.load(made(tmp_path / "m"))
    old_eos = lm.tokenizer.special.eos
    ids = ardor.clone_chat_template(lm, source)
    assert sorted(ids) == sorted(map(lm.tokenizer.id, ("<|turn|>", "<|end|>")))
    assert lm.tokenizer.id("<|unused|>") is None
    assert lm.model.stops.eos_token_id == [lm.tokenizer.id("<|end|>"), old_eos]
    lm.save(tmp_path / "saved")
    assert agreed(tmp_path / "saved")["eos"] == [lm.tokenizer.id("<|end|>"), old_eos]
    with pytest.raises(ConfigError, match="has no chat template to take"):
        ardor.clone_chat_template(ardor.load(made(tmp_path / "b")), made(tmp_path / "c"))


def test_tokens_are_added_before_an_adapter_not_under_it(tmp_path: Path):
    from ardor.adapters.lora import LoraConfig, add_lora

    lm = ardor.load(made(tmp_path / "m"))
    add_lora(lm.model.decoder, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="under an adapter; merge"):
        add_tokens(lm.model, ["<tool>"])
    assert tokenizer_of(lm.model).id("<tool>") is None


def of_pieces(folder: Path) -> bytes:
    """A tiny model whose only tokenizer is a tokenizer.model; what that holds."""
    written = io.BytesIO()
    made(folder, rows=320)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(60)),
        model_writer=written,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=310,
        hard_vocab_limit=False,
        minloglevel=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return written.getvalue()


def test_a_checkpoint_with_only_a_sentencepiece_model_is_loaded_and_saved(tmp_path: Path):
    pieces, folder = of_pieces(tmp_path / "m"), tmp_path / "m"
    lm = ardor.load(folder, dtype="float32")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    text = "the cat  saw naïve 你好"
    assert lm.tokenizer.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
    assert lm.model.stops.ids >= {theirs.eos_id()}
    assert lm.generate("the cat", max_new_tokens=4).tokens
    lm.save(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"] == lm.tokenizer.encode(text)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == pieces


def test_tokenizer_model_goes_through_runs_merges_and_quantized_files(tmp_path: Path):
    """With the names of added tokens beside it, or it would say that their ids are free."""
    pieces, folder = of_pieces(tmp_path / "m"), tmp_path / "m"
    data = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in sentences(12)])
    for name, settings in (("run", {}), ("grown", {"add_tokens": ("<tool>",)})):
        config = Finetune(
            model=str(folder), data=str(data), output=tmp_path / name, max_steps=1, **settings
        )
        list(finetune.prepare(config).events())
        merged = tmp_path / f"{name}-merged"
        assert main(["merge", str(tmp_path / name), "-o", str(merged)]) == 0
        packed = tmp_path / f"{name}-packed"
        assert main(["quantize", str(merged), "-o", str(packed), "--format", "nf4"]) == 0
        for written in (tmp_path / name / "checkpoint-1", merged, packed):
            assert (written / "tokenizer.model").read_bytes() == pieces, written
            beside = written / "added_tokens.json"
            assert beside.is_file() == (name == "grown"), written
            assert name == "run" or [*opened(written, beside.name)] == ["<tool>"]
