"""A model without its weights: what can be asked, and tried, before any of them is read.

Its tokens, template and files change by the same functions as those of a model that is loaded.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.bridge.assemble import Bridged
from ardor.bridge.foreign import ForeignFacts
from ardor.families import family_of, implemented
from ardor.families.hf_config import HFConfig
from ardor.files.hub import resolve
from ardor.files.json import read_object
from ardor.form import Form, Native
from ardor.load import (
    CONFIG,
    GENERATION,
    Model,
    count_tokens,
    find_origin,
    growths_of,
    read_texts,
    stops_of,
    text_home,
)
from ardor.precision import Precision
from ardor.text.chat import ChatTemplate
from ardor.text.tokenizer import Tokenizer

PATTERNS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
PATTERNS += ("tokenizer.model", "merges.txt")
NOTHING = Precision(torch.float32, torch.float32, "nothing is computed")


class Unread(CausalLM):
    """A model that transformers runs, of which only config.json was read."""

    def __init__(self, facts: ForeignFacts):
        super().__init__()
        self._facts = facts

    @property
    def facts(self) -> ForeignFacts:
        return self._facts


def sketch(name: str | Path, revision: str | None = None) -> Model:
    """The model that `load` would give by this name, its tables on no device.

    Of a hub id the weights are not fetched.

    Raises: as `load_model` for files that are missing or damaged, and for a model that is not
    implemented here.
    """
    origin = find_origin(Path(name), str(name), None)
    found = resolve(origin.base, revision or origin.revision, patterns=PATTERNS)
    config = read_object(found.path / CONFIG)
    family_of(config, str(found.path / CONFIG))
    decoder, form = _decoder(config, str(found.path / CONFIG))
    for growth in growths_of(origin.adapter, decoder.facts.vocab, form):
        assert isinstance(form, Native)
        form, config = form.grow(decoder, config, growth)
    home = found.path if origin.adapter is None else text_home(origin.adapter, found.path)
    generation = read_object(home / GENERATION) if (home / GENERATION).exists() else {}
    texts = read_texts(home, decoder.facts.vocab)
    return _model(str(name), (decoder, form), config, generation, *texts)


def sketch_of(
    directory: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> Model:
    """The same of files that are read already, which it does not change.

    Raises: ConfigError for a config.json that describes no model.
    """
    parts = _decoder(config, str(directory / CONFIG))
    config, generation = deepcopy(dict(config)), dict(generation)
    return _model(str(directory), parts, config, generation, tokenizer, template)


def _decoder(config: Mapping[str, Any], where: str) -> tuple[CausalLM, Form]:
    if not implemented(config):
        sizes = (config.get("vocab_size"), config.get("max_position_embeddings"))
        vocab, positions = (size if isinstance(size, int) else 1 << 40 for size in sizes)
        return Unread(ForeignFacts(vocab, positions)), Bridged({}, {})
    family = family_of(config, where)
    spec = family.spec(HFConfig(dict(config), path=where))
    with torch.device("meta"):
        decoder = Decoder(spec)
    return decoder, Native(family, spec, family.rules(spec))


def _model(
    name: str,
    parts: tuple[CausalLM, Form],
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
) -> Model:
    decoder, form = parts
    count_tokens(decoder, tokenizer)
    return Model(
        decoder=decoder,
        form=form,
        config=config,
        generation_config=generation,
        tokenizer=tokenizer,
        template=template,
        stops=stops_of(tokenizer, template, generation, config),
        precision=NOTHING,
        source=name,
        revision=None,
    )
