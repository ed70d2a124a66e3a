import json
from pathlib import Path

import pytest

from ardor.text.chat import CHATML_SOURCE

from ..tiny import copy_of, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base, tmp_path) -> Path:
    """A copy of the base model to damage."""
    return copy_of(base, tmp_path / "model")


@pytest.fixture
def chat(model) -> Path:
    """The same, with a chat template and the ends that go with it."""
    (model / "chat_template.jinja").write_text(CHATML_SOURCE)
    for name in ("config.json", "generation_config.json"):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [279, 276]}))
    return model
