"""The surface: a loaded model with everything one does with it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ardor import chat_format
from ardor.adapters.combine import Combination
from ardor.adapters.merge import Merged
from ardor.adapters.registry import Adapters
from ardor.arch.causal import Facts
from ardor.errors import ConfigError, ShapeError
from ardor.files.runs import chosen_checkpoint
from ardor.files.weights import MAX_SHARD_BYTES
from ardor.generate.text import Generation, Piece, Settings, chat_prompt, generate, stream
from ardor.load import Model, load_model, stops_of, tokenizer_of
from ardor.packing import settings
from ardor.place import requested
from ardor.precision import dtype_of
from ardor.quant.config import asked
from ardor.save import save_model
from ardor.score import Score, score_text
from ardor.text.templates import template_named
from ardor.text.tokenizer import Tokenizer
from ardor.vocabulary import PadStrategy, add_tokens, set_pad
from ardor.voice import Voice, speaking, voice_of


class LM:
    """A language model: logits, text, chat and scores. `model` holds the parts."""

    def __init__(self, model: Model):
        self.model = model

    @property
    def spec(self) -> Facts:
        """What is known of the model: the whole specs.Decoder for one that we implement."""
        return self.model.decoder.facts

    @property
    def device_map(self) -> dict[str, int | str]:
        """Module -> device, in transformers' names; "" is the whole model."""
        placement = self.model.placement
        return {"": str(self.model.decoder.device)} if placement is None else placement.map

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.model)

    def logits(self, tokens: Tensor | Sequence[Sequence[int]]) -> Float[Tensor, "B T V"]:
        """Float32 logits of the token after each position; rows of ids, each one document.

        Raises: ShapeError unless the rows are equally long and hold ids below V.
        """
        decoder = self.model.decoder
        ids = _rows(tokens, decoder.facts.vocab).to(decoder.device)
        with torch.set_grad_enabled(any(p.requires_grad for p in decoder.parameters())):
            return decoder.logits(decoder.hidden(ids))

    @cached_property
    def adapters(self) -> Adapters:
        """The model's adapters by name; the one that it was loaded with is "default".

        Raises: ConfigError for a model that is spread over devices, whose parts cannot change.
        """
        model = self.model
        if model.placement is not None:
            raise ConfigError(
                "adapters cannot be changed on a model that is spread over devices; load it on one "
                "(device_map='cpu' or 'cuda'), or with the adapter that it shall have"
            )
        return Adapters(model.decoder, model.form.disk_linears(), model.adapter)

    @cached_property
    def _voices(self) -> dict[str | None, Voice]:
        """The model's own under None; an adapter without one speaks with that."""
        return {None: Voice.of(self.model)}

    def load_adapter(self, directory: str | Path, name: str) -> None:
        """Read another adapter of this base from a PEFT directory or run, without using it yet.

        Where its folder has a tokenizer's files, its chat template and its ends are used with it.

        Raises: ConfigError if the name is taken, or if it has tokens that the model lacks; what is
        said of a damaged adapter, or one of another base.
        """
        home = chosen_checkpoint(Path(directory)) or Path(directory)
        voice, voices = voice_of(home, self.model), self._voices
        self.adapters.load(home, name)
        if voice is not None:
            voices[name] = voice

    def name_adapter(self, name: str, to: str) -> None:
        """Call an adapter by another name."""
        voices = self._voices
        self.adapters.rename(name, to)
        if name in voices:
            voices[to] = voices.pop(name)

    def use_adapter(self, name: str | None) -> None:
        """Have the adapter of that name do its work from now on; None: the base as it is."""
        voices = self._voices
        self.adapters.use(name)
        self.model.adapter = None if name is None else self.adapters[name]
        voices.get(name, voices[None]).give(self.model)

    def combine_adapters(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        how: str = "cat",
        rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Make an adapter from a weighted sum of others; see `Adapters.combine`, `Combination`.

        Its template and ends are those of the first.

        Raises: as they do: ConfigError, for settings that do not go with `how`, too.
        """
        voices = self._voices
        how_to = Combination(how, rank, density, majority_sign_method, seed)
        self.adapters.combine(name, weights, how_to)
        if (voice := voices.get(next(iter(weights)))) is not None:
            voices[name] = voice

    def merge(self) -> Merged:
        """Fold the adapter in use into the weights, in 16 bits where they were; what it cost."""
        return self.adapters.merge()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.adapters.unmerge()

    @contextmanager
    def _adapter_of(self, settings: dict[str, Any], *, hold: bool = False) -> Iterator[None]:
        """For one request, the adapter that its settings name ("adapter"; None: the base)."""
        if "adapter" not in settings:
            yield
            return
        name, voices = settings.pop("adapter"), self._voices
        voice = voices.get(name, voices[None])
        with self.adapters.using(name, hold=hold), speaking(self.model, voice):
            yield

    def generate(self, prompt: str | Sequence[str], **settings: Any) -> Any:
        """Continue a prompt, or each of several; a Generation, or a list of them.

        Settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed;
        adapter: the name of one for this request (None: the base), or a list of one for each
        prompt, of which those with the same are generated together.
        """
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        if isinstance(adapters := settings.get("adapter"), list | tuple):
            return self._generate_mixed(prompts, adapters, settings)
        with self._adapter_of(settings):
            ids = [self.tokenizer.encode(p) for p in prompts]
            found = generate(self.model, ids, _settings(settings), continues=True)
        return found[0] if isinstance(prompt, str) else found

    def _generate_mixed(
        self, prompts: list[str], adapters: Sequence[str | None], settings: dict[str, Any]
    ) -> list[Generation]:
        if len(adapters) != len(prompts):
            raise ConfigError(
                f"found {len(adapters)} adapters for {len(prompts)} prompts; give one for each"
            )
        found: dict[int, Generation] = {}
        for name in dict.fromkeys(adapters):
            places = [i for i, own in enumerate(adapters) if own == name]
            made = self.generate([prompts[i] for i in places], **settings | {"adapter": name})
            found |= dict(zip(places, made, strict=True))
        return [found[i] for i in range(len(prompts))]

    def stream(self, prompt: str, **settings: Any) -> Iterator[Piece]:
        """Continue a prompt piece by piece; the last piece has the Generation in `.done`."""
        return self._held_stream(
            settings,
            lambda: self.tokenizer.encode(prompt),
            lambda ids, s: stream(self.model, ids, _settings(s), continues=True),
        )

    def _held_stream(
        self,
        settings: dict[str, Any],
        encode: Callable[[], list[int]],
        begin: Callable[[list[int], dict[str, Any]], Iterator[Piece]],
    ) -> Iterator[Piece]:
        """A stream that has its adapter until it has been read to the end."""
        if "adapter" not in settings:
            return begin(encode(), settings)

        def pieces() -> Iterator[Piece]:
            with self._adapter_of(settings, hold=True):
                yield from begin(encode(), settings)

        return pieces()

    def chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Generation:
        """Answer a conversation of {"role": ..., "content": ...} messages.

        `tools` are JSON schemas or Python functions with a docstring, `documents` objects as the
        template reads them. With `continue_final_message` the last message is gone on with.
        `chat_template_kwargs` are further variables of the template ({"enable_thinking": False}).
        """
        variables = _variables(tools, documents, continue_final_message, chat_template_kwargs)
        with self._adapter_of(settings):
            prompt = chat_prompt(self.model, messages, **variables)
            return generate(self.model, [prompt], _settings(settings))[0]

    def stream_chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Iterator[Piece]:
        """`chat`, piece by piece."""
        variables = _variables(tools, documents, continue_final_message, chat_template_kwargs)
        return self._held_stream(
            settings,
            lambda: chat_prompt(self.model, messages, **variables),
            lambda ids, s: stream(self.model, ids, _settings(s)),
        )

    def score(self, text: str, *, adapter: str | None = ...) -> Score:  # type: ignore[assignment]
        """The log-probability of each token of `text`, and what follows from it.

        `adapter` is the name of one for this request (None: the base); else the one in use.
        """
        with self._adapter_of({} if adapter is ... else {"adapter": adapter}):
            return score_text(self.model, text)

    def add_tokens(
        self, tokens: Sequence[str], *, special: bool = False, seed: int = 0
    ) -> dict[str, int]:
        """Give each of `tokens` an id and, around the mean of the others, a row; the ids.

        Tables never shrink. Until the rows are trained they mean nothing. See `ardor.vocabulary`.
        """
        return add_tokens(self.model, tokens, special=special, seed=seed)

    def set_pad(self, strategy: PadStrategy = "auto") -> str:
        """Choose the padding token: "auto", "unk", "eos" or "new"; a sentence about the choice.

        It matters to other tools only, which read it from the saved files.
        """
        return set_pad(self.model, strategy)

    def save(self, directory: str | Path, *, max_shard_size: int | str = MAX_SHARD_BYTES) -> None:
        """Write the model (or its adapter) as transformers (or PEFT) reads it.

        Weights above `max_shard_size` (bytes, or "5GB") are spread over several files.
        """
        save_model(self.model, directory, max_shard_size)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    attn_implementation: str | None = None,
    quantization: Any = None,
    quantization_config: Any = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    low_cpu_mem_usage: bool = True,
    use_cache: bool = True,
    use_safetensors: bool = True,
    chat_template: str | Path | None = None,
) -> LM:
    """Load a hub id, a local directory, an adapter, or the newest checkpoint of a run.

    `torch_dtype` is `dtype` under its older name. `device_map` is one device ("cpu", "cuda:0", 0),
    a strategy ("auto", "balanced", "balanced_low_0", "sequential") within `max_memory`
    ({0: "10GiB", "cpu": "30GiB"}; None: what is free), "kbit" (each process its own device), or a
    device for each module ({"model.layers.0": 0, "": "disk"}). What lies on "cpu" beside an
    accelerator, or on "disk", is fetched for its turn: from the checkpoint's own files where it is
    in them as in memory, else from `offload_folder`, where it is written once.
    `quantization` is a format's name ("nf4", "nf4-dq", "fp4", "int8" for LLM.int8, "int8-g128",
    "int4-g128"), a dict or object shaped like BitsAndBytesConfig, or a YAML file of its settings;
    `quantization_config` is the same, `load_in_4bit` is "nf4" and `load_in_8bit` "int8". Memory use
    is always low and decoding always cached: `low_cpu_mem_usage` and `use_cache` are accepted. A
    model that we do not implement is run by transformers, with `trust_remote_code` only, as is code
    in its repository if it names some; a line on stderr says what runs, of which revision, before
    it does. use_safetensors=False reads the weights from pickles (.bin), which are refused
    otherwise, with torch's restricted reader. `chat_template` is the name of a template or a jinja
    file, in place of the model's own. What was chosen, and why, is one line on stderr.

    Raises: CheckpointError, ConfigError or TextError, naming the file or argument; ConfigError for
    what other loaders have and this version has not.
    """
    model = load_model(
        name,
        dtype=_dtype(dtype, torch_dtype),
        device=requested(device_map, max_memory, offload_folder),
        attn_implementation=attn_implementation,
        quantization=_quantization(
            quantization, quantization_config, four=load_in_4bit, eight=load_in_8bit
        ),
        adapter=adapter,
        revision=revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=use_safetensors,
    )
    if chat_template is not None:
        _take_template(model, chat_template)
    print(f"{name}{_held(model)}", file=sys.stderr)
    return LM(model)


def _take_template(model: Model, chat_template: str | Path) -> None:
    """Another template than the model's own, which says where an answer ends."""
    model.template = template_named(chat_template, tokenizer_of(model))
    files = model.generation_config, model.config
    model.stops = stops_of(model.tokenizer, model.template, *files)


