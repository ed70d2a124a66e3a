"""No key of any family's config is passed over: each is changed to what it must not be.

The configs are those of the parity cases, so that every key that a family has is among them.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import transformers

from ardor.errors import ConfigError
from ardor.families import FAMILIES, family_of
from ardor.families.family import HARMLESS
from ardor.families.hf_config import HFConfig
from ardor.families.images import UNREAD

from ..parity.cases import CASES
from ..parity.docs import KEYS
from ..parity.peer import Case
from ..parity.test_transformers import SIZES

Path = tuple[str, ...]
Config = dict[str, Any]

# No key has a value of these kinds.
WRONG: dict[str, Any] = {
    "text": "absurd",
    "list": ["absurd"],
    "lists": [[1]],
    "object": {"absurd": 1},
    "nan": math.nan,
    "infinite": math.inf,
}
# Of the right type for some, but not for any model.
ABSURD: dict[str, Any] = {"negative": -7, "fraction below 0": -0.5}
# These may mean something, or nothing; what they must not do is end in an error of another kind.
ODD: dict[str, Any] = {
    "huge": 10**12,
    "zero": 0,
    "fraction": 0.5,
    "true": True,
    "false": False,
    "empty": [],
}

_TRAINING = "acts only in training, where Ardor uses none"
_OUTPUT = "chooses what a Python call of transformers returns"
_DERIVED = "transformers derives it from other keys, which decide"
_OTHER = "another key is there too, and decides"
_IMAGES = "of images, which are not read"
# Keys that some families read and may ignore, whatever they hold: (family or "", key) -> why.
IGNORED: dict[tuple[str, str], str] = {
    **{("", key): _TRAINING for key in ("dropout", "embedding_dropout", "emb_pdrop")},
    **{("", key): _TRAINING for key in ("layerdrop", "residual_dropout", "input_jitter_noise")},
    **{("", key): _TRAINING for key in ("init_std", "init_device")},
    **{(family, "router_jitter_noise"): _TRAINING for family in ("llama4_text", "mixtral")},
    **{(family, "router_aux_loss_coef"): _TRAINING for family in ("llama4_text", "gpt_oss")},
    ("", "output_router_logits"): _OUTPUT,
    ("", "num_nextn_predict_layers"): "layers after the last, which draft tokens",
    ("", "pretraining_tp"): "its slices of a matrix product give the same sums",
    ("bloom", "slow_but_exact"): "the same sums in another order",
    **{
        ("gpt_bigcode", key): "scores are float32 here always"
        for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    },
    ("gpt_oss", "hidden_act"): "the gate is what it is, whatever stands here",
    ("mpt", "attn_impl"): "changes speed, not results",
    ("mpt", "attn_uses_sequence_id"): "documents are always apart",
    ("mpt", "learned_pos_emb"): "without effect beside ALiBi, which is required",
    **{
        (family, key): _DERIVED
        for family in ("deepseek_v2", "deepseek_v3")
        for key in ("head_dim", "qk_head_dim")
    },
    ("", "type"): "rope_type is its newer name, and decides",
    **{(family, "original_max_position_embeddings"): _OTHER for family in ("phi3", "phimoe")},
    ("exaone4", "sliding_window_pattern"): _OTHER,
    **{("", key): _IMAGES for key in UNREAD},
    **{
        ("", key): "the three positions of a token of text are equal"
        for key in ("mrope_section", "mrope_interleaved")
    },
    **{("llama4", key): _TRAINING for key in ("router_jitter_noise", "router_aux_loss_coef")},
    **{
        ("gemma4", key): "its case has no experts; those of gemma4_text have"
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size")
    },
}
# Not read where a list of layers, or a factor, stands in their place: any number will do.
UNUSED = {"max_window_layers": "layer_types decides", "mscale": "attention_factor decides"}


def configs(model_type: str) -> list[Config]:
    cases = [case for case in CASES.values() if case.model_type == model_type]
    for keys in KEYS.get(model_type, {}).values():
        cases.append(Case(model_type, keys, sizes=SIZES[model_type]))
    return [case.config().to_dict() for case in cases]


def read(config: Config) -> Any:
    return family_of(config).spec(HFConfig(config, path="config.json"))


def paths(config: Config, above: Path = ()) -> Iterator[Path]:
    """Every key; of an object that is read key by key, those inside it too."""
    for key, value in config.items():
        if key == "model_type" or key in HARMLESS:
            continue
        yield (*above, key)
        if isinstance(value, dict) and key not in UNREAD:
            yield from paths(value, (*above, key))


def changed(config: Config, path: Path, value: Any) -> Config:
    config = deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = deepcopy(value)
    return config


def outcome(config: Config, path: Path, value: Any) -> str:
    """refused, same or changed; an error of any other kind is the test's."""
    before = read(config)
    try:
        after = read(changed(config, path, value))
    except ConfigError as error:
        assert str(error).startswith("config.json"), error
        named = value in ODD.values() or any(key in str(error) for key in path)
        assert named, f"{path} = {value!r}: {error}"
        return "refused"
    return "same" if after == before else "changed"


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of what these configs do to its own checks
    yield
    transformers.logging.set_verbosity(before)


TYPES = sorted({family.model_type for family in FAMILIES.values()})
each = pytest.mark.parametrize("model_type", TYPES)


@each
def test_an_unknown_key_is_refused_by_name_wherever_it_stands(model_type):
    for config in configs(model_type):
        objects = {path[:-1] for path in paths(config)}
        for place in objects:
            if (model_type, place[-1:] and place[-1]) in IGNORED:
                continue
            with pytest.raises(ConfigError, match=r"nothing reads .*zap_zap=8"):
                read(changed(config, (*place, "zap_zap"), 8))


@pytest.mark.sweep
@each
def test_no_key_takes_a_value_of_no_sense(model_type):
    """Where one of a family's configs does not use a key, another must."""
    found: dict[tuple[Path, str], set[str]] = {}
    for config in configs(model_type):
        for path in paths(config):
            for label, value in {**WRONG, **ABSURD, **ODD}.items():
                found.setdefault((path, label), set()).add(outcome(config, path, value))
    for (path, label), outcomes in found.items():
        key = path[-1]
        if {("", key), (model_type, key)} & {*IGNORED} or key in HARMLESS or label in ODD:
            continue
        if key not in UNUSED or label in WRONG:
            assert "refused" in outcomes, f"{path} may be {label}: {outcomes}"
            assert "changed" not in outcomes, f"{path} takes {label} at its word"


@pytest.mark.sweep
def test_what_is_said_to_be_ignored_is_there_and_ignored():
    seen = {}
    for model_type in TYPES:
        for config in configs(model_type):
            for path in paths(config):
                for family in ("", model_type):
                    if (family, path[-1]) in IGNORED:
                        result = outcome(config, path, "absurd")
                        seen.setdefault((family, path[-1]), set()).add(result)
    for name in IGNORED:
        absent = {"same"} if name[1] in UNREAD else ()  # not every kind of it is in a case
        assert "same" in seen.get(name, absent), f"{name} is not ignored: take it out of IGNORED"
        assert IGNORED[name]


def test_a_wrong_digit_does_not_take_all_memory():
    config = configs("llama")[0]
    with pytest.raises(ConfigError, match=r"num_hidden_layers=10001 is more than any .*\(10000\)"):
        read(changed(config, ("num_hidden_layers",), 10_001))
    with pytest.raises(ConfigError, match=r"vocab_size=\d+ is more than any model has"):
        read(changed(config, ("vocab_size",), 2**31))
