"""What is looked at. Each rule is a function: what it finds in a checkpoint, or nothing."""

from ardor.doctor.checkpoint import Registry
from ardor.doctor.rules import (
    adapters,
    behaviour,
    data,
    files,
    precision,
    runs,
    templates,
    tokens,
    vocabulary,
    weights,
)

# By subject, in the order in which they are run and listed.
SUBJECTS: dict[str, Registry] = {
    "files": files.RULES,
    "weights": weights.RULES,
    "vocabulary": vocabulary.RULES,
    "tokens": tokens.RULES,
    "templates": templates.RULES,
    "precision": precision.RULES,
    "adapters": adapters.RULES,
    "data": data.RULES,
    "behaviour": behaviour.RULES,
    "runs": runs.RULES,
}
RULES: Registry = {name: rule for rules in SUBJECTS.values() for name, rule in rules.items()}
