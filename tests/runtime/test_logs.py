"""A wait says what it is, on a terminal and in the log; a short one says nothing."""

import time

import pytest

from mmrjax.runtime import logs


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_wait_is_told(terminal, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setattr(logs, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(logs, "on_terminal", lambda: terminal)
    with logs.waiting("compiling a test"):
        time.sleep(1.2)
    assert "compiling a test took 1 s" in caplog.text
    assert ("compiling a test, 1 s" in capsys.readouterr().err) == terminal
    assert ("compiling a test …" in caplog.text) == (not terminal)


def test_a_short_wait_is_not_told(monkeypatch, caplog, capsys):
    monkeypatch.setattr(logs, "WAIT_SECONDS", 60.0)
    with logs.waiting("nothing"):
        pass
    assert "nothing" not in caplog.text + capsys.readouterr().err
