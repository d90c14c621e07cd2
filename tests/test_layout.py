"""The architecture, as tests: who may import whom, how large a file may be, and what must have a docstring."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("compiler", "passes", "runtime", "targets")
MOST_LINES = 300

# What a part may import of ours. The first prefix that fits a module decides; kernels are built by the TVM backend.
MAY_IMPORT = {
    "moec.runtime": ("moec.runtime",),
    "moec.targets.kernels": ("moec.targets", "moec.runtime", "moec.compiler"),
    "moec.targets": ("moec.targets", "moec.runtime"),
    "moec.compiler.ir": ("moec.compiler.errors", "moec.compiler.ir", "moec.runtime.formats"),
    "moec.passes": ("moec.passes", "moec.compiler", "moec.runtime", "moec.targets"),
    "moec.compiler": ("moec",),
}

# What passes must not see of the compiler, and the runtime of the world.
PASSES_AVOID = ("moec.compiler.frontend", "moec.compiler.backends", "moec.compiler.cli")
RUNTIME_AVOIDS = ("torch", "transformers", "tvm", "onnx", "networkx", "sympy", "typer", "rich", "yaml", "safetensors")


def source_files() -> list[Path]:
    """All Python files of the four source folders."""
    return sorted(path for part in SOURCE for path in (ROOT / part).rglob("*.py") if "__pycache__" not in path.parts)


def python_files() -> list[Path]:
    """All Python files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:  # an exported tree
        return source_files() + sorted((ROOT / "tests").rglob("*.py"))
    return sorted(path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file())


def module_name(path: Path) -> str:
    """`compiler/ir.py` -> `moec.compiler.ir`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("moec", *(part for part in parts if part != "__init__")))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules that a file imports anywhere, with the line; `from a import b` counts as `a.b`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_imports_are_absolute_and_use_moec() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files()
        for module, line in imports(path)
        if module.startswith(".") or within(module, SOURCE)
    ]
    assert bad == []


def test_each_part_imports_only_what_it_may() -> None:
    bad = []
    for path in source_files():
        name = module_name(path)
        allowed = next(packages for part, packages in MAY_IMPORT.items() if within(name, (part,)))
        for module, line in imports(path):
            if within(module, ("moec",)) and not within(module, allowed) and module != "moec.__version__":
                bad.append(f"{path.relative_to(ROOT)}:{line}: {module}")
            if within(name, ("moec.passes",)) and within(module, PASSES_AVOID):
                bad.append(f"{path.relative_to(ROOT)}:{line}: {module}")
            if within(name, ("moec.runtime",)) and within(module, RUNTIME_AVOIDS):
                bad.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert bad == []


def test_files_are_small() -> None:
    too_long = {str(path.relative_to(ROOT)): lines for path in python_files() if (lines := path.read_text().count("\n")) > MOST_LINES}
    assert too_long == {}


def test_public_modules_and_what_they_define_have_docstrings() -> None:
    missing = []
    for path in source_files():
        tree = parse(path)
        place = str(path.relative_to(ROOT))
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(place)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        missing += [f"{place}:{node.lineno}: {node.name}" for node in classes if ast.get_docstring(node) is None]
    assert missing == []


def test_source_folders_hold_packages() -> None:
    missing = {str(path.parent.relative_to(ROOT)) for path in source_files() if not (path.parent / "__init__.py").is_file()}
    assert missing == set()


@pytest.mark.parametrize("part", SOURCE)
def test_moec_links_to_its_parts(part: str) -> None:
    link = ROOT / "moec" / part
    assert link.is_symlink()
    assert link.readlink() == Path("..") / part


def test_nothing_points_at_one_machine() -> None:
    """No absolute path of a developer's machine, and no host of a package registry, in any text file."""
    forbidden = re.compile(
        "|".join(["/" + "(work|root)/", "/" + "home/[a-z]", "pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch"])
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ""}
    texts = [path for name in listed if (path := ROOT / name).suffix in suffixes and path.is_file()]
    bad = [str(path.relative_to(ROOT)) for path in texts if forbidden.search(path.read_text(errors="replace"))]
    assert bad == []
