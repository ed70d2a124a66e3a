"""Whose code runs: nobody's unasked, and what is asked for is said first."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from ardor.arch.decoder import Decoder
from ardor.bridge.foreign import Foreign
from ardor.bridge.plan import plan
from ardor.cli.main import main
from ardor.errors import ArdorError, CheckpointError, ConfigError
from ardor.families import FAMILIES, implemented
from ardor.lm import load

from ..files.test_hub import COMMIT, hub  # noqa: F401 (a fixture)
from ..tiny import make_world, sentences, write_rows
from .conftest import AUTO_MAP, ran, write_native, write_odd

FLAG = "--trust-remote-code"


@pytest.fixture
def fresh(tokenizer, tmp_path):
    """A repository whose code has not been run yet."""
    return write_odd(tmp_path / "fresh", tokenizer)


def change(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def test_without_the_flag_an_unknown_model_is_refused_by_name_and_its_code_is_not_run(fresh):
    with pytest.raises(ConfigError) as refusal:
        load(fresh)
    said = str(refusal.value)
    assert "model_type='odd' is not implemented" in said
    assert " | ".join(FAMILIES) in said
    assert "trust_remote_code=True (--trust-remote-code)" in said
    assert "pip install 'ardor[transformers]'" in said
    assert not ran(fresh)


@pytest.mark.parametrize("verb", ["generate", "chat", "score", "finetune"])
def test_no_verb_runs_it_unasked(fresh, tmp_path, capsys, verb):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(3)])
    args = {"generate": ["the"], "chat": [], "score": [data], "finetune": [data]}[verb]
    output = ["-o", tmp_path / "run"] if verb == "finetune" else []
    assert main([verb, str(fresh), *map(str, args), *map(str, output)]) == 2
    said = capsys.readouterr()
    assert "model_type='odd' is not implemented" in said.err and "Traceback" not in said.err
    assert said.out == "" and not ran(fresh)


def test_with_the_flag_it_is_said_what_runs_before_it_runs(fresh, capsys):
    assert isinstance(load(fresh, trust_remote_code=True).model.decoder, Foreign)
    assert ran(fresh)  # the probe of the tests above could have fired
    said = capsys.readouterr().err
    before, after = said.split("the code runs")
    assert f"{fresh}, a local directory: about to run its own code" in before
    assert "(OddConfig, OddForCausalLM)" in before
    listed = set(re.findall(r"^  (.*)$", before, flags=re.MULTILINE))
    wanted = {"configuration_odd.py", "modeling_odd.py", "layers_odd.py"}
    assert listed == {str(fresh / name) for name in wanted}  # not unrelated.py, nor a tokenizer
    assert "about to run" not in after


def test_a_model_that_transformers_has_runs_no_code_of_the_checkpoint(tokenizer, tmp_path, capsys):
    path = write_native(tmp_path / "neo", tokenizer, "gpt_neo")
    (path / "modeling_neo.py").write_text("raise SystemExit\n")
    with pytest.raises(ConfigError, match="model_type='gpt_neo' is not implemented"):
        load(path)
    load(path, trust_remote_code=True)
    said = capsys.readouterr().err
    assert "'gpt_neo' is run by transformers" in said and "(GPTNeoForCausalLM)" in said
    assert "no code of the checkpoint is run" in said


def test_code_that_generates_is_not_run_with_the_flag_either(fresh, tmp_path):
    marker = tmp_path / "generated"
    (fresh / "custom_generate").mkdir()
    (fresh / "custom_generate" / "generate.py").write_text(
        f"open({str(marker)!r}, 'w')\ndef generate(model, *_, **__): ...\n"
    )
    load(fresh, trust_remote_code=True).generate("the", max_new_tokens=2)
    assert ran(fresh) and not marker.exists()


def test_code_for_tokens_is_never_run(fresh, tmp_path):
    marker = tmp_path / "tokenized"
    (fresh / "tokenization_odd.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass OddTokenizer: ..."
    )
    file = fresh / "tokenizer_config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    raw["auto_map"] = {"AutoTokenizer": ["tokenization_odd.OddTokenizer", None]}
    file.write_text(json.dumps(raw))
    assert load(fresh, trust_remote_code=True).tokenizer.encode("the")
    assert not marker.exists()


def test_what_we_implement_is_run_by_us_with_or_without_the_flag(tmp_path, capsys):
    world = make_world(tmp_path)
    capsys.readouterr()
    for name in (world.base, world.lora):
        assert isinstance(load(name, trust_remote_code=True).model.decoder, Decoder)
    assert "is run by" not in capsys.readouterr().err


def test_a_known_name_with_code_of_others_is_not_ours():
    assert implemented({"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.C"}})
    assert implemented({"model_type": "llama", "auto_map": {"AutoTokenizer": ["a.B", None]}})
    assert not implemented({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "a.B"}})
    assert not implemented({"model_type": "odd"}) and not implemented({})


def test_a_known_name_with_code_of_others_needs_the_flag(fresh):
    change(fresh, model_type="llama")
    with pytest.raises(ConfigError, match="auto_map=.*never run unasked; give trust_remote_code"):
        load(fresh)
    assert not ran(fresh)


def test_without_transformers_the_extra_is_named(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError, match=r"cannot be imported .*pip install 'ardor\[transformers\]'"
    ):
        load(fresh, trust_remote_code=True)
    assert not ran(fresh)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "else/where--modeling_odd.Odd"}},
            "from 'else/where--modeling_odd.Odd', which is not in this repository",
        ),
        ({"auto_map": "modeling_odd.Odd"}, "auto_map is 'modeling_odd.Odd', expected names"),
        ({"auto_map": {"AutoModel": "modeling_odd.Odd"}}, "not known to transformers .* either"),
        ({"model_type": ["odd"], "auto_map": None}, r"model_type=\['odd'\] is not known to"),
        ({"auto_map": None}, "model_type='odd' is not known to transformers .* either"),
        ({"auto_map": AUTO_MAP | {"AutoConfig": "gone.Config"}}, "gone.py does not exist"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: bits=None"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=true, and only decoders"),
        ({"attn_implementation": "me/kernel"}, "attn_implementation='me/kernel' names code on"),
        ({"text": {"_attn_implementation": {"": "me/kernel"}}}, "_attn_implementation={'': 'me/k"),
    ],
)
def test_what_cannot_be_pinned_or_honoured_is_refused_before_anything_runs(fresh, values, says):
    with pytest.raises(ArdorError, match=says):
        load(change(fresh, **values), trust_remote_code=True)
    assert not ran(fresh)


def test_pickled_weights_are_not_read(fresh):
    (fresh / "model.safetensors").rename(fresh / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load(fresh, trust_remote_code=True)
    assert not ran(fresh)


def test_the_plan_runs_nothing(fresh):
    found = plan(fresh, json.loads((fresh / "config.json").read_text()))
    assert len(found.files) == 3 and not ran(fresh)


@pytest.mark.sweep  # two processes, which import torch
def test_from_the_hub_code_and_weights_are_of_one_commit(fresh, tmp_path, hub):  # noqa: F811
    hub.files = {
        path.relative_to(fresh).as_posix(): path.read_bytes()
        for path in fresh.rglob("*")
        if path.is_file()
    }
    assert len({len(held) for held in hub.files.values()}) == len(hub.files)  # its ETags
    asked: list[str] = []
    get = hub.RequestHandlerClass.do_GET

    def answer(self):
        """Someone pushes as soon as a process has asked what `main` is."""
        asked.append(self.path)
        if "/revision/main" in self.path and sum("/revision/main" in path for path in asked) > 1:
            self.reply(200, json.dumps({"id": "owner/model", "sha": "d" * 40}).encode())
        else:
            get(self)

    hub.RequestHandlerClass = type("Moving", (hub.RequestHandlerClass,), {"do_GET": answer})
    script = """
        import sys
        from ardor.lm import load
        try:
            lm = load("owner/model", trust_remote_code=len(sys.argv) > 1)
            print(lm.model.revision, lm.model.source, *lm.model.form.files)
        except Exception as error:
            print(error)
    """
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    without = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert "model_type='odd' is not implemented" in without.stdout
    assert not any(path.endswith(".py") for path in asked) and not ran(fresh)
    asked.clear()
    trusted = subprocess.run([*run, FLAG], env=env, capture_output=True, text=True, check=True)
    files = "configuration_odd.py modeling_odd.py layers_odd.py"
    assert trusted.stdout.strip() == f"{COMMIT} owner/model {files}", trusted
    before, _, _ = trusted.stderr.partition("the code runs")
    assert f"owner/model, commit {COMMIT}: about to run its own code" in before
    resolved = [path for path in asked if "/resolve/" in path]
    assert any(path.endswith("modeling_odd.py") for path in resolved)
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)
