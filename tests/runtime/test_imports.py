"""The runtime is small: what importing it and loading with it does not bring in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.fakes import write_artifact

ROOT = Path(__file__).parents[2]
COMPILER = ("torch", "transformers", "tvm", "onnx", "onnxruntime", "networkx", "sympy")
HEAVY = (*COMPILER, "moec.passes", "moec.compiler", "tokenizers", "tvm_ffi", "jinja2", "typer", "rich")
CODE_RUNS = {"exec", "compile", "import", "pickle.find_class", "subprocess.Popen", "os.system", "socket.connect", "ctypes.dlopen"}


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_runtime_brings_in_nothing_heavy() -> None:
    loaded = run("import sys, moec.runtime; print(*sys.modules)").split()
    assert "moec.runtime.session" in loaded
    assert [name for name in HEAVY if name in loaded] == []
    ours = [name for name in loaded if name.startswith("moec.")]
    assert all(name.startswith("moec.runtime") for name in ours), ours


def test_importing_the_runtime_is_quick() -> None:
    code = "import time; t = time.process_time(); import moec.runtime; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.4  # 0.12 s of processor time on a machine with nothing else to do


@pytest.mark.parametrize("command", ["run", "bench", "verify", "inspect", "targets", "doctor"])
def test_commands_that_need_the_base_install_import_no_more(command: str) -> None:
    code = f"""
import sys
from moec.compiler.cli.main import main
try:
    main(["{command}", "--help"])
except SystemExit:
    pass
print(*sys.modules)
"""
    loaded = run(code).split()
    assert [name for name in COMPILER if name in loaded] == []


def test_loading_runs_no_code_of_the_artifact(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "a.moec", {"lib.so": b"\x7fELF", "evil.py": b"raise SystemExit('ran')"})
    events = run(f"""
import sys
from moec.runtime.artifact import open_artifact
open_artifact({str(folder)!r}, verify=True).close()  # what our own code imports late
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
with open_artifact({str(folder)!r}, verify=True) as artifact:
    for key in artifact.weights:
        artifact.weights[key].sum()
print(*sorted(set(seen)))
""").split()
    assert CODE_RUNS & set(events) == set()
