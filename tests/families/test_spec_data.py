"""A spec as a file: every spec there and back, and every mistake with its place."""

import json

import pytest
from hypothesis import given

from ardor.arch.spec import Attention, Decoder, Experts, LatentAttention, Mlp
from ardor.errors import ConfigError
from ardor.families import family_for
from ardor.families.contradictions import check
from ardor.families.hf_config import HFConfig
from ardor.families.spec_data import differences, from_data, to_data
from ardor.files.yaml import read_yaml, to_yaml

from ..invariants.test_random_specs import many, specs

# beartype, which checks the specs as they are drawn, looks at a random item of each tuple.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

TEXT = """\
vocab: 320
width: 64
tied: true
norm: {eps: 1e-5}
max_positions: 128
layers:
  - repeat: 2
    layers:
      - mixer: {kind: attention, heads: 4, kv_heads: 2, rope: {theta: 1e4}, window: 32}
        ffn: {kind: mlp, width: 128, act: silu}
      - repeat: 2
        mixer: {kind: attention, heads: 4, rope: null, sinks: true, qk_norm: {norm: {eps: 1e-6}}}
        ffn:
          kind: experts
          count: 4
          router: {per_token: 2, groups: 2, kept_groups: 1}
          expert: {width: 32, act: relu2, gated: false}
  - mixer:
      kind: latent_attention
      heads: 4
      query_rank: null
      kv_rank: 32
      plain_width: 12
      value_width: 16
      rope: {theta: 10000, rotated: 4, scaling: {kind: linear, factor: 2}}
      norm: {eps: 1e-6}
    ffn: {kind: mlp, width: 128, act: silu}
    norm: {kind: layer, eps: 1e-5, bias: true}
    placement: sandwich
"""


@pytest.fixture
def read(tmp_path):
    def reader(text: str, **defaults) -> Decoder:
        (tmp_path / "my.yaml").write_text(text)
        return from_data(read_yaml(tmp_path / "my.yaml").values, "my.yaml", defaults)

    return reader


