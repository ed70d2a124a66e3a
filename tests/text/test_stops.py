from collections.abc import Callable

from ardor.text.chat import CHATML, ChatTemplate
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer


def test_the_stop_set_is_the_union_of_all_sources_each_named(tokenizer: Tokenizer):
    end, eos = tokenizer.added["<|im_end|>"], tokenizer.added["<|endoftext|>"]
    stops = StopSet.gather(
        tokenizer,
        template=CHATML,
        generation_config={"eos_token_id": [7, eos], "stop_strings": "User:"},
        config={"eos_token_id": 8, "text_config": {"eos_token_id": 9}},
    )
    assert stops.ids == {end, eos, 7, 8, 9}
    assert stops.strings == ("User:",)
    assert stops.sources[end] == ("the chat template's terminator",)
    assert stops.sources[eos] == ("the tokenizer's eos_token", "generation_config.json")
    assert stops.sources[8] == ("config.json",)
    assert stops.eos_token_id == [end, 7, 8, 9, eos]


def test_sources_may_be_silent_or_name_no_token(
    tokenizer: Tokenizer, template: Callable[[str], ChatTemplate]
):
    bare = Tokenizer(tokenizer._backend)
    stops = StopSet.gather(
        bare,
        template=template("plain"),
        generation_config={"eos_token_id": None, "stop_strings": ["a", "b"]},
        config={"eos_token_id": -1},
    )
    assert stops == StopSet(frozenset(), ("a", "b"))
    assert stops.eos_token_id is None
    assert StopSet.gather(tokenizer).eos_token_id == tokenizer.special.eos
