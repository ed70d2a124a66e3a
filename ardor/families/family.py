"""What a family is: a translation between a checkpoint's conventions and ours, both ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ardor.arch.spec import Act, Decoder
from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig
from ardor.families.packing import read_fp8
from ardor.families.rules import DiskPart, Rules, disk_linears


@dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str
    read: Callable[[HFConfig], Decoder]
    name_tensors: Callable[[Decoder], Rules]
    models: str = ""  # published ones, for docs/FAMILIES.md
    unlike: str = ""  # in what they are not plain Llama
    # None: its models are loaded and saved with the config that came with them, not made here
    write: Callable[[Decoder], dict[str, Any]] | None = None
    # Python files in its repositories that compute the same; config.json may name them (auto_map)
    code: tuple[str, ...] = ()
    # ways of quantization in which its checkpoints may come (quant_method)
    packed: tuple[str, ...] = ()
    uneven: bool = False  # it reads per_layer_config, what transformers writes of unlike layers

    def spec(self, hf: HFConfig) -> Decoder:
        """The decoder that a config.json describes.

        Raises: ConfigError for a key that nothing reads, or a value that we cannot honour exactly.
        """
        spec = self.translate(hf)
        hf.finish(HARMLESS)
        return spec

    def computes(self, config: Mapping[str, Any]) -> bool:
        """Whether no code is needed for a config.json but ours: what it names computes the same."""
        return _files_of(config.get("auto_map") or {}) <= {*self.code}

    def translate(self, hf: HFConfig) -> Decoder:
        """`spec` without the account of keys, which stays in `hf`: for whoever reports on it.

        Raises: ConfigError for a value that we cannot honour exactly.
        """
        refuse_foreign(hf, self.code, self.packed, uneven=self.uneven)
        return self.read(hf)

    def rules(self, spec: Decoder) -> Rules:
        """Where each tensor of a decoder is in a checkpoint; `.bind` fits them to its names."""
        return self.name_tensors(spec)

    def config(
        self,
        spec: Decoder,
        *,
        dtype: str = "float32",
        bos: int | None = None,
        eos: int | list[int] | None = None,
        pad: int | None = None,
    ) -> dict[str, Any]:
        """A config.json for a decoder that did not come from one, which transformers reads.

        Raises: ConfigError if this family cannot express `spec`.
        """
        if self.write is None:
            raise ConfigError(f"the {self.model_type} family is not written from a spec yet")
        config = {
            "model_type": self.model_type,
            "dtype": dtype,
            "torch_dtype": dtype,  # the same for readers before transformers 5
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "tie_word_embeddings": spec.tied,
            "use_cache": True,
            "vocab_size": spec.vocab,
            **self.write(spec),
        }
        if self.spec(HFConfig(config, path="config.json")) != spec:
            raise ConfigError(f"the {self.model_type} family cannot express {spec}")
        return config

    def disk_linears(self, spec: Decoder) -> Mapping[str, DiskPart]:
        """Where transformers, and so PEFT, has each linear map: for names of adapters."""
        return disk_linears(self.name_tensors(spec))


ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_ACT_NAMES: dict[Act, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def act_name(act: Act, family: str) -> str:
    """What a config.json calls it.

    Raises: ConfigError if it has no name there.
    """
    if act not in _ACT_NAMES:
        raise ConfigError(f"the {family} family cannot express the activation {act}")
    return _ACT_NAMES[act]


BRIDGE = (
    "give trust_remote_code=True (--trust-remote-code) to have transformers run it, with "
    "pip install 'ardor[transformers]'"
)


# Ways of quantization that are read by the names of tensors; see ardor.quant.config.
HELD = ("bitsandbytes", "gptq", "awq", "ardor")
_LOADS = ("load_in_4bit", "load_in_8bit")  # bitsandbytes, before it said so


def refuse_foreign(
    hf: HFConfig, code: tuple[str, ...] = (), packed: tuple[str, ...] = (), *, uneven: bool = False
) -> None:
    """Refuse what is not a plain, unquantized, causal decoder, before any shape is read."""
    section = hf.section("quantization_config")
    method = None if section is None else section.take("quant_method", None)
    loads = section is not None and any(section.raw.get(key) for key in _LOADS)
    if read_fp8(hf) is not None:
        pass  # a format that every family may come in
    elif method in HELD or (method is None and loads):
        pass  # so are these, and whoever reads the tensors accounts for the keys
    elif section is not None and method in packed:
        section.take("modules_to_not_convert", None)  # the names of the tensors tell
        section.finish({})
    else:
        hf.require("quantization_config", None, "load the original weights, and quantize them here")
    if not _files_of(hf.take("auto_map", {})) <= {*code}:
        hf.require("auto_map", None, f"it names Python code, which is never run unasked; {BRIDGE}")
    hf.require("is_encoder_decoder", False, "only decoders are")
    hf.require("add_cross_attention", False, "there is no encoder to attend to")
    hf.require("pruned_heads", {}, "remove the heads from the weights instead")
    if not uneven:
        hf.require("per_layer_config", None, "layers are all alike in this family")


def _files_of(auto_map: Any) -> set[str]:
    """The Python files, without their ending, that an auto_map takes classes of models from."""
    if not isinstance(auto_map, Mapping):
        return {repr(auto_map)}
    named = {str(place) for kind, place in auto_map.items() if kind != "AutoTokenizer"}
    return {place.rpartition("--")[2].partition(".")[0] for place in named}


_NAMING = "says where the checkpoint is from, not what it computes"
_TOKENS = "read with the tokenizer, not by the decoder"
_GENERATION = "a default for generating, read from generation_config.json instead"
_TRAINING = "acts only in training, where Ardor uses none"
_INIT = "acts only on weights that are not loaded"
_OLD = "left from an older version of transformers, where it was not read for this model either"
_HEADS = "belongs to a classification head, which a causal language model lacks"
_OUTPUTS = "chooses what a Python call of transformers returns"
_SPEED = "changes speed or memory, not results"

# Keys that change no result here, by reason. A family's own are beside it.
HARMLESS: dict[str, str] = {
    key: reason
    for reason, keys in {
        _NAMING: """architectures model_type transformers_version _name_or_path name_or_path
            _commit_hash is_llama_config unsloth_version unsloth_fixed transformers.js_config
            dtype torch_dtype""",
        _TOKENS: """bos_token_id eos_token_id pad_token_id sep_token_id tokenizer_class prefix
            decoder_start_token_id unk_token_id""",
        _GENERATION: """task_specific_params max_length min_length do_sample early_stopping
            num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
            repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
            bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
            remove_invalid_values exponential_decay_length_penalty suppress_tokens
            begin_suppress_tokens encoder_repetition_penalty epsilon_cutoff eta_cutoff
            assistant_confidence_threshold assistant_lookbehind num_assistant_tokens
            num_assistant_tokens_schedule target_lookbehind""",
        _TRAINING: "attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout",
        _INIT: "initializer_range",
        _OLD: """is_decoder cross_attention_hidden_size tie_encoder_decoder output_past n_special
            predict_special_tokens max_sequence_length""",
        _HEADS: """id2label label2id num_labels _num_labels problem_type finetuning_task
            summary_type summary_use_proj summary_activation summary_proj_to_labels
            summary_first_dropout classifier_dropout""",
        _OUTPUTS: """return_dict output_hidden_states output_attentions output_scores
            return_dict_in_generate tie_last_hidden_states""",
        _SPEED: """use_cache gradient_checkpointing torchscript use_bfloat16 tf_legacy_loss
            chunk_size_feed_forward attn_implementation _attn_implementation
            _attn_implementation_autoset _flash_attn_2_enabled cache_implementation""",
    }.items()
    for key in keys.split()
}
