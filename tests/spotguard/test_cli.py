"""The command line: every command is there, errors are for people, and only what is asked for is loaded."""

import argparse
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from spotguard import __version__, cli
from spotguard.errors import ConfigError, ExitCode, LabError, Unavailable

type Added = Callable[[Callable[[argparse.Namespace], int]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Added:
    """Add a command `fake` that does what the test says."""

    def add(main: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "fake something"))

    return add


def test_a_command_gets_its_arguments_and_gives_the_exit_code(command: Added) -> None:
    command(lambda args: args.number)
    assert cli.main(["fake", "--number", "3"]) == 3


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError(["node.name is missing"]), ExitCode.CONFIG, "node.name is missing"),
        (Unavailable("no store", remedy="start it"), ExitCode.UNAVAILABLE, "remedy: start it"),
        (LabError("the lab broke"), ExitCode.FAILED, "fake: the lab broke"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_told_without_a_traceback(
    error: BaseException, code: int, words: str, command: Added, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    command(fail)
    assert cli.main(["fake"]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_bug_is_not_hidden(command: Added) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--nothing"], ["drill", "--nothing"]])
def test_mistakes_of_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == ExitCode.USAGE
    assert "usage: spotguard" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            cli.main([flag])
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"spotguard {__version__}\n")
    assert all(f"    {name} " in said for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: spotguard {name}" in capsys.readouterr().out


def test_all_commands_together_make_one_parser() -> None:
    assert cli.build_parser().parse_args(["agent"]).command == "agent"


def test_only_the_named_command_is_loaded() -> None:
    code = (
        "import sys; from spotguard import cli; cli.build_parser('owner-store');"
        "print(*[m for m in ('spotguard.owner_store', 'spotguard.agent', 'spotguard.lab.drill') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["spotguard.owner_store"]
