"""What is built and measured: a layer, kernels of it, and their options; and the folder that has the libraries."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.errors import MoecError
from moec.runtime.strict_json import Fields
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.family import FAMILY, fingerprint
from moec.targets.kernels.cuda.space import Options

INDEX = "cases.json"
KERNELS = {"decode": ("gate_up", "down"), "gate_up": ("gate_up",), "down": ("down",), "prefill": ("sort", "gate_up", "down", "combine")}
"""The functions in a library, by what the library is for."""


@dataclass(frozen=True)
class Case:
    """A library of kernels.

    Args:
        kernel: as in `moec.targets.kernels.cuda.space`.
        layer: the layer.
        options: sorted by name.
        tokens: T of the kernels of a few tokens; those of many take any number.
        activation: the activation function's name.
        biases: whether there are biases.
    """

    kernel: str
    layer: Layer
    options: tuple[tuple[str, int], ...]
    tokens: int | None = None
    activation: str = "silu"
    biases: bool = False

    @classmethod
    def of(cls, kernel: str, layer: Layer, options: Options, tokens: int | None = None, **rest: Any) -> Case:
        """A case; T of the kernels of many tokens is left out."""
        return cls(kernel, layer, tuple(sorted(options.items())), None if kernel == "prefill" else tokens, **rest)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions in the library, in the order in which they are called."""
        if self.kernel == "prefill" and dict(self.options).get("cluster"):
            return ("sort", "arrange", *KERNELS["prefill"][1:])
        return KERNELS[self.kernel]

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        rest = {"activation": self.activation, "biases": self.biases}
        return {"kernel": self.kernel, "layer": self.layer.to_json(), "options": dict(self.options), "tokens": self.tokens, **rest}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Case:
        """The inverse of `to_json`."""
        rest = {name: values[name] for name in ("tokens", "activation", "biases")}
        return cls(values["kernel"], Layer.from_json(values["layer"]), tuple(sorted(values["options"].items())), **rest)

    def file_name(self, arch: str, tvm: str) -> str:
        """The library's name without an ending: it changes with what the kernels are generated from."""
        own = [self.to_json(), fingerprint(FAMILY[self.kernel]), arch, tvm]
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.kernel}-{digest}"


@dataclass(frozen=True)
class Index:
    """What a folder of libraries has.

    Args:
        target: the target's name.
        arch: the architecture of the machine code, such as `sm_90a`.
        tvm: the version of TVM.
        kernels: a fingerprint of each family of kernels.
        files: for each library, its name without an ending.
    """

    target: str
    arch: str
    tvm: str
    kernels: Mapping[str, str]
    files: Mapping[Case, str]

    def write(self, folder: Path) -> None:
        """Write it, beside first and renamed then."""
        cases = [{"file": file, **case.to_json()} for case, file in self.files.items()]
        head = {"target": self.target, "arch": self.arch, "tvm": self.tvm, "kernels": dict(self.kernels)}
        lines = ",\n".join(json.dumps(case) for case in cases)
        beside = folder / f".{INDEX}.{os.getpid()}"
        beside.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')
        beside.replace(folder / INDEX)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder.

        Raises:
            MoecError: there is none.
        """
        path = folder / INDEX
        if not path.is_file():
            raise MoecError(f"{folder}: no {INDEX}; `python -m benchmarks.moe_layer build {folder}` makes it, on any machine")
        fields = Fields.parse(path.read_bytes(), str(path))
        files = {Case.from_json(value): str(value["file"]) for value in fields.get("cases", list)}
        kernels = {str(k): str(v) for k, v in fields.get("kernels", dict).items()}
        return cls(fields.text("target"), fields.text("arch"), fields.text("tvm"), kernels, files)
