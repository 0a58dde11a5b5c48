"""Every command that a document shows: it parses, and a test runs it or a reason says why not.

The test reads README.md, CONTRIBUTING.md, docs/*.md and the docstrings of the code. A command
stands in a fenced block, in backticks, or on a line of a docstring. If a value is a placeholder
(`<folder>`, `…`), only its flag is checked.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from data_builders import build
from mmrjax import __main__ as cli
from mmrjax import main, methods
from mmrjax.runs import arguments
from mmrjax.runtime import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = [
    path
    for folder in ("configs", "mmrjax", "data_builders", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FIELD_SOURCES = [
    *DOCUMENTS,
    *DOCSTRINGS,
    *sorted((ROOT / "scripts").glob("*.sh")),
    ROOT / "scripts" / "colab.ipynb",
]
FIRST_WORDS = re.compile(
    r"(python|mmrjax|pip|export|sbatch|tensorboard|scripts/\w+(\.sh)?)(\s|$)|\w+=\""
)
# Not what code builds, f"--config.{field}", and not --config.<group>.<field>.
FIELD = re.compile(r"--config\.(\w+\.\w+)(?:=([^\s`\"'\\);]*[^\s`\"'\\);.,]))?")
PLACEHOLDER = "placeholder"

# {pattern of a whole command: the test that runs it}. The test has a small model and small data if
# the command takes hours. HERE is the last test of this file.
SETS = "tests/data_builders/test_data_sets_run.py"
CROSS = "tests/test_cross_domain.py"
MAIN = "tests/test_main.py::test_a_run_leaves_everything_the_report_needs"
HERE = "tests/test_commands.py::test_the_way_of_a_newcomer"
RUN_BY = {
    r"scripts/test\b.*": ".ci/run",
    r"scripts/tpu_vm.sh .*": "tests/test_cluster_scripts.py::"
    "test_keep_waits_runs_and_asks_again_when_the_machines_are_taken_away",
    r"export TPU_.*": "tests/test_cluster_scripts.py::test_a_request_that_fails_is_said",
    r"scripts/slurm.sh .*": "tests/test_cluster_scripts.py::test_slurm_dry_run_prints_the_step",
    r"python -m mmrjax.main .*gs://.*": "tests/runs/test_staging.py::"
    "test_the_killed_run_went_on_from_its_checkpoint",
    r"python -m mmrjax.predict .*gs://.*": "tests/runs/test_staging.py::"
    "test_predict_scores_as_the_folder_does",
    r"python -m mmrjax.main .*--distributed.*": "tests/runtime/test_distributed.py::"
    "test_distributed_alone_leaves_it_to_environment_and_cluster",
    r"python -m mmrjax.main .*--coordinator.*": "tests/runtime/test_distributed.py::"
    "test_two_processes_give_what_one_gives",
    r"python -m mmrjax.main .*configs/demo.py .*": "tests/test_notebook.py::"
    "test_it_runs_from_top_to_bottom_and_shows_pictures",
    r"python -m mmrjax.main .*configs/folder.py .*": MAIN,
    r"python -m mmrjax.main .*configs/folder_settings.py .*": "tests/runs/test_sweep.py::"
    "test_a_judged_table_is_ranked_by_the_mean_of_its_metrics",
    r"python -m mmrjax.main .*configs/mvtec.py:screw .*": f"{SETS}::test_mvtec_runs_one_category",
    r"python -m mmrjax.main .*configs/mvtec.py .*": f"{SETS}::"
    "test_mvtec_runs_all_categories_in_turn_and_gives_their_mean",
    r"python -m mmrjax.main .*configs/aebad.py:v .*": f"{SETS}::"
    "test_aebad_videos_have_image_metrics_only_and_say_why",
    r"python -m mmrjax.main .*configs/aebad.py .*": f"{SETS}::"
    "test_aebad_images_are_reported_per_domain_with_the_gap_to_same",
    r"python -m mmrjax.main .*configs/(visa|btad|kolektor_sdd2|rsdds).py(:\w+)? .*": f"{SETS}::"
    "test_other_data_sets_give_image_and_pixel_metrics",
    r"python -m mmrjax.main .*configs/aebad_ablation.py(:\w+)? .*": "tests/runs/test_sweep.py::"
    "test_every_switch_of_section_6_builds_and_gives_its_layers_a_loss",
    r"python -m mmrjax.main .*configs/cross_domain.py .*--config.eval.stress=dark.*": f"{CROSS}::"
    "test_the_same_command_does_nothing_and_dark_images_are_another_view",
    r"python -m mmrjax.main .*configs/cross_domain.py:a .*": f"{CROSS}::"
    "test_track_a_keeps_the_published_test",
    r"python -m mmrjax.main .*configs/cross_domain.py:labelled .*": f"{CROSS}::"
    "test_results_are_told_by_data_set_and_by_combination",
    r"python -m mmrjax.main .*configs/cross_domain.py .*": f"{CROSS}::"
    "test_the_split_follows_the_seed_or_its_own",
    r"python -m mmrjax.main .*configs/mvtec_visa.py .*": f"{SETS}::"
    "test_two_data_sets_train_one_model_and_have_a_mean_each",
    r"python -m mmrjax.main .*configs/kolektor_tiles.py .*": f"{SETS}::"
    "test_kolektor_and_tiles_take_few_images_of_one_data_set",
    r"python -m mmrjax.main .*configs/mala_ablation.py(:\w+)? .*": "tests/methods/test_mala.py::"
    "test_every_row_of_the_ablation_is_a_configuration_that_can_run",
    r"python -m mmrjax.(predict|export|report|compare) .*": HERE,
    r"mmrjax (train|predict) .*": "tests/test_cli.py::test_two_commands_give_verdicts",
    r"mmrjax (report|compare)( .*)?": "tests/test_cli.py::test_the_other_verbs_find_the_run",
    r"mmrjax configs.*": "tests/test_cli.py::"
    "test_the_fields_of_a_configuration_have_value_comment_and_source",
    r"mmrjax export .*": "tests/export/test_export.py::test_another_calibration_sets_the_threshold",
    r"python -m mmrjax.convert to-torch .*": HERE,
    r"python -m mmrjax.convert from-torch .*": "tests/test_convert.py::"
    "test_of_a_mae_checkpoint_the_encoder_is_taken",
    r"python scripts/score_in_torch.py .*": "tests/test_convert.py::"
    "test_an_image_gets_the_same_map_in_torch",
    r"python -m data_builders.build \w+ --download .*": "tests/data_builders/"
    "test_builders_download.py::test_command_downloads_builds_and_does_neither_again",
    r"python -m data_builders.build .*": "tests/data_builders/test_builders_build.py::"
    "test_command_line_builds_and_says_what_it_found",
    r"python -m data_builders.check .*": "tests/data_builders/test_builders_check.py::"
    "test_clean_data_has_no_problem",
    r"python -m mmrjax.main .*--config.log.trackers=.*": "tests/runtime/test_trackers.py::"
    "test_a_run_leaves_event_files_with_its_losses_and_results",
    r"python scripts/score_onnx.py .*": "tests/export/test_onnx.py::"
    "test_the_example_needs_neither_jax_nor_torch",
    r"python -m mmrjax.data.defects --preview .*": "tests/data/defects/test_preview.py::"
    "test_a_sheet_has_a_row_for_each_kind_its_outlines_and_the_real_ones",
    r"python scripts/foreign_textures.py .*": "tests/data/defects/test_perlin.py::"
    "test_the_script_draws_a_defect_into_every_picture_and_nowhere_else",
    r"python scripts/coverage.py .*": "tests/test_coverage.py::"
    "test_a_row_has_the_promise_and_the_false_alarms_of_other_parts",
}
NOT_RUN = {
    r"scripts/demo\b.*": "a quarter of an hour; its program runs small in tests/test_notebook.py",
    r"pip install .*": "needs a package index; scripts/environment.sh does it before the tests",
    r"tensorboard .*": "another program, which serves until it is stopped",
    r"python -m mmrjax.main .*configs/demo_trays.py .*": "draws trays for minutes; tests/"
    "data_builders has its builder, tests/runs/test_detector.py the tiling",
    r"sbatch .*": "needs a cluster; the script itself is run with a pretended srun",
    r"python -m mmrjax.main .*configs/(magnetic_tile|tile_ablation).py(:\w+)? .*": "hours, and the "
    "real tiles; the loop is that of every other data set, the builder has tests of its own",
    r"python -m mmrjax.bench( .*)?": "minutes, and a number that only a quiet machine gives",
    r"python -m pytest --differences .*": "prints a table; the same tests run without the option",
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command and where it stands; `text` has variables filled in and placeholders named."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def plain(text: str) -> str:
    """The command on one line, without comments; placeholders get a name a shell can read."""
    text = re.sub(r"<[^<>]*>|…|\.\.\.", PLACEHOLDER, " ".join(text.split()))
    return re.sub(r"\s+#\s.*$", "", text)


def shell_block(lines: list[str], variables: dict[str, str]) -> list[str]:
    """The commands of a fenced block; none if the block holds something else, such as a drawing.

    Assignments of the block go into `variables`, which later blocks of a document may use.
    """
    lines = "\n".join(lines).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not any(FIRST_WORDS.match(line) for line in lines):
        return []
    found = []
    for line in lines:
        assigned = re.fullmatch(r"(\w+)=\"(.*)\"", line)
        if assigned:
            variables[assigned[1]] = assigned[2]
            continue
        assert FIRST_WORDS.match(line), f"no command that this test knows: {line}"
        line = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
        found.append(plain(line))
    return found


def commands_of_document(path: pathlib.Path) -> list[Shown]:
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    found, prose, variables = [], [], {}
    for i, part in enumerate(re.split(r"^```(.*)\n", text, flags=re.MULTILINE)):
        # Text, language, block, "" (of the closing fence), text, ...
        if i % 4 == 0:
            prose.append(part)
        elif i % 4 == 2:
            found += [Shown(name, command) for command in shell_block(part.splitlines(), variables)]
    for code in re.findall(r"`([^`]+)`", "".join(prose)):
        if re.match(r"python (-m )?\S+|scripts/\w+ -|pip install", code):
            found.append(Shown(name, plain(code)))
    return found


def commands_of_docstring(path: pathlib.Path) -> list[Shown]:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    # At the end of a sentence, or on a line of its own up to a wide gap and what it does.
    lines += [match[1] for line in lines if (match := re.search(r": (python -m [^|]*)\.$", line))]
    commands = [
        re.split(r"\s{3,}(?![\s-])", line)[0] for line in lines if line.startswith("python ")
    ]
    return [Shown(path.relative_to(ROOT).as_posix(), plain(command)) for command in commands]


SHOWN = sorted(
    {
        *(command for path in DOCUMENTS for command in commands_of_document(path)),
        *(command for path in DOCSTRINGS for command in commands_of_docstring(path)),
    },
    key=lambda shown: (shown.where, shown.text),
)
IDS = [f"{shown.where}: {shown.text[:90]}" for shown in SHOWN]


def is_name(words: list[str]) -> bool:
    """A command without arguments is the name of a program, not a call."""
    return words[:2] == ["python", "-m"] and len(words) == 3


class Parsed(Exception):
    """Carries the parsed arguments of a program, and ends it before its work begins."""


def parse_alone(program, argv: list[str]) -> argparse.Namespace:
    """Runs a program up to the end of its parser."""
    parse = argparse.ArgumentParser.parse_args
    parse_known = argparse.ArgumentParser.parse_known_args
    depth = []

    def stop_after(real):
        def stopping(self, *arguments):
            depth.append(real)
            try:
                result = real(self, *arguments)
            finally:
                depth.pop()
            if not depth:  # parse_args calls the other one
                raise Parsed(result)
            return result

        return stopping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(parse))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after(parse_known))
        patch.setattr(sys, "argv", ["program", *argv])
        try:
            program()
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError("the program did not parse its arguments")


def check_main(argv: list[str]) -> None:
    """Checks that fields exist, values have their type and the configuration is valid."""
    known = [word.replace(f"--config={PLACEHOLDER}", "--config=configs/demo.py") for word in argv]
    known = [word.replace(f"defect_folder={PLACEHOLDER}", "defect_folder=.") for word in known]
    config, _ = main.parse(known)
    config_lib.validate(config, methods.METHODS)


@contextlib.contextmanager
def skipping_without_torch(name: str):
    """Skips the test if a program needs torch and torch is missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        pytest.skip(f"{name} needs the extra `torch`")


