"""How the programs end: status, one line, no traceback."""

import jax
import pytest

from mmrjax import command_line, convert, files, predict


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
    monkeypatch.setattr(predict.detector_lib, "load", press_ctrl_c)
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


def test_a_folder_for_compiled_programs_that_the_user_has_chosen_stays(monkeypatch):
    folders = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: folders.append((name, value)))
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/scratch/anna")
    command_line.keep_compiled()
    assert folders == []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command_line.keep_compiled()
    assert folders == [("jax_compilation_cache_dir", "/home/anna/.cache/mmrjax/xla")]