@many
@given(specs)
@pytest.mark.sweep
def test_every_spec_is_itself_after_yaml_and_json(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(to_yaml(to_data(spec)))
    assert from_data(read_yaml(path).values, str(path)) == spec
    assert from_data(json.loads(json.dumps(to_data(spec))), "json") == spec
    check(spec, "a random spec")  # no rule refuses what runs


@many
@given(specs)
@pytest.mark.sweep
def test_every_spec_has_a_family_that_reads_it_back(spec):
    family = family_for(spec)
    assert family.spec(HFConfig(family.config(spec), path="config.json")) == spec


def test_what_follows_from_other_fields_may_be_left_out(read):
    spec = read(TEXT)
    assert len(spec.layers) == 7
    sliding, full, *_, last = spec.layers
    assert spec.layers[:3] == spec.layers[3:6] and spec.layers[1] == spec.layers[2]
    assert isinstance(sliding.mixer, Attention) and isinstance(full.mixer, Attention)
    assert (sliding.mixer.head_width, sliding.mixer.scale, full.mixer.kv_heads) == (16, 0.25, 4)
    assert sliding.mixer.rope is not None and sliding.mixer.rope.rotated == 16
    assert sliding.norm == spec.norm != last.norm
    assert isinstance(full.ffn, Experts) and full.ffn.expert.act == "relu2"
    assert isinstance(last.mixer, LatentAttention) and last.mixer.scale == 0.25
    assert isinstance(last.ffn, Mlp)


def test_a_stack_is_written_in_short_and_read_back(read):
    spec = read(TEXT)
    data = to_data(spec)
    assert from_data(data, "x") == spec
    assert len(data["layers"]) == 5  # the pattern is broken by the last layer
    alternate = from_data({**data, "layers": data["layers"][:2] * 6}, "x")
    (pattern,) = to_data(alternate)["layers"]
    assert pattern["repeat"] == 6 and len(pattern["layers"]) == 2
    assert pattern["layers"][1]["repeat"] == 2
    assert from_data(to_data(alternate), "x") == alternate


def test_defaults_stand_in_for_what_the_file_leaves_out(read):
    text = TEXT.replace("vocab: 320\n", "").replace("max_positions: 128\n", "")
    assert read(text, vocab=64, max_positions=9).max_positions == 9
    assert read(TEXT, vocab=64).vocab == 320
    with pytest.raises(ConfigError, match="my.yaml: there is no 'vocab'"):
        read(text)


WRONG = [
    ("heads: 4, kv_heads: 2", "heads: 4, kv_heads: 3",
     r"layers\[0\].layers\[0\].mixer.heads is 4, which is not a multiple of kv_heads=3"),
    ("heads: 4, kv_heads: 2", "heads: yes, kv_heads: 2",
     r"layers\[0\].layers\[0\].mixer.heads is True, expected a whole number"),
    ("window: 32", "window: 0", r"mixer.window is 0, expected at least 1"),
    ("window: 32", "windw: 32", r"mixer.windw is not known; did you mean 'window'"),
    ("window: 32", "softcap: -1.0", r"mixer.softcap is -1.0, expected a number above 0"),
    ("window: 32", "alibi: [0.5]", r"mixer.alibi has 1 slopes, expected one for each of heads=4"),
    ("window: 32", "alibi: 0.5", r"mixer.alibi is 0.5, expected a list"),
    ("window: 32", "alibi_coarse: true", r"mixer.alibi_coarse is true, but there is no alibi"),
    ("{theta: 1e4}", "{theta: 1e4, rotated: 3}", r"mixer.rope.rotated is 3, which is odd"),
    ("{theta: 1e4}", "{theta: 1e4, rotated: 18}", r"rotated is 18, more than the head_width=16"),
    ("window: 32", "kv_layer: 0", r"layers\[0\].mixer.kv_layer is 0, which is no layer before"),
    ("sinks: true", "kv_layer: 0", r"layers\[1\].mixer.kv_layer is 0, a layer whose keys have"),
    ("{theta: 1e4}", "{theta: 1e4, scaling: {kind: proportional, turning: 9}}",
     r"mixer.rope.scaling.turning is 9, more than 8 pairs"),
    ("{theta: 1e4}", "{theta: .nan}", r"mixer.rope.theta is nan, expected a finite number"),
    ("per_token: 2", "per_token: 5", r"ffn.router.per_token is 5, more than count=4 experts"),
    ("per_token: 2", "per_token: 3", r"per_token is 3, more than the 2 experts in 1 kept groups"),
    ("groups: 2,", "groups: 3,", r"router.groups is 3, which does not divide count=4"),
    ("kept_groups: 1", "kept_groups: 3", r"router.kept_groups is 3, more than groups=2"),
    ("          count: 4", "          count: 4\n          shared_gated: true",
     r"ffn.shared_gated is true, but there is no shared"),
    ("kind: mlp, width: 128", "kind: mpl, width: 128",
     r"layers\[0\].layers\[0\].ffn has kind 'mpl', expected kind: mlp | experts"),
    ("kind: mlp, width: 128", "width: 128", r"ffn has no kind, expected kind: mlp | experts"),
    ("{kind: mlp, width: 128, act: silu}\n      -", "12\n      -", r"ffn is 12, expected a map"),
    ("width: 128, act: silu", "width: wide, act: silu", r"ffn.width is 'wide', expected a whole"),
    ("act: relu2", "act: relu3", r"expert.act is 'relu3', expected silu | gelu"),
    ("rope: null, ", "", r"layers\[1\].mixer has no 'rope'; null says that there is none"),
    ("factor: 2", "factor: 0", r"layers\[1\].mixer.rope.scaling.factor is 0.0, expected a number"),
    ("kind: linear, factor: 2", "kind: long, short: [1.0], long: [1, 2], original_positions: 8",
     r"rope.scaling.short has 1 divisors, expected one for 2 pairs"),
    ("  - repeat: 2", "  - repeat: 0", r"layers\[0\].repeat is 0, expected a whole number"),
    ("  - repeat: 2", "  - repeat: 2\n    ffn: null", r"layers\[0\] has ffn beside layers"),
    ("placement: sandwich", "placement: sandwhich", r"layers\[1\].placement is 'sandwhich'"),
    ("placement: sandwich", "plaicement: pre", r"plaicement is not known; did you mean 'placemen"),
    ("kind: layer, eps: 1e-5", "kind: rms, eps: 1e-5", r"norm.bias is true, but a norm of k"),
    ("tied: true", "tied: true\nhead_bias: true", r"head_bias is true, but a tied head"),
    ("tied: true\n", "", r"my.yaml: there is no 'tied'"),
    ("width: 64", "width: 64.0", r"my.yaml: width is 64.0, expected a whole number"),
    ("vocab: 320", "vocab: 0", r"my.yaml: vocab is 0, expected at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_mistake_is_named_with_its_place(read, old, new, message):
    assert old in TEXT
    with pytest.raises(
        ConfigError, match=f"^my.yaml: .*{message}".replace("my.yaml: .*my.", "my.")
    ):
        read(TEXT.replace(old, new, 1))


@pytest.mark.parametrize("layers", ["[]", "{}", "[1]"])
def test_a_stack_is_a_list_of_layers(read, layers):
    with pytest.raises(ConfigError, match=r"layers(\[0\])? is .*, expected a (list|mapping)"):
        read(f"width: 4\nlayers: {layers}\n")


def test_a_spec_from_elsewhere_is_held_to_the_same_rules(read):
    from dataclasses import replace

    spec = read(TEXT)
    broken = replace(spec.layers[1], mixer=replace(spec.layers[1].mixer, heads=3, kv_heads=2))
    spec = replace(spec, layers=(spec.layers[0], broken))
    with pytest.raises(ConfigError, match=r"some config: layers\[1\].mixer.heads is 3, which is"):
        check(spec, "some config")


def test_differences_name_the_places(read):
    old = read(TEXT)
    assert differences(old, old) == []
    new = read(TEXT.replace("kv_heads: 2", "kv_heads: 1").replace("width: 64", "width: 32", 1))
    found = differences(old, new)
    assert "width: 64, now 32" in found
    assert "layers[0].mixer.kv_heads: 2, now 1" in found
    assert differences(old, read(TEXT.replace("repeat: 2", "repeat: 3", 1))) == [
        "layers: 7 of them, now 10"
    ]
    assert differences(old.layers[0], old.layers[1])[-1] == "ffn: Mlp, now Experts"