def program_of(name: str):
    """The module that `python -m` runs."""
    with skipping_without_torch(name):
        module = importlib.import_module(name)
        return (
            importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
        )


def script(path: str):
    """A file of scripts/ as a module."""
    with pytest.MonkeyPatch.context() as patch, skipping_without_torch(path):
        patch.syspath_prepend(str(ROOT / "scripts"))
        spec = importlib.util.spec_from_file_location(f"shown_{pathlib.Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def check_python(words: list[str]) -> None:
    """Checks `python -m module …` or `python scripts/x.py …`."""
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words[1]
        if words[1] == "scripts/score_in_torch.py":
            assert len(words) in (6, 7)  # STUDENT TEACHER ARCH IMAGE [MAP.npy]
        elif words[1] == "scripts/score_onnx.py":
            assert len(words) > 3  # MODEL IMAGE …
        else:
            parse_alone(script(str(ROOT / words[1])).main, words[2:])
    elif words[2] == "pytest":
        for word in words[3:]:
            assert word == "--differences" or (ROOT / word).exists(), word
    elif words[2] == "mmrjax.main":
        check_main(words[3:])
    else:
        parsed = parse_alone(program_of(words[2]).main, words[3:])
        if words[2].startswith("data_builders.") and parsed.name != "NAME":
            assert parsed.name in build.BUILDERS


def check_verb(words: list[str]) -> None:
    """Checks `mmrjax <verb> …`; a folder stands for a placeholder."""
    verb, *rest = (str(ROOT) if word == PLACEHOLDER else word for word in words[1:])
    if verb in ("configs", "check"):
        assert cli.VERBS[verb][0](rest)
    else:
        getattr(arguments, f"parse_{verb}")(rest)


def check_cluster(words: list[str]) -> None:
    """Checks that the script's own dry run takes the command, and the program its arguments."""
    if words[0] == "sbatch":
        options = words[1 : words.index("scripts/slurm.sh")]
        header = (ROOT / "scripts/slurm.sh").read_text()
        for option in options:
            assert f"#SBATCH {option.split('=')[0]}=" in header, option
        words = words[1 + len(options) :]
    arguments = [word for word in words[1:] if word != "--dry-run"]
    environment = os.environ | {"TPU_NAME": "a", "TPU_ZONE": "b", "TPU_TYPE": "v6e-8"}
    command = [str(ROOT / words[0]), "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rest = arguments if words[0].endswith("slurm.sh") else arguments[1:]
    if rest:
        check_main(rest)


def check_shell(words: list[str]) -> None:
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert words[1:2] == ["install"]
        wanted = re.fullmatch(r"\.(?:\[(.*)\])?", words[2])
        assert wanted[1] is None or set(wanted[1].split(",")) <= {*extras["optional-dependencies"]}
    elif words[0] == "export":
        tpu = (ROOT / "scripts/tpu_vm.sh").read_text()
        assert all(word.split("=")[0] in tpu for word in words[1:])
    elif words[0] != "tensorboard":
        assert os.access(ROOT / words[0], os.X_OK), words[0]
        if words[0] == "scripts/demo":
            check_main(["--config=configs/demo.py", "--workdir=runs/demo", *words[1:]])


@pytest.mark.parametrize("shown", SHOWN, ids=IDS)
def test_it_parses(shown):
    words = shown.words
    try:
        if is_name(words):
            assert importlib.util.find_spec(words[2])
        elif words[0] == "python":
            check_python(words)
        elif words[0] == "mmrjax":
            check_verb(words)
        elif words[0] == "sbatch" or words[0].endswith(("tpu_vm.sh", "slurm.sh")):
            check_cluster(words)
        else:
            check_shell(words)
    except (ValueError, OSError) as e:
        if "pip install 'mmrjax[" in str(e):  # its words are right, and an extra is not installed
            return
        pytest.fail(f"{shown.where} shows {shown.text!r}: {e}")
    except SystemExit as e:
        if "pip install 'mmrjax[" in str(e.__context__):  # as above, of a verb
            return
        pytest.fail(f"{shown.where} shows {shown.text!r}, which its program refuses (see stderr)")


def covering(text: str) -> list[str]:
    return [pattern for pattern in (*NOT_RUN, *RUN_BY) if re.fullmatch(pattern, text)]


@pytest.mark.parametrize("shown", SHOWN, ids=IDS)
def test_a_test_runs_it_or_a_reason_says_why_none_does(shown):
    if not is_name(shown.words):
        assert covering(shown.text), (
            f"{shown.where} shows {shown.text!r}: run it in a test and name that in RUN_BY, or "
            "give the reason in NOT_RUN"
        )


def test_nothing_is_listed_that_is_not_shown():
    used = {pattern for shown in SHOWN for pattern in covering(shown.text)}
    assert {*RUN_BY, *NOT_RUN} - used == set()


@pytest.mark.parametrize("named", sorted(set(RUN_BY.values())))
def test_what_runs_it_exists(named):
    file, _, name = named.partition("::")
    assert (ROOT / file).is_file()
    if name:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", FIELD_SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_field_that_is_named_exists_and_takes_the_value(path):
    text = path.read_text()
    known = config_lib.flatten(config_lib.load("configs/common.py", []))
    for name, value in FIELD.findall(text):
        if name == "group.field":  # what a message calls any of them
            continue
        assert name in known, f"{path.name} names --config.{name}"
        if value and not re.search(r"[<…{%]", value):
            config_lib.load("configs/common.py", [f"{name}={value}"])


def test_many_are_shown():
    """An extraction that finds nothing would let everything pass."""
    assert len(SHOWN) > 60
    programs = {word for shown in SHOWN for word in shown.words[:3] if "." in word}
    assert {"mmrjax.main", "mmrjax.predict", "mmrjax.convert", "data_builders.check"} <= programs
    assert {"README.md", "docs/use.md", "configs/aebad.py"} <= {shown.where for shown in SHOWN}


MISTAKES = {
    "python -m mmrjax.main --config=configs/demo.py --workdir=a --config.train.epoch=3": "epochs",
    "python -m mmrjax.main --config=configs/demos.py --workdir=a": "configs/demos.py",
    "python -m mmrjax.main --config=configs/demo.py --workdri=a": "unknown argument '--workdri=a'",
    "python -m mmrjax.main --config=configs/demo.py --workdir=a --config.optim.drops=3": "between",
    "python -m mmrjax.predict --workdir=a --inptu=b --output=c": "refuses",
    "python -m mmrjax.convert to-torch --kind=student --input=a --output=b": "refuses",
    "python -m mmrjax.compare one": "refuses",
    "mmrjax train <folder> --config.train.epoch=3": "epochs",
    "mmrjax predict --inptu=b": "refuses",
    "python -m data_builders.build mvtek --raw_dir=a --data_dir=b": "mvtek",
    "python scripts/campain.py": "campain",
    "pip install '.[cuda99]'": "cuda99",
    "scripts/demos": "scripts/demos",
    "scripts/slurm.sh --dry-run --config=configs/demo.py --wrkdir=a": "unknown argument '--wrkdir",
    "sbatch --node=2 scripts/slurm.sh --config=configs/demo.py --workdir=a": "--node",
    "scripts/tpu_vm.sh --dry-run kept --config=configs/demo.py --workdir=a": "unknown verb",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_found(command):
    (text,) = shell_block([command], {})
    with pytest.raises((AssertionError, pytest.fail.Exception), match=MISTAKES[command]):
        test_it_parses(Shown("a document", text))


def test_a_command_that_nobody_runs_is_found():
    with pytest.raises(AssertionError, match="name that in RUN_BY"):
        test_a_test_runs_it_or_a_reason_says_why_none_does(
            Shown("a document", "python -m mmrjax.main --config=configs/new.py --workdir=a")
        )
    with pytest.raises(AssertionError, match="no command that this test knows: pyhton"):
        shell_block(["pip install .", "pyhton -m mmrjax.main"], {})


def newcomer_commands(run: pathlib.Path, pictures: pathlib.Path) -> list[str]:
    """The commands that documents show for a finished run, with `run` and `pictures` put in."""
    places = {
        "runs/mine/mmr/parts/seed54": f"{run}/mmr/parts/seed1",
        "runs/mine/patchcore/parts/seed54": f"{run}/patchcore/parts/seed1",
        "runs/mine": str(run),
        f"--input={PLACEHOLDER}": f"--input={pictures}",
        f"--images={PLACEHOLDER}": f"--images={pictures}",
    }
    found = []
    for shown in SHOWN:
        run_here = any(RUN_BY.get(pattern) == HERE for pattern in covering(shown.text))
        if run_here and shown.where.endswith(".md") and "runs/mine" in shown.text:
            text = shown.text
            for word, place in places.items():
                text = text.replace(word, place)
            found.append(text)
    return sorted(set(found))


def test_the_way_of_a_newcomer(finished, tiny_raw, tmp_path, monkeypatch):
    commands = newcomer_commands(finished[0], tiny_raw)
    assert len(commands) >= 6
    for number, text in enumerate(commands):
        program, *arguments = shlex.split(text)[2:]
        needed = ("onnx", "onnxruntime", "torch") if ".onnx" in text else ("flatbuffers",)
        if program == "mmrjax.export" and not all(map(importlib.util.find_spec, needed)):
            continue  # of the extras `onnx` and `export`
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        assert program_of(program).main(arguments) == 0, text
    written = {"/".join(path.relative_to(tmp_path).parts[1:]) for path in tmp_path.rglob("*")}
    assert {"out/scores.csv", "student.safetensors", "teacher.safetensors"} <= written
