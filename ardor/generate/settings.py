"""How text is continued: defaults, flags and help in one. Imports no torch."""

from dataclasses import dataclass, fields

from ardor.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to continue a prompt. None: as the model's generation_config.json says, else greedy;
    with top_k, top_p or min_p, sampled.

    Raises: ConfigError for a limit or penalty outside its range, before a model is loaded.
    """

    max_new_tokens: int = 256
    """Tokens to write at most."""
    temperature: float | None = None
    """0 takes the most probable token; 1 samples from the model as it is."""
    top_k: int | None = None
    """Sample among the k most probable tokens."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probability reaches p."""
    min_p: float | None = None
    """Sample among tokens at least min_p times as probable as the first."""
    repetition_penalty: float | None = None
    """Above 1: tokens that already stand in the text become less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and do not belong to it."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens!r} must be a whole number of at least 1"
            )
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={penalty} must be above 0, and finite")

    @classmethod
    def of(cls, holder: "Settings") -> "Settings":
        """The settings alone, of a verb's configuration that has them among others."""
        return cls(**{field.name: getattr(holder, field.name) for field in fields(cls)})
