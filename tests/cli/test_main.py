"""Every ending of a command: one message, one exit code, no traceback for a user's mistake."""

import errno
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from ardor import __version__
from ardor.cli import main as cli
from ardor.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    """A verb for tests."""

    data: str
    """What to read."""
    json: bool = False
    """For machines."""


@pytest.fixture
def ending(monkeypatch, capfd):
    """Runs `ardor fake DATA` whose body is the given function; returns (code, stdout, stderr)."""

    def run(body, *flags):
        module = SimpleNamespace(Config=Config, run=body)
        monkeypatch.setitem(cli.VERBS, "fake", ("fake", "for tests"))
        monkeypatch.setattr(cli, "import_module", lambda name: module)
        code = cli.main(["fake", "d.jsonl", *flags])
        return code, *capfd.readouterr()

    return run


def raises(error):
    def body(config):
        raise error

    return body


def test_a_verb_gets_its_config_and_gives_the_exit_code(ending):
    seen = []
    assert ending(lambda config: seen.append(config) or 0) == (0, "", "")
    assert seen == [Config(data="d.jsonl")]
    assert ending(lambda config: 2)[0] == 2


def test_version_and_help_and_no_arguments(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ardor {__version__}\n"
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb}" in shown for verb in cli.VERBS)
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["finetun", "m", "d"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown verb 'finetun'; did you mean `ardor finetune`?"
    )
    assert cli.main(["zzz"]) == 2
    assert "known: quickstart, download" in capsys.readouterr().err
    assert cli.main(["--jsn"]) == 2
    assert "unknown flag '--jsn'" in capsys.readouterr().err


def test_a_users_mistake_is_one_message(ending):
    code, out, err = ending(raises(DataError("d.jsonl, line 3: no known format")))
    assert (code, out, err) == (2, "", "error: d.jsonl, line 3: no known format\n")


def test_notes_added_on_the_way_are_shown(ending):
    error = DataError("empty")
    error.add_note("the run so far is in runs/a")
    assert ending(raises(error))[2] == "error: empty\nthe run so far is in runs/a\n"


def test_json_holds_the_notes_too(ending):
    error = DataError("d.jsonl:3: not JSON")
    error.add_note("while reading the held-out data")
    shown = json.loads(ending(raises(error), "--json")[2])
    assert shown["message"] == "d.jsonl:3: not JSON\nwhile reading the held-out data"


def test_json_makes_the_error_an_object(ending):
    code, out, err = ending(raises(DataError("empty")), "--json")
    assert (code, out) == (2, "")
    assert json.loads(err) == {"error": "DataError", "message": "empty", "exit_code": 2}


def test_a_bug_is_ours_with_its_traceback(ending):
    code, _, err = ending(raises(ZeroDivisionError("by zero")))
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: by zero" in err
    assert "this is a bug in ardor" in err
    shown = json.loads(ending(raises(ZeroDivisionError("by zero")), "--json")[2])
    assert shown["exit_code"] == 1
    assert "Traceback" in shown["traceback"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/a/model.safetensors"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_not_a_bug(ending, error):
    code, _, err = ending(raises(error))
    assert code == 2
    assert err.startswith("error: the disk is full")
    assert "Traceback" not in err


def test_a_full_disk_is_recognised_under_another_error(ending):
    def body(config):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "x.bin")
        except OSError as error:
            raise RuntimeError("the writer failed") from error

    code, _, err = ending(body)
    assert (code, "x.bin" in err) == (2, True)


def test_a_forbidden_place_is_not_a_bug_but_another_oserror_is(ending):
    assert ending(raises(PermissionError(errno.EACCES, "Permission denied", "/locked/x")))[0] == 2
    assert ending(raises(OSError(errno.EIO, "Input/output error")))[0] == 1


def test_an_interrupt_tells_how_to_go_on(ending):
    code, _, err = ending(raises(KeyboardInterrupt("checkpoint-20 is saved; add --resume")))
    assert (code, err) == (130, "\ninterrupted\ncheckpoint-20 is saved; add --resume\n")
    assert ending(raises(KeyboardInterrupt()))[2] == "\ninterrupted\n"


PRINTED = "cli._help = lambda: 'x\\n' * 1_000_000\nsys.exit(cli.main(['--help']))"
BY_RICH = """
from ardor.cli.console import results
cli._help = lambda: [results().print('x') for _ in range(1_000_000)]
sys.exit(cli.main(['--help']))"""


@pytest.mark.parametrize("body", [PRINTED, BY_RICH])
def test_a_closed_pipe_ends_quietly(body):
    code = f"import sys\nfrom ardor.cli import main as cli\n{body}"
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout and writer.stderr
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(timeout=60) == 141
    assert writer.stderr.read() == b""
    writer.stderr.close()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_shell_has_closed_is_an_empty_one(closed):
    code = (
        "import sys\nfrom ardor.cli import main as cli\n"
        "cli._help = lambda: print('said', file=sys.stderr) or repr(sys.stdin.read())\n"
        "sys.exit(cli.main(['--help']))"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert done.stdout == ("" if " >" in f" {closed}" else "''\n")
    assert done.stderr == ("" if "2>" in closed else "said\n")


def test_a_warning_is_one_tidy_line(ending):
    def body(config):
        warnings.simplefilter("always")
        warnings.warn("the tokenizer has no pad token", stacklevel=1)
        return 0

    assert ending(body) == (0, "", "warning: the tokenizer has no pad token\n")


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ardor", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ardor {__version__}\n"