def _held(model: Model) -> str:
    at = "" if model.revision is None else f" at {model.revision[:12]}"
    form = "" if model.quantization is None else f"linears in {model.quantization}, other "
    text = f"{at}: {form}{model.precision}, on {model.decoder.device}"
    if model.placement is not None:
        text = f"{text}; {model.placement.summary()}"
    return text if model.adapter is None else f"{text}, adapter on {model.source}"


def save(lm: LM, directory: str | Path, *, max_shard_size: int | str = MAX_SHARD_BYTES) -> None:
    """`lm.save`, for those who look for it beside `load`."""
    lm.save(directory, max_shard_size=max_shard_size)


def setup_chat_format(lm: LM, *, replace: bool = False, seed: int = 0) -> tuple[int, ...]:
    """Give a base model ChatML with tokens of its own; the ids whose rows are to be trained.

    Raises: ConfigError if it has a chat template already, unless `replace`.
    """
    return chat_format.setup_chat_format(lm.model, replace=replace, seed=seed)


def clone_chat_template(
    lm: LM, source: str | Path, *, replace: bool = False, seed: int = 0
) -> tuple[int, ...]:
    """Give a model the chat template of `source` and the tokens it writes; the ids to be trained.

    Raises: ConfigError if it has a chat template already, unless `replace`, or `source` has none.
    """
    return chat_format.clone_chat_template(lm.model, source, replace=replace, seed=seed)


