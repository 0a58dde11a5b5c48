"""How the programs end: status, one line, no traceback."""

import jax
import pytest

from mmrjax import convert
from mmrjax.predict import __main__ as predict
from mmrjax.runtime import command_line, files


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (ValueError("no such\n  thing"), 1, "error: no such thing; nothing was written"),
        (RuntimeError("broken"), 1, "error: broken; nothing was written"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_an_error_of_a_person_is_one_line(raised, status, line, capsys, monkeypatch):
    monkeypatch.delenv("MMRJAX_TRACEBACK", raising=False)

    def program():
        raise raised

    assert command_line.run(program, "; nothing was written") == status
    assert capsys.readouterr().err == f"{line}\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 // 0)


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("MMRJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        command_line.run(lambda: open("nowhere"))


def press_ctrl_c(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_leaves_no_traceback_and_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "from_torch", press_ctrl_c)
    command = ["from-torch", "--kind=teacher", "--input=a.pth"]
    assert convert.main([*command, f"--output={tmp_path / 'b.safetensors'}"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    monkeypatch.setattr(predict, "find_all", press_ctrl_c)
    assert predict.main(["--workdir=run", "--input=a", f"--output={tmp_path}"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("before")
    monkeypatch.setattr(files.os, "fsync", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(file, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "before"


def test_what_the_environment_says_of_compiled_programs_stays(tmp_path, monkeypatch):
    set_here = {}
    monkeypatch.setattr(jax.config, "update", set_here.__setitem__)
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in chosen:
        monkeypatch.setenv(name, "5")
    command_line.keep_compiled()
    assert set_here == {}
    for name in chosen:
        monkeypatch.delenv(name)
    command_line.keep_compiled()
    assert list(set_here.values()) == [str(tmp_path / ".cache/mmrjax/xla"), 0]
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "no_folder"))  # a home that cannot be written to
    command_line.keep_compiled()
    assert list(set_here.values()) == [None, 0]
