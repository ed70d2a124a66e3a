"""Presets have the published number of parameters, and people can see which there are."""

import re
from pathlib import Path

import pytest
import torch

from ardor.arch.decoder import Decoder
from ardor.arch.init import SCHEMES
from ardor.families import FAMILIES, family_of
from ardor.families.contradictions import check
from ardor.families.hf_config import HFConfig
from ardor.memory.shapes import count, parameters
from ardor.train.presets import INITS, PRESETS, STDS

DOC = Path(__file__).parents[2] / "docs" / "TRAINING.md"
# What the name of a preset rounds its count to, where it is not the nearest of that precision.
ROUNDED = {"llama-2-7b", "olmo-1b", "olmo-2-1b", "llama-3.2-1b", "granite-3.0-1b-a400m"}
ROUNDED |= {"gemma-2-2b", "gpt2-1.5b"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_published_number_of_parameters(name):
    preset = PRESETS[name]
    spec = family_of(preset.config).spec(HFConfig(preset.config, path=name))
    check(spec, name)
    assert count(parameters(spec)) == preset.parameters
    size = re.findall(r"([\d.]+)([mb])(?:-|$)", name)[-1]
    said = float(size[0]) * {"m": 1e6, "b": 1e9}[size[1]]
    if not name.endswith("a400m") and name != "olmoe-1b-7b":
        assert abs(preset.parameters / said - 1) < (0.5 if name in ROUNDED else 0.06)
    assert preset.source
    assert preset.init is None or preset.init in SCHEMES


def test_counting_counts_the_parameters_of_a_real_decoder():
    config = {**PRESETS["llama-15m"].config, "vocab_size": 100, "num_hidden_layers": 1}
    spec = FAMILIES["llama"].spec(HFConfig(config, path="x"))
    with torch.device("cpu"):
        decoder = Decoder(spec)
    assert count(parameters(spec)) == sum(p.numel() for p in decoder.parameters())
    assert count(parameters(spec)) != PRESETS["llama-15m"].parameters


def test_the_tables_of_inits_name_families_and_schemes_there_are():
    assert {*INITS} <= {*FAMILIES} and {*INITS.values()} <= {*SCHEMES}
    assert {*STDS} <= {*FAMILIES}


def test_help_and_the_guide_list_every_preset():
    from ardor.cli.config import field_help
    from ardor.train.config import Train

    text = field_help(Train)["model"]
    listed = re.search(r"Presets: (.*?)\. Default", text)
    assert listed is not None and listed[1].split(", ") == [*PRESETS]
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| `", DOC.read_text(), flags=re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert counts == {name: preset.parameters for name, preset in PRESETS.items()}


def test_the_readme_says_how_many_there_are():
    readme = (DOC.parent.parent / "README.md").read_text()
    assert f"{len(PRESETS)} presets" in readme


def test_the_guide_names_every_init_and_who_starts_so():
    text = DOC.read_text()
    text = text[text.index("## Initial weights") : text.index("## Presets")]
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| .* \| (.*) \|$", text, flags=re.MULTILINE))
    assert {*rows} == {*SCHEMES}
    for family, scheme in INITS.items():
        assert f"`{family}`" in rows[scheme], family
