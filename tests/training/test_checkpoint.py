"""Checkpoints: exact content, refusal of other runs, damage and pickles."""

import pickle

import pytest
import torch

from ssl_core.training.checkpoint import Identity, load_checkpoint, save_checkpoint

MINE = Identity(spec='{"method":{"name":"ressl","queue_size":64}}', code="c", data="d")


def test_the_saved_state_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "run.pt", {"step": 3, "rows": torch.arange(3)}, MINE)
    state = load_checkpoint(tmp_path / "run.pt", MINE)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["rows"], torch.arange(3))


def test_without_a_file_there_is_no_state(tmp_path):
    assert load_checkpoint(tmp_path / "run.pt", MINE) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            Identity(spec='{"method":{"name":"ressl","queue_size":32}}', code="c", data="d"),
            "method.queue_size (was 32, is 64)",
        ),
        (Identity(spec=MINE.spec, code="x", data="d"), "another run: code;"),
        (Identity(spec=MINE.spec, code="c", data="x"), "another run: data;"),
    ],
)
def test_a_checkpoint_of_another_run_is_set_aside_with_the_reason(tmp_path, capsys, other, words):
    save_checkpoint(tmp_path / "run.pt", {"step": 3}, other)
    assert load_checkpoint(tmp_path / "run.pt", MINE) is None
    assert not (tmp_path / "run.pt").exists()
    assert (tmp_path / "run.other.pt").exists()
    output = capsys.readouterr()
    assert words in (output.out + output.err).replace(" training starts", "")


def test_another_number_of_processes_is_left_to_the_trainer(tmp_path):
    def identity(training):
        return Identity(spec=f'{{"training":{training}}}', code="c", data="d")

    save_checkpoint(tmp_path / "run.pt", {"step": 3}, identity('{"gpus":2}'))
    assert load_checkpoint(tmp_path / "run.pt", identity('{"gpus":4}')) == {"step": 3}


def test_a_damaged_checkpoint_is_set_aside(tmp_path, capsys):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 3}, MINE)
    path.write_bytes(path.read_bytes()[:100])
    assert load_checkpoint(path, MINE) is None
    assert (tmp_path / "run.damaged.pt").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_in_place_of_a_checkpoint_runs_no_code(tmp_path, capsys):
    path = tmp_path / "run.pt"
    path.write_bytes(pickle.dumps(Evil()))
    assert load_checkpoint(path, MINE) is None
    assert "code ran" not in capsys.readouterr().out
