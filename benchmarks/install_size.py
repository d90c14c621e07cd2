"""What a base install costs: its size on disk by package, and what importing the runtime brings in.

    python -m benchmarks.install_size [--artifact NAME.moec] [--json]

It installs this repository into a fresh virtual environment in a temporary folder. With an artifact, it also generates a few
tokens there, which shows that the base install is enough.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
LIMIT_MIB = 150
OURS_LIMIT_MIB = 20
OURS = ("moec", "apache-tvm-ffi")
HEAVY = ("torch", "transformers", "tvm", "onnx", "onnxruntime", "networkx", "tokenizers", "moec.compiler", "moec.passes")

# Runs inside the fresh environment: bytes of every installed distribution, and how many of them are bytecode.
SIZES = """
import json
from importlib.metadata import distributions
sizes, bytecode = {}, 0
for found in distributions():
    files = [path for path in {found.locate_file(file).resolve() for file in found.files or []} if path.is_file()]
    if (name := found.metadata["Name"].lower()) not in ("pip", "setuptools"):
        sizes[name] = sum(path.stat().st_size for path in files)
        bytecode += sum(path.stat().st_size for path in files if path.suffix == ".pyc")
print(json.dumps([sizes, bytecode]))
"""

IMPORT = """
import json, sys, time
start = time.perf_counter()
import moec.runtime
print(json.dumps({"seconds": time.perf_counter() - start, "modules": list(sys.modules), "file": moec.runtime.__file__}))
"""

GENERATE = """
import json, sys
import moec.runtime
with moec.runtime.load(sys.argv[1]) as session:
    tokens = [token.id for token in session.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)]
    libraries = {name: entry.size for name, entry in session.artifact.manifest.files.items() if name.startswith("libtvm_runtime")}
print(json.dumps({"tokens": tokens, "libraries": libraries, "modules": list(sys.modules)}))
"""


def run(python: Path, code: str, *arguments: str) -> Any:
    """The JSON that a piece of Python prints, run away from this repository."""
    command = [str(python), "-I", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=python.parent)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(artifact: Path | None) -> dict[str, Any]:
    """Install, and measure."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # a file that is no longer in the source would be installed from here
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
        sizes, bytecode = run(python, SIZES)
        imports = [run(python, IMPORT) for _ in range(5)]
        brought = [name for name in HEAVY if name in imports[0]["modules"]]
        result: dict[str, Any] = {
            "python": sys.version.split()[0],
            "packages_bytes": dict(sorted(sizes.items(), key=lambda entry: -entry[1])),
            "total_bytes": sum(sizes.values()),
            "bytecode_bytes": bytecode,
            "ours_bytes": sum(sizes.get(name, 0) for name in OURS),
            "import_seconds": min(entry["seconds"] for entry in imports),
            "heavy_modules": brought,
        }
        if artifact is not None:
            ran = run(python, GENERATE, str(artifact.resolve()))
            result["generated_tokens"] = ran["tokens"]
            result["ours_bytes"] += sum(ran["libraries"].values())
            brought += [name for name in HEAVY if name != "tokenizers" and name in ran["modules"]]
        return result


def main() -> None:
    """Measure, print, and fail if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.artifact)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print("| package | MiB |\n|---|---:|")
        for name, size in result["packages_bytes"].items():
            print(f"| {name} | {size / MIB:.1f} |")
        print(f"| **total** | **{result['total_bytes'] / MIB:.1f}** |")
        print(f"\nof which bytecode that Python wrote: {result['bytecode_bytes'] / MIB:.1f} MiB")
        print(f"\nmoec, tvm-ffi and the TVM runtime of the artifact: {result['ours_bytes'] / MIB:.1f} MiB")
        print(f"import moec.runtime: {1e3 * result['import_seconds']:.0f} ms")
        print(f"heavy modules that running brings in: {', '.join(result['heavy_modules']) or 'none'}")
    if result["total_bytes"] > LIMIT_MIB * MIB or result["ours_bytes"] > OURS_LIMIT_MIB * MIB or result["heavy_modules"]:
        sys.exit(f"expected at most {LIMIT_MIB} MiB in all, {OURS_LIMIT_MIB} MiB of ours and no heavy modules")


if __name__ == "__main__":
    main()
