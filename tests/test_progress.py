"""Progress bars: frequent updates on a terminal and in a notebook, few lines in a log file."""

import io
import sys
from types import ModuleType

from runs import tiny_run

from t2i.progress import progress_bar
from t2i.training.loop import train


class Screen(io.StringIO):
    """A stand-in for standard error, a terminal or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def drawn(monkeypatch, *, terminal: bool) -> list[str]:
    """The lines that a bar of 100 steps of one second prints to stderr."""
    screen, seconds = Screen(terminal), [1000.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    with progress_bar(total=100, desc="working") as bar:
        for _ in range(100):
            seconds[0] += 1
            bar.update()
    return [line for line in screen.getvalue().split("\r") if line.strip()]


def test_a_terminal_shows_every_step(monkeypatch):
    assert len(drawn(monkeypatch, terminal=True)) > 100


def test_a_log_file_gets_a_line_every_half_minute(monkeypatch):
    lines = drawn(monkeypatch, terminal=False)
    assert len(lines) <= 5, "at the start, after 30, 60 and 90 seconds, and at the end"
    assert "100/100" in lines[-1]


def test_a_notebook_shows_every_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert len(drawn(monkeypatch, terminal=False)) > 100


def test_a_quiet_bar_and_an_iterable(capsys):
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_training_steps_print_no_extra_lines(tiny_world, capsys):
    train(tiny_run(tiny_world, "progress"))
    lines = [line for line in capsys.readouterr().err.split("\r") if "training:" in line]
    assert len(lines) == 2 and "3/3" in lines[1] and "loss=" in lines[1]
