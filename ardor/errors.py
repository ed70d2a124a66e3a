"""The mistakes a user can act on. Anything else that escapes is a bug of ours (exit code 1)."""


class ArdorError(Exception):
    """Says what was found, what was expected, and what to do; exit code 2."""


class ConfigError(ArdorError):
    """A config.json, run file or flag that we cannot honour exactly."""


class ShapeError(ArdorError):
    """Tensors whose axes do not fit together."""


class CheckpointError(ArdorError):
    """A weights, adapter or trainer file that is missing, damaged, or does not fit its model."""


class DataError(ArdorError):
    """A dataset, or one row of it, that cannot be trained on or scored."""


class TextError(ArdorError):
    """A tokenizer, special token or chat template that cannot do what was asked."""
