"""The command line: one line and status 2 on bad input, one JSON object with --json, and what each command prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.cli import main as entry
from moec.compiler.cli import run
from moec.compiler.cli.common import format_size, import_extra, parse_list
from moec.compiler.cli.main import COMMANDS, HIDDEN, main
from moec.compiler.progress import Progress
from moec.runtime import MoecError, Session
from tests.runtime.fakes import fake_session, random_table, write_artifact

Capture = pytest.CaptureFixture[str]


def call(arguments: Sequence[str]) -> int:
    """The exit status; help ends by an exception."""
    try:
        return main(arguments)
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that `run` loads whatever path it is given."""
    opened, _ = fake_session(tmp_path / "tiny.moec", random_table(vocab=4096), max_sequences=64)

    def load(path: str, **options: Any) -> Session:
        assert path == "tiny.moec"
        return opened

    monkeypatch.setattr(run, "load", load)
    return opened


def test_help_lists_the_commands_that_work(capsys: Capture) -> None:
    assert call([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert not any(f"  {name} " in out for name in HIDDEN)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: Capture) -> None:
    assert call([name, "--help"]) == 0
    assert f"Usage: moec {name}" in capsys.readouterr().out


def test_the_contract_of_options_is_kept(capsys: Capture) -> None:
    promised = {
        "compile": "-o --target --backend --recipe --memory --latency --max-kl --calibration --calibration-tokens --statistics --seed "
        "--resume --kv-cache-dtype --dry-run --json",
        "run": "-n --temperature --seed --json",
        "eval": "--data --reference --context --json",
        "compare": "--recipe --data --calibration --seeds --max-tokens --context --json --plot --markdown -o",
        "bench": "-p -n --batch --json",
        "inspect": "--graph --stats --locality --html --json",
    }
    for command, options in promised.items():
        assert call([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert [option for option in options.split() if option not in out] == [], command


BAD = {
    ("frob",): "unknown command 'frob'",
    ("complie",): "did you mean 'compile'?",
    ("--frob",): "No such option: --frob",
    ("run",): "Missing argument 'ARTIFACT'",
    ("run", "x", "y", "-n", "0"): "Invalid value",
    ("run", "x", "y", "-n", "many"): "Invalid value",
    ("run", "x", "y", "--nope"): "No such option: --nope",
    ("run", "no such", "y"): "no such: does not exist",
    ("bench", "no such", "-p", "1,,2"): "-p '1,,2': expected integers of at least 1 separated by commas",
    ("bench", "no such", "-t", "0"): "-t '0': expected integers",
    ("bench", "no such"): "no such: does not exist",
    ("verify", "no such"): "no such: does not exist",
    ("inspect", "no such"): "no such",
    ("eval", "no such", "--data", "no such"): "no such",
    ("compile", "no such", "-o", "x.moec"): "no such",
    ("compile", "no such", "-o", "x.moec", "--max-kl", "1"): "--max-kl needs calibration text: add --calibration FILE",
    ("compare", "no such", "-r", "int4", "--data", "x"): "no such",
    ("compare", "x", "--data", "y"): "Missing option '--recipe' / '-r'",
    ("targets", "show", "h10"): "unknown target 'h10'",
    ("targets", "measure"): "nothing to measure: name a model, or a layer with --layer E,K,D,F",
    ("targets", "measure", "--layer", "4,2,256"): "--layer '4,2,256': expected E,K,D,F",
    ("targets", "measure", "--layer", "4,2,256,128", "--target", "h10"): "unknown target 'h10'",
    ("plan", "x", "--target", "cpu"): "`moec plan` is not available in this version",
    ("serve", "x"): "`moec serve` is not available in this version",
    ("export", "no such", "-o", "x"): "no such",
    ("export", "no such", "-o", "x", "--to", "gguf"): "unknown export format 'gguf'",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *progress, line = err.splitlines()
    assert line.startswith("error: ")
    assert BAD[arguments] in line
    assert not any(text.startswith(("error", "Traceback")) for text in progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (MoecError("two\nlines"), 2, "error: two lines"),
        (MoecError("\x1b[2Jred\u202e"), 2, "error: ?[2Jred?"),
        (PermissionError(13, "Permission denied", "a.moec"), 2, "error: a.moec: Permission denied"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors_become_exit_statuses(
    raised: BaseException, status: int, line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_names: Sequence[str]) -> Callable[..., None]:
        raise raised

    monkeypatch.setattr(entry, "build_app", fail)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main(["run"]) == status
    assert capsys.readouterr().err.startswith(line)


def test_run_streams_the_text(session: Session, capsys: Capture) -> None:
    expected = "".join(token.text for token in session.generate("Hello", max_new_tokens=6))
    assert call(["run", "tiny.moec", "Hello", "-n", "6"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_run_prints_one_json_object(session: Session, capsys: Capture) -> None:
    expected = [token.id for token in session.generate("Hello", max_new_tokens=6, temperature=1.0, seed=3)]
    assert call(["run", "tiny.moec", "Hello", "-n", "6", "--temperature", "1", "--seed", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == expected
    assert result["finish_reason"] == "length"
    assert result["prompt"] == "Hello"
    assert len(result["logprobs"]) == 6
    assert set(result) >= {"text", "prompt_tokens", "load_ms", "time_to_first_token_ms", "decode_tokens_per_s"}


def test_run_reads_the_prompt_from_standard_input(session: Session, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert call(["run", "tiny.moec", "-", "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "from a pipe"


def test_verify_reports_and_exits(tmp_path: Path, capsys: Capture) -> None:
    folder = write_artifact(tmp_path / "a.moec")
    assert call(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 files match their digests\n"
    weights = folder / "weights/shared.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert call(["verify", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    section = "layers.0.w codes, layers.0.w scale, norm data"
    assert err.startswith(f"error: {folder}: weights/shared.safetensors bytes 0 to 908 ({section}): changed or damaged")
    assert err.count("\n") == 1
    assert call(["verify", str(folder), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(p["file"], p["begin"], p["end"]) for p in problems] == [("weights/shared.safetensors", 0, 908)]


def test_targets_and_doctor_print_json(capsys: Capture) -> None:
    assert call(["targets", "list", "--json"]) == 0
    assert "h100-sxm" in [target["name"] for target in json.loads(capsys.readouterr().out)["targets"]]
    assert call(["targets", "show", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mem_bw_gb_s"] == 3350
    assert call(["targets"]) == 0
    assert "rtx-4090" in capsys.readouterr().out
    assert call(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["run"]["numpy"]
    assert call(["doctor"]) == 0
    assert "compile with the tvm backend" in capsys.readouterr().out


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MoecError, match=r"this needs the package no_such_package: pip install 'moec\[compile\]'"):
        import_extra("needs_more", "compile")


def test_sizes_and_lists() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "5.0 TiB"]
    assert parse_list(" 1, 20 ", "-p") == [1, 20]
    for text in ("", "1;2", "-1", "1.5", "١", "9" * 30):
        with pytest.raises(MoecError, match="expected integers"):
            parse_list(text, "-p")


def test_progress_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.step("trace"):
        pass
    assert list(progress.track([1, 2, 3], "weights")) == [1, 2, 3]
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["trace: 0.0 s", "weights: 3/3"]


def test_python_m_moec_runs_the_command_line() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-m", "moec", "frob"], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'frob'")


def test_a_chat_needs_a_template(session: Session, capsys: Capture) -> None:
    assert call(["run", "tiny.moec", "Hi", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
