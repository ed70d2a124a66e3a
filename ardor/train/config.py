"""The settings of `ardor train` and `ardor finetune`: defaults, flags, help and run file in one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

from ardor.data.choices import Datasets, OverLength, Part, Preferences
from ardor.errors import ConfigError
from ardor.train.schedule import Schedule

Optim = Literal[
    "adamw",
    "adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
    "muon",
    "sgd",
    "schedule_free_adamw",
]
Recompute = Literal["none", "selective", "layers"]
Order = Literal["random", "sequential", "group_by_length", "shortest_first"]
MasterDtype = Literal["float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Init = Literal["megatron", "gpt2", "normal", "truncated", "small", "mitchell"]

_Range = tuple[Callable[[Any], bool], str]  # what a number must be, also in words
_COUNT: _Range = (lambda n: n >= 1, "at least 1")
_POSITIVE: _Range = (lambda x: 0 < x < math.inf, "above 0 and finite")
_NOT_NEGATIVE: _Range = (lambda x: 0 <= x < math.inf, "at least 0 and finite")
_SHARE: _Range = (lambda x: 0 <= x <= 1, "from 0 to 1")
_BELOW_1: _Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")
# By field; None is always allowed, as it means a default.
_RANGES: dict[str, _Range] = {
    "max_steps": _COUNT,
    "tokens_per_batch": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_steps": _COUNT,
    "save_steps": _COUNT,
    "save_total_limit": _COUNT,
    "logging_steps": _COUNT,
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "lora_r": _COUNT,
    "eva_batches": _COUNT,
    "early_stopping_patience": _COUNT,
    "sample_tokens": _COUNT,
    "peak_tflops": _POSITIVE,
    "lr_power": _POSITIVE,
    "loraplus_lr_ratio": _POSITIVE,
    "learning_rate": _POSITIVE,
    "initializer_range": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "adam_epsilon": _POSITIVE,
    "lora_alpha": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "stop_rate_samples": _NOT_NEGATIVE,
    "early_stopping_threshold": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "max_loss_zscore": _NOT_NEGATIVE,
    "beta": _POSITIVE,
    "simpo_gamma": _NOT_NEGATIVE,
    "desirable_weight": _POSITIVE,
    "undesirable_weight": _POSITIVE,
    "label_smoothing": (lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
    "warmup_ratio": _SHARE,
    "lr_decay_ratio": _SHARE,
    "sgd_momentum": _BELOW_1,
    "min_lr_ratio": _SHARE,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "eval_fraction": _BELOW_1,
    "lora_dropout": _BELOW_1,
}


def _datasets(value: Any) -> tuple[str, ...]:
    """Datasets as they would be typed; one alone, and mappings from YAML, are taken too."""
    values = [value] if isinstance(value, str | Path | Mapping) else list(value or ())
    return tuple(str(Part.of(one)) for one in values)


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a run walks: shared by every kind of training.

    Raises: ConfigError for a number outside its range.
    """

    output: Path | None = None
    """Folder of the run: config.yaml, metrics.jsonl, checkpoint-N/, report.html. Default: the next
    free runs/VERB-N."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 2e-3 from scratch, 2e-4 for adapters, 2e-5 for all weights; of
    preference tuning 1e-5 for adapters and 1e-6 for all weights."""
    num_train_epochs: float = 1.0
    """Passes over the data; a fraction ends within one."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    tokens_per_batch: int | None = None
    """Fill micro-batches with whole documents up to this many tokens."""
    per_device_train_batch_size: int = 8
    """Examples per micro-batch, where tokens_per_batch is not given."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step; their losses are divided once, by all their targets."""
    max_length: int = 1024
    """Longest example in tokens."""
    over_length: OverLength = "truncate_left"
    """What happens to longer ones: truncate_left takes first turns and the start of prompts,
    truncate_right the end with its stop token; or drop, or error. All are counted. Text is cut into
    pieces, but for error. truncate: the older name of truncate_left."""
    streaming: bool = False
    """Read hub datasets as they are fetched, without keeping them."""
    cache: bool = True
    """Keep encoded data in files for the next run (docs/DATA.md); --no-cache: in memory."""
    warmup_steps: int | None = None
    """Steps of linear rise; overrides warmup_ratio."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the rate rises."""
    lr_scheduler_type: Schedule = "cosine"
    """How the rate falls after the rise: cosine, linear, constant, wsd (constant, then a fall in
    the last lr_decay_ratio of the steps), inverse_sqrt, or polynomial (of lr_power)."""
    min_lr_ratio: float = 0.0
    """Where the decay ends, as a share of the peak."""
    lr_decay_ratio: float = 0.2
    """Share of all steps in which wsd's rate falls."""
    lr_power: float = 2.0
    """Exponent of polynomial decay."""
    learning_rates: tuple[str, ...] = ()
    """Other rates for parameters by name: PATTERN=RATE, or PATTERN=xFACTOR of the learning rate;
    patterns are regular expressions, and the first that matches counts."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: the rate of the adapters' B as a multiple of A's."""
    freeze: tuple[str, ...] = ()
    """Regular expressions: parameters of these names are not trained."""
    train_only: tuple[str, ...] = ()
    """Regular expressions: only parameters of these names are trained."""
    optim: Optim = "adamw"
    """adamw (fused), adamw_8bit and lion_8bit (bitsandbytes), lion, adafactor, muon (AdamW for
    tables and vectors), sgd, or schedule_free_adamw (schedulefree); see docs/TRAINING.md."""
    sgd_momentum: float = 0.0
    """Momentum of sgd."""
    master_dtype: MasterDtype = "float32"
    """Dtype of weights that are trained in full, their gradients and moments. bfloat16 is rounded
    stochastically, so that small updates are not lost."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is there, and forget the gradient. Needs
    gradient_accumulation_steps 1 and max_grad_norm 0."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the CPU; it visits the GPU one weight at a
    time."""
    gradient_checkpointing: Recompute = "none"
    """Activations computed again in the backward pass instead of kept: none, selective (the
    feed-forwards'), or layers (all but each layer's input)."""
    torch_compile: bool = False
    """Compile norms and dense feed-forwards with torch.compile, which takes some seconds at first;
    on a CPU it gains little over our own kernels (docs/BENCHMARKS.md)."""
    neftune_noise_alpha: float = 0.0
    """NEFTune: noise on embeddings, uniform within this over the root of (length x width)."""
    train_sampling_strategy: Order = "random"
    """Order of examples: random, sequential, group_by_length (similar lengths together, groups in
    random order), or shortest_first (a curriculum)."""
    weight_decay: float = 0.0
    """Decay of matrices; vectors do not decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's floor under the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0: not clipped."""
    dtype: str = "auto"
    """Compute dtype: auto (bfloat16 where it is fast), bfloat16 or float32. Masters are float32."""
    attn_implementation: str | None = None
    """sdpa, eager (the reference), or on a GPU flex or flash_attention_2. Default: the
    best there is."""
    seed: int = 0
    """Of initial weights, order, dropout and samples."""
    eval_data: Datasets = ()
    """Held-out data, one dataset or several; without it eval_fraction of the data is held out."""
    eval_fraction: float = 0.02
    """Share of the examples held out where eval_data is not given; 0: none."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""
    eval_steps: int | None = None
    """Evaluate every so many steps; always at the end. Default: ten times a run."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps; always at the end. Default: with evaluations."""
    save_total_limit: int = 2
    """Newest checkpoints kept."""
    logging_steps: int = 1
    """A line in metrics.jsonl every so many steps."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint with the lowest held-out loss, and let the run's folder stand for it."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row that were not better than the best."""
    early_stopping_threshold: float = 0.0
    """By how many nats an evaluation must be better to count as better."""
    max_loss_zscore: float = 20.0
    """Stop before a step whose loss is so many robust standard deviations above the last ones,
    and save its batch; 0: never. A loss that is not finite always stops."""
    sample_prompts: tuple[str, ...] = ()
    """Answer (or continue) these at every evaluation, to see the model learn."""
    sample_tokens: int = 40
    """Longest sample, in tokens."""
    report_to: tuple[Tracker, ...] = ()
    """Send metrics to tensorboard, wandb or trackio too."""
    peak_tflops: float | None = None
    """What the device can do in the compute dtype, for MFU. Default: as listed, or measured in
    runs that are long enough."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            object.__setattr__(self, name, _datasets(getattr(self, name, ())))
        for name, (fits, words) in _RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not fits(value):
                raise ConfigError(f"{name}={value} must be {words}")
        if not all(prompt.strip() for prompt in self.sample_prompts):
            raise ConfigError("sample_prompts holds a blank prompt; give it words, or leave it out")
        _check_updates(self)


@dataclass(frozen=True, kw_only=True)
class Train(Optimisation):
    """Train a language model from scratch on text."""

    data: Datasets
    """Text to learn: jsonl with a text column, plain text files, a folder, or a hub dataset.
    Several are read one after the other, or mixed: a.jsonl,weight=3 b,split=train,weight=1"""
    tokenizer: str | None = None
    """Take the tokenizer of this model instead of training one on the data."""
    model: str | None = None
    """What to train: a preset, or a file: YAML or JSON with a model_type and its config.json's
    keys, or YAML with the fields of Ardor's own spec (docs/TRAINING.md). Presets: gpt2-124m,
    gpt2-350m, gpt2-774m, gpt2-1.5b, llama-15m, llama-42m, llama-110m, mixtral-43m, pythia-70m,
    pythia-160m, pythia-410m, opt-125m, bloom-560m, smollm2-135m, smollm2-360m, qwen2.5-0.5b,
    qwen3-0.6b, tinyllama-1.1b, olmo-1b, olmo-2-1b, llama-3.2-1b, granite-3.0-1b-a400m, gemma-2-2b,
    llama-2-7b, olmoe-1b-7b, mistral-7b, llama-3.1-8b. Default: a small model of --family, as the
    sizes below say."""
    family: Literal["llama", "gpt2"] | None = None
    """Architecture of the small model where no --model is given. Default: llama."""
    vocab_size: int | None = None
    """Embedding rows, and entries of the tokenizer that is trained on the data. Default: the
    model's, else 4096 or as the tokenizer needs; the latter is rounded up to a multiple of 64."""
    hidden_size: int | None = None
    """Width of the residual stream, in place of the model's. This and the next four sizes are
    refused for a file with Ardor's own spec. Default: 256."""
    intermediate_size: int | None = None
    """Width inside the feed-forward, in place of the model's. Default: 704."""
    num_hidden_layers: int | None = None
    """Layers, in place of the model's. Default: 6."""
    num_attention_heads: int | None = None
    """Query heads, in place of the model's. Default: 8."""
    num_key_value_heads: int | None = None
    """Heads of keys and values, in place of the model's; fewer than query heads: grouped attention.
    Default: as many."""
    tie_word_embeddings: bool | None = None
    """Use the embedding as the output head, or not, in place of the model's. Default: use it."""
    init: Init | None = None
    """How the weights start: megatron, gpt2, normal, truncated, small or mitchell
    (docs/TRAINING.md). Default: as the preset's or the family's authors did."""
    initializer_range: float | None = None
    """Standard deviation of initial weights, where the init has one. Default: the model's, else
    0.02."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; vectors do not decay."""
    tokens_per_batch: int | None = 8192
    """Fill micro-batches with whole documents up to this many tokens."""
    eval_fraction: float = 0.01
    """Share of the examples held out where eval_data is not given; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.family is not None:
            raise ConfigError(
                f"family={self.family} is of the model that is trained where none is given, but "
                f"model={self.model} is; leave one of them out"
            )


def _check_updates(config: Optimisation) -> None:
    """Raises: ConfigError for settings of updates that exclude each other."""
    if config.optimizer_in_backward:
        if config.gradient_accumulation_steps > 1:
            raise ConfigError(
                f"optimizer_in_backward with gradient_accumulation_steps="
                f"{config.gradient_accumulation_steps} would update after every micro-batch; use "
                "a larger micro-batch, or leave one of them out"
            )
        if config.max_grad_norm > 0:
            raise ConfigError(
                f"optimizer_in_backward with max_grad_norm={config.max_grad_norm:g}: the norm of "
                "all gradients is not known before the first is used; give --max-grad-norm 0"
            )
    if config.optim == "schedule_free_adamw" and config.lr_scheduler_type != "constant":
        raise ConfigError(
            f"optim=schedule_free_adamw averages instead of lowering the rate, but "
            f"lr_scheduler_type={config.lr_scheduler_type}; give --lr-scheduler-type constant"
        )


Objective = Literal["sft", "dpo", "cdpo", "ipo", "hinge", "simpo", "orpo", "kto"]
# Setting of preference tuning -> the objectives that it is for.
_OF_OBJECTIVES = {
    "beta": ("dpo", "cdpo", "ipo", "hinge", "simpo", "orpo", "kto"),
    "label_smoothing": ("dpo", "cdpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "precompute_ref_log_probs": ("dpo", "cdpo", "ipo", "hinge", "kto"),
}


def _check_objective(config: "Finetune") -> None:
    """Raises: ConfigError for settings that the objective does not have."""
    for name, objectives in _OF_OBJECTIVES.items():
        if getattr(config, name) is not None and config.objective not in objectives:
            raise ConfigError(
                f"{name}={getattr(config, name)} is for objective {', '.join(objectives)}, and "
                f"objective is {config.objective}; leave it out, or choose one of those"
            )
    if config.objective != "sft" and config.preferences != "refuse":
        raise ConfigError(
            f"preferences={config.preferences} trains on the chosen answers alone, and objective "
            f"{config.objective} compares both; leave one of them out"
        )
    if config.objective == "kto" and config.neftune_noise_alpha > 0:
        raise ConfigError(
            f"neftune_noise_alpha={config.neftune_noise_alpha:g} has no place in objective kto; "
            "leave it out"
        )
    if config.method == "full" and config.precompute_ref_log_probs is False:
        raise ConfigError(
            "precompute_ref_log_probs=False: method full changes the weights that are the "
            "reference; leave it out, or choose lora"
        )


ADAPTER_FIELDS = (
    *("lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"),
    *("lora_bias", "init_lora_weights", "eva_batches", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("kbit_upcast",),
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become tokens: the same for a run and for its preview.

    Raises: ConfigError for two settings that both choose the chat template.
    """

    preferences: Preferences = "refuse"
    """What becomes of rows with chosen and rejected answers: refuse, or train on the chosen one."""
    chat_template: str | None = None
    """A template's name (chatml, llama3, qwen3, ...: docs/CHAT.md lists them) or a jinja file.
    Default: the model's own; for a model without one, ChatML where the tokenizer has its control
    tokens, else plain headings."""
    template_date: str | None = None
    """The day, as 2026-11-30, that a chat template writes which writes one. Default: that on which
    the run begins, also where it is resumed."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation are trained on. A message's own "train": true or false (or
    OpenAI's "weight": 1 or 0) goes before."""
    setup_chat_format: bool = False
    """Give a base model without a chat template ChatML, with its two tokens; their rows are
    trained."""
    clone_chat_template: str | None = None
    """Give it the chat template of this model instead, with the tokens that it writes."""
    add_tokens: tuple[str, ...] = ()
    """New tokens: words, or tags such as <tool>. Their rows start at the mean of the others and are
    trained, by adapters too."""
    pad_strategy: Literal["auto", "unk", "eos", "new"] = "auto"
    """The padding token in the files, for other tools; here padding is a length. auto: the model's
    own, else one in reserve, else EOS; unk: where no text becomes it; new: with a row of its
    own."""

    @property
    def answer_read(self) -> Preferences:
        """What of two answers says which kind of data a run has: text, or conversations."""
        return self.preferences

    def __post_init__(self) -> None:
        formats = {
            "chat_template": self.chat_template,
            "setup_chat_format": self.setup_chat_format or None,
            "clone_chat_template": self.clone_chat_template,
        }
        given = [name for name, value in formats.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both choose the chat template; give one")
        try:
            date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError as error:
            raise ConfigError(
                f"template_date={self.template_date} is no day; give one as 2026-11-30"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Finetune(Reading, Optimisation):
    """Fine-tune a model on your data: full, LoRA or QLoRA."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    data: Datasets
    """jsonl, json, csv, parquet, text files, a folder, or a hub dataset id; format recognised.
    Several are read one after the other, or mixed: a.jsonl,weight=3 b,split=train,weight=1"""
    objective: Objective = "sft"
    """What is learnt: sft (to give the answers of the data); which of two answers is better, from
    rows with chosen and rejected: dpo, cdpo, ipo, hinge, simpo or orpo; or which answers are good,
    from rows with prompt, completion and label: kto (docs/PREFERENCES.md)."""
    beta: float | None = None
    """How closely preference tuning stays at the model it began with; of orpo the weight of the
    odds ratio. Default: 0.1, for simpo 2."""
    label_smoothing: float | None = None
    """Share of pairs expected to be the wrong way round; dpo with it is cdpo. Default: 0, for cdpo
    0.1."""
    simpo_gamma: float | None = None
    """By how much simpo wants the chosen answer's reward to be higher. Default: 1."""
    desirable_weight: float | None = None
    """Weight of kto's good answers. Default: 1."""
    undesirable_weight: float | None = None
    """Weight of kto's bad answers. Default: 1."""
    precompute_ref_log_probs: bool | None = None
    """Ask the model about all answers before the first step, and keep what it says; or, with an
    adapter, ask the base under it in every step. Default: the former for method full."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """Train adapters on 16-bit weights, adapters on 4-bit weights, or every weight."""
    quantization: str = "nf4"
    """Format of qlora's frozen weights: nf4, nf4-dq (block scales in 8 bits too), fp4, int8
    (LLM.int8), int8-g128 or int4-g128."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """The adapters' product is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs dropped in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which maps are adapted: names as in PEFT, one regular expression for whole names, or
    all-linear: all of the layers, experts too, without the head. docs/ADAPTERS.md."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(lora_r) instead."""
    use_dora: bool = False
    """Train a magnitude of each output beside the adapters (DoRA)."""
    lora_bias: bool = False
    """Train a bias of each output in the adapters, which merges only into maps that have one."""
    init_lora_weights: str = "default"
    """Where adapters begin: default (Kaiming and zero), gaussian, orthogonal, pissa, pissa_niter_N,
    olora, eva (from the data), or with qlora loftq. docs/ADAPTERS.md says which to use when."""
    eva_batches: int = 8
    """Micro-batches that eva looks at before the first step."""
    exclude_modules: tuple[str, ...] = ()
    """Maps that are left out of target_modules, named in the same ways."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained in full beside the adapters, such as embed_tokens or lm_head."""
    layers_to_transform: tuple[int, ...] = ()
    """Only these layers, counted from 0, of a list of target_modules. Default: all."""
    layers_pattern: tuple[str, ...] = ()
    """What stands before a layer's number in names, where layers_to_transform cannot tell."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks by ends of names: q_proj=8 mlp.down_proj=32; the first that matches counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other lora_alpha in the same way."""
    kbit_upcast: Literal["norms", "peft", "none"] = "norms"
    """What of qlora's frozen 16-bit weights is made float32: norms, everything that is not packed
    (as PEFT's prepare_model_for_kbit_training does), or nothing. A census is printed."""
    train_control_tokens: Literal["auto", "yes", "no"] = "auto"
    """Train the embedding rows of the chat's control tokens; auto: where they never were."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Let transformers run a model that Ardor does not know, and code from its repository if it
    names some. What will run is said first. Not remembered by the run."""
    use_safetensors: bool = True
    """Weights from safetensors; --no-use-safetensors: from pickles (.bin), tensors alone."""
    eval_on_start: bool = True
    """Evaluate before the first step too."""
    allow: tuple[str, ...] = ()
    """Rules of `ardor doctor` whose errors do not stop this run (docs/DOCTOR.md). Recorded."""
    stop_rate_samples: int = 0
    """Held-out prompts answered at every evaluation to measure how many answers end."""

    @property
    def answer_read(self) -> Preferences:
        return self.preferences if self.objective == "sft" else "chosen"

    def __post_init__(self) -> None:
        Optimisation.__post_init__(self)
        Reading.__post_init__(self)
        _check_objective(self)
        if not self.target_modules and not self.modules_to_save:
            raise ConfigError("target_modules is empty; name at least one linear, or all-linear")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern_of(name, getattr(self, name))
        if self.quantization != "nf4" and self.method != "qlora":
            raise ConfigError(
                f"quantization={self.quantization} is for method qlora, and method {self.method} "
                "trains on whole weights; leave it out, or choose qlora"
            )
        set_for_adapters = [
            f"{field.name}={value}"
            for field in fields(Finetune)
            if field.name in ADAPTER_FIELDS
            and (value := getattr(self, field.name)) != field.default
        ]
        if self.method == "full" and set_for_adapters:
            raise ConfigError(
                f"{', '.join(set_for_adapters)}: method full trains every weight and has no "
                "adapters; leave it out, or choose lora"
            )


def pattern_of(name: str, given: tuple[str, ...]) -> dict[str, float]:
    """{"q_proj": 8} of ("q_proj=8",).

    Raises: ConfigError for an entry of another form, and for a rank that is no whole number.
    """
    found: dict[str, float] = {}
    for entry in given:
        key, _, value = entry.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        whole = name != "rank_pattern" or number.is_integer()
        if not key or not 0 < number < math.inf or not whole:
            raise ConfigError(f"{name}: {entry!r} is not of the form NAME=NUMBER, as in q_proj=8")
        found[key] = int(number) if number.is_integer() else number
    return found
