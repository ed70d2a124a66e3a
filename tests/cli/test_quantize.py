"""`ardor quantize`: a checkpoint that every verb loads, and figures that can be checked."""

import json

import pytest
import torch

import ardor
from ardor.cli.main import main
from ardor.files.json import read_json
from ardor.quant.linear import QuantizedLinear
from ardor.quantize import perplexity

from ..tiny import make_base, sentences

TEXT = " ".join(sentences(30, seed=9))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("format", ["nf4", "int8", "int4-g32"])
def test_the_checkpoint_is_that_of_quantizing_on_load(base, tmp_path, text, capsys, format):
    out = tmp_path / "q"
    code = main(["quantize", str(base), "-o", str(out), "--format", format,
                 "--data", str(text), "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads(said.out)
    quantized, loaded = ardor.load(out), ardor.load(base, quantization=format)
    assert quantized.model.quantization == loaded.model.quantization == report["format"]
    assert torch.equal(quantized.logits([[5, 6, 7]]), loaded.logits([[5, 6, 7]]))
    dense = ardor.load(base)
    assert report["perplexity_before"] == pytest.approx(perplexity(dense.model, TEXT))
    assert report["perplexity_after"] == pytest.approx(perplexity(loaded.model, TEXT))
    assert report["perplexity_before"] != report["perplexity_after"]
    assert quantized.generate("the cat", max_new_tokens=3).tokens  # the tokenizer came along
    assert report["bytes_after"] < report["bytes_before"]
    held = [m for m in quantized.model.decoder.modules() if isinstance(m, QuantizedLinear)]
    assert len(report["maps"]) == len(held) == 14


def test_errors_are_those_of_each_weight_and_the_worst_comes_first(base, tmp_path, capsys):
    out = tmp_path / "q"
    assert main(["quantize", str(base), "-o", str(out), "--format", "nf4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    dense = ardor.load(base).model.decoder
    quantized = ardor.load(out).model.decoder
    for layer in (0, 1):
        weight = dense.get_submodule(f"layers.{layer}.ffn.up_proj").weight.float()
        found = quantized.get_submodule(f"layers.{layer}.ffn.up_proj").dequantized(torch.float32)
        (said,) = (
            m for m in report["maps"] if m["name"] == f"model.layers.{layer}.mlp.up_proj.weight"
        )
        expected = ((found - weight).norm() / weight.norm()).item()
        assert said["relative"] == pytest.approx(expected, rel=1e-4) and expected > 0.02
        assert said["bits_per_weight"] == 4.5
    errors = {one["name"]: one["relative"] for one in report["maps"]}
    assert [errors[name] for name in report["worst"]] == sorted(errors.values())[::-1][:10]
    assert report["perplexity_before"] is None


def test_people_get_a_table_and_what_was_kept(base, tmp_path, capsys):
    out = tmp_path / "q"
    assert main(["quantize", str(base), "-o", str(out), "--skip-modules", "self_attn"]) == 0
    said = capsys.readouterr().out
    assert "relative error" in said and "size" in said and "mlp.down_proj" in said
    assert "kept            9 maps: lm_head, model.layers.0.self_attn.q_proj" in said
    skipped = read_json(out / "config.json")["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped and "model.layers.1.self_attn.o_proj" in skipped


def test_mistakes_are_refused_and_leave_nothing(base, tmp_path, capsys):
    out = tmp_path / "q"

    def refused(*args):
        assert main(["quantize", *map(str, args)]) == 2
        return capsys.readouterr().err

    assert "missing OUTPUT; give the directory to write with -o" in refused(base)
    assert "'nf5' is not known" in refused(base, "-o", out, "--format", "nf5")
    assert "matches no module" in refused(base, "-o", out, "--skip-modules", "o_prj")
    assert "does not exist" in refused(base, "-o", out, "--data", tmp_path / "no.txt")
    assert not out.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.doc").write_text("mine")
    assert "notes.doc, which writing would remove" in refused(base, "-o", other)
    assert main(["quantize", str(base), "-o", str(out)]) == 0
    capsys.readouterr()
    assert "is quantized already" in refused(out, "-o", tmp_path / "again")