FOUR_BIT = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def _quantization(quantization: Any, config: Any, *, four: bool, eight: bool) -> Any:
    """The one thing that several arguments ask for."""
    if quantization is not None and config is not None:
        raise ConfigError("quantization and quantization_config are the same; give one of them")
    if four and eight:
        raise ConfigError("load_in_4bit and load_in_8bit are both set; give one of them")
    found = quantization if config is None else config
    if not four and not eight:
        return found
    short = "nf4" if four else "llm-int8"
    key = f"load_in_{4 if four else 8}bit"
    if found is None:
        return short
    format = None if (wish := asked(settings(found))) is None else wish.format
    fits = format in FOUR_BIT if four else format == short
    if not fits:
        raise ConfigError(f"{key} and quantization={found!r} differ; give one")
    return found


def _rows(tokens: Tensor | Sequence[Sequence[int]], vocab: int) -> Int[Tensor, "B T"]:
    expected = "expected rows of token ids, as in [[5, 3], [8, 1]], all equally long"
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{error}; {expected}") from None
    if ids.ndim != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"found a tensor {list(ids.shape)} of {ids.dtype}; {expected}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ShapeError(
            f"token id {wrong} is not one of the model's {vocab} ids, 0 to {vocab - 1}"
        )
    return ids


def _dtype(dtype: str | torch.dtype | None, older: str | torch.dtype | None) -> str | torch.dtype:
    """The one of the two names that was given, "auto" for neither."""
    both = [value for value in (dtype, older) if value is not None]
    given = {value if value == "auto" else dtype_of(value) for value in both}
    if len(given) > 1:
        raise ConfigError(f"dtype={dtype} and torch_dtype={older} differ; give one")
    return next(iter(given), "auto")


def _variables(
    tools: Sequence[Any] | None,
    documents: Sequence[Any] | None,
    continue_final_message: bool,
    others: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a chat template is given besides messages."""
    made = {"tools": tools, "documents": documents, **(others or {})}
    return made | {"continue_final_message": continue_final_message}


def _settings(given: dict[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{name}={given[name]!r} is no setting of generation; {hint}")
    stop = given.get("stop") or ()
    # A lone string is a sequence too: of its letters.
    return Settings(**given | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)})
