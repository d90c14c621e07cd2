"""CUDA source as machine code, for any NVIDIA GPU and without one."""

from __future__ import annotations

import shutil

from moec.compiler.errors import MoecError


def cuda_compiler() -> str | None:
    """`nvcc` or `nvrtc`, whichever is installed."""
    if shutil.which("nvcc"):
        return "nvcc"
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-not-found]  # of the extra `gpu`

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return None
    return "nvrtc"


def need_cuda_compiler() -> str:
    """What `cuda_compiler` finds.

    Raises:
        MoecError: nothing.
    """
    if (compiler := cuda_compiler()) is None:
        raise MoecError("no CUDA compiler: put nvcc on the PATH, or pip install 'moec[gpu]'; the GPU itself is not needed")
    return compiler


def machine_code(source: str, arch: str, compiler: str) -> bytes:
    """A cubin for an architecture such as `sm_90a`.

    Raises:
        MoecError: the compiler fails.
    """
    from tvm.support import nvcc
    from tvm.target import Target

    try:
        with Target({"kind": "cuda", "arch": arch}):
            return bytes(nvcc.compile_cuda(source, target_format="cubin", arch=arch, compiler=compiler))
    except RuntimeError as error:
        raise MoecError(f"{compiler} could not compile the kernels for {arch}: {str(error)[-2000:]}") from error
