"""No key of a config.json is ignored by accident, and the file comes back as it was."""

import json

import pytest

from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig


def config(**keys) -> HFConfig:
    return HFConfig(keys, path="config.json")


def test_a_key_that_nothing_reads_is_refused_by_name_and_value():
    hf = config(read=1, known=2, attention_bais=True)
    hf.take("read")
    with pytest.raises(ConfigError, match=r"nothing reads attention_bais=True \(like attention_b"):
        hf.finish({"known": "why", "attention_bias": "why"})


def test_a_key_that_was_read_or_is_harmless_passes():
    hf = config(read=1, known=2, nothing=None)
    with pytest.raises(ConfigError, match="nothing reads read=1"):  # the probe can fail
        hf.finish({"known": "why"})
    hf.take("read")
    hf.finish({"known": "why"})


def test_a_missing_key_names_what_is_near():
    with pytest.raises(ConfigError, match=r"no 'hidden_size' \(found 'hidden_sise'\)"):
        config(hidden_sise=3).count("hidden_size")
    with pytest.raises(ConfigError, match=r"no 'hidden_size'$"):
        config(a=3).count("hidden_size")


@pytest.mark.parametrize(
    ("getter", "value"),
    [
        ("count", 0),
        ("count", 2.5),
        ("count", True),
        ("count", "4"),
        ("number", "1e-5"),
        ("number", True),
        ("flag", 0),
        ("flag", "false"),
        ("section", [1]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(getter, value):
    with pytest.raises(ConfigError, match=r"config\.json: key="):
        getattr(config(key=value), getter)("key")


def test_a_null_is_absence():
    hf = config(key=None)
    assert hf.count("key", 3) == 3
    with pytest.raises(ConfigError, match="no 'key'"):
        hf.count("key")
    hf.finish({})


def test_a_section_keeps_its_own_account():
    section = config(rope={"factor": 2.0, "other": 1}).section("rope")
    assert section is not None and section.number("factor") == 2.0
    with pytest.raises(ConfigError, match=r"config\.json, rope: nothing reads other=1"):
        section.finish({})
    assert config(rope={}).section("rope") is None and config().section("rope") is None


def test_the_dtype_has_two_names():
    assert config(torch_dtype="float16").dtype() == "float16"
    assert config(torch_dtype="float16", dtype="torch.bfloat16").dtype() == "bfloat16"
    assert config().dtype() is None
    with pytest.raises(ConfigError, match="not the name of a dtype"):
        config(dtype=16).dtype()


def test_an_unchanged_file_is_written_byte_for_byte():
    text = '{"b":1,\n"a":  null, "é": [1.0]}'
    hf = HFConfig(json.loads(text), path="config.json", text=text)
    assert hf.written({}) == text
    assert hf.written({"b": 1, "absent": None}) == text


def test_a_changed_file_keeps_its_order_and_its_other_keys():
    text = '{"b":1,\n"a":  null, "é": [1.0]}'
    hf = HFConfig(json.loads(text), path="config.json", text=text)
    assert hf.written({"b": 2}) == '{\n  "b": 2,\n  "a": null,\n  "é": [\n    1.0\n  ]\n}\n'
    assert json.loads(hf.written({"new": 3, "b": None})) == {"a": None, "é": [1.0], "new": 3}


def test_a_key_may_have_another_name():
    hf = config(n_embd=3, n_layer=None)
    hf.alias(hidden_size="n_embd", num_hidden_layers="n_layer", num_heads="n_head")
    assert hf.count("hidden_size") == 3 and hf.count("num_hidden_layers", 2) == 2
    hf.finish({})
    same = config(n_embd=3, hidden_size=3)
    same.alias(hidden_size="n_embd")
    same.finish({})
    with pytest.raises(ConfigError, match="hidden_size=4 and n_embd=3 mean the same"):
        config(n_embd=3, hidden_size=4).alias(hidden_size="n_embd")
