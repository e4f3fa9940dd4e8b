"""The console script: exit codes, one-line errors, the log."""

import argparse
import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ssl_core import cli
from ssl_core.stages import evaluate, pretrain, shard

PRETRAIN = ["pretrain", "x", "--spec", "{}", "--code", "c", "--manifest", "m", "--output", "o", "--checkpoint", "k"]


def raising(error: BaseException):
    """Return a stage that ends with `error`."""

    def run(*arguments: object, **options: object) -> None:
        print("\rstep 1\rstep 2\nunended", end="", file=sys.stderr)
        raise error

    return run


def test_a_fault_of_the_users_is_one_line_and_exit_code_2_with_the_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "run", raising(ValueError("data/x.tar:\n  is truncated")))
    assert cli.main([*PRETRAIN, "--log", str(tmp_path / "logs" / "x.log")]) == 2
    shown = capsys.readouterr().err
    assert shown.endswith(f"error: data/x.tar: is truncated (log: {tmp_path}/logs/x.log)\n")
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / "logs" / "x.log").read_text()


def test_the_log_has_the_last_state_of_a_progress_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "run", raising(KeyboardInterrupt()))
    cli.main([*PRETRAIN, "--log", str(tmp_path / "x.log")])
    assert (tmp_path / "x.log").read_text() == "step 2\nunended"
    assert "\rstep 1\rstep 2\n" in capsys.readouterr().err


def test_the_log_has_the_output_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrain, "run", lambda *names, **options: print("23 images (1 rejected)"))
    assert cli.main([*PRETRAIN, "--log", str(tmp_path / "x.log")]) == 0
    assert (tmp_path / "x.log").read_text() == "23 images (1 rejected)\n"


def test_a_gpu_of_slurm_that_torch_cannot_use_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1000")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert cli.main(PRETRAIN) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: SLURM gave this job 1000 GPU(s), torch can use ")
    assert " on n7: run `nvidia-smi` there and exclude the node" in line


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pretrain, "run", raising(KeyboardInterrupt()))
    assert cli.main(PRETRAIN) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_fault_of_the_program_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "run", raising(TypeError("unexpected")))
    assert cli.main(PRETRAIN) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_gets_the_arguments_of_its_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    received = {}
    monkeypatch.setattr(evaluate, "run", lambda **options: received.update(options))
    spec = {"protocol": "knn", "dataset": {"name": "demo"}}
    words = ["--code", "c", "--backbone", "b", "--manifest", "m", "--output", "o", "--threads", "3"]
    assert cli.main(["evaluate", "first", "knn", "--spec", json.dumps(spec), *words]) == 0
    paths = {name: Path(name[0]) for name in ("backbone", "manifest", "output")}
    names = {"experiment": "first", "evaluation": "knn"}
    assert received == {**names, "spec": spec, "code": "c", "threads": 3, "model": None, **paths}


def test_a_table_of_no_results_is_written_with_its_page(tmp_path: Path) -> None:
    assert cli.main(["table", "--output", str(tmp_path / "table.csv"), "--grid", "{}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "table.html"}


def test_explain_names_the_nearest_experiment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    monkeypatch.chdir(root)
    assert cli.main(["explain", "ressl_r19"]) == 2
    assert capsys.readouterr().err == "error: there is no experiment 'ressl_r19'; did you mean 'ressl_r18'?\n"


def test_without_a_command_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "usage: ssl-core" in capsys.readouterr().out


def parsers() -> dict[str, argparse.ArgumentParser]:
    parser: Any = cli._parser()
    (commands,) = parser._subparsers._group_actions
    return commands.choices


@pytest.mark.parametrize("name", parsers())
def test_the_help_of_each_command_has_an_example_that_can_be_parsed(name: str) -> None:
    _, _, example = str(parsers()[name].epilog).partition("example: ")
    assert example in parsers()[name].format_help().splitlines()[-1]
    example = example.removeprefix("SSL_RENDEZVOUS=10.0.0.1:29500 ")
    if example.startswith("ssl-core "):
        words = shlex.split(example.partition(" > ")[0])[1:]
        assert cli._parser().parse_args(words).name == name
    else:
        assert example.startswith(("snakemake --cores all ", 'eval "$(ssl-core '))


def test_completion_offers_commands_and_options_in_bash(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion"]) == 0
    functions = capsys.readouterr().out
    for position, word, expected in (("1", "emb", "embed"), ("2", "--skip", "--skip-unreadable"), ("2", "pho", "")):
        words = f"COMP_WORDS=(ssl-core embed {word}); COMP_CWORD={position}; _ssl_core ssl-core '{word}'"
        script = f'{functions}\n{words}; echo "${{COMPREPLY[*]}}"'
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (run.stdout.splitlines()[-1], run.stderr) == (expected, "")


def test_an_error_is_red_on_a_terminal_only_and_never_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(pretrain, "run", raising(ValueError("no")))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main([*PRETRAIN, "--log", str(tmp_path / "x.log")])
    assert "\x1b[31merror:\x1b[0m no" in capsys.readouterr().err
    assert "\x1b" not in (tmp_path / "x.log").read_text()
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(PRETRAIN)
    assert "\x1b" not in capsys.readouterr().err


def test_it_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ssl-core {metadata.version('ssl-core')}\n"


def test_it_prints_the_files_of_recipes(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert cli.main(["recipes"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((root / "recipes").glob("*.yaml")))
    assert cli.main(["recipes", "ressl_cifar10"]) == 0
    assert capsys.readouterr().out == f"{root}/recipes/ressl_cifar10.yaml\n"


def test_a_card_is_named_by_its_file_or_by_its_data_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    cards = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shard, "run", lambda **options: cards.append(options["card"]))
    for name in ("demo", "elsewhere/demo.yaml"):
        assert cli.main(["shard", name, "--output", "shards/demo"]) == 0
    assert cards == [root / "datasets" / "demo.yaml", Path("elsewhere/demo.yaml")]
