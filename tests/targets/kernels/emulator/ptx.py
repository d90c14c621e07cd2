"""Inline PTX as calls of C++ functions: `asm("mma.sync... {%0,%1}, ..." : "+f"(d[0]), ...)` becomes `ptx::mma_sync(d[0], ...)`.

A function has the operands in their order, results first. `ptx.h` has those of the instructions that decoding takes; a kernel with others
compiles, and ends the process when it comes to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

KNOWN = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};": "mma",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};": "mma_first",
    "lop3.b32 %0, %1, %2, %3, 0xEA;": "pick",
    "lop3.b32 %0, %1, %2, %3, 0xAE;": "pick_not",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};": "mma",
    **{
        f"ld.global{kind}.L1::no_allocate.{vector}": "load"
        for kind in ("", ".nc")
        for vector in ("u32 %0, [%1];", "v2.u32 {%0,%1}, [%2];", "v4.u32 {%0,%1,%2,%3}, [%4];")
    },
    "st.global.v4.f32 [%0], {%1,%2,%3,%4};": "store",
    "fma.rn.bf16x2 %0, %1, %2, %3;": "fma_bf16x2",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "pack_bf16x2",
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": "pack_e4m3x2",
    "ld.shared.v2.f32 {%0,%1}, [%2];": "read_shared",
    "{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}": "unpack_f16x2",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "barrier_init",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "barrier_expect",
    "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }": "barrier_wait",
    "{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}": "barrier_arrive",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": "bulk_copy",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;": "bulk_copy_all",
    "barrier.cluster.wait.aligned;": "cluster_wait",
    "wgmma.wait_group.sync.aligned 0;": "wait_products",
    "wgmma.wait_group.sync.aligned 1;": "wait_products",
    "mapa.shared::cluster.u32 %0, %1, %2;": "map_rank",
    "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];": "read_cluster",
    "st.shared::cluster.u32 [%0], %1;": "write_cluster",
    **{
        f"stmatrix.sync.aligned.m8n8.x{n}.trans.shared.b16 [%0], {{{','.join(f'%{i + 1}' for i in range(n))}}};": "store_matrix"
        for n in (1, 2, 4)
    },
    **{f"cp.async.cg.shared.global{ahead} [%0], [%1], 16, %2;": "copy16" for ahead in ("", ".L2::128B")},
    "cp.async.ca.shared.global [%0], [%1], 8;": "copy8",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];": "read_tiles",
    "st.shared.u16 [%0], %1;": "store2",
    "atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;": "atomic_inc",
}
"""The function of each text of instructions."""

ORDER = (
    "", "cp.async.commit_group;", "cp.async.wait_group %0;", "fence.proxy.async.shared::cta;", "fence.mbarrier_init.release.cluster;",
    "barrier.cluster.arrive.aligned;", "wgmma.fence.sync.aligned;", "griddepcontrol.wait;", "griddepcontrol.launch_dependents;",
    "wgmma.commit_group.sync.aligned;",
)  # fmt: skip
"""What only says when something is done, where everything is done at once."""

_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf'{_STRING}|[()]|[^"()]+')


def translate(source: str) -> str:
    """The source without inline PTX."""
    done, found = "", re.search(r"\basm\b(\s+volatile)?\s*\(", source)
    while found:
        inside, rest = _until_closed(source[found.end() :])
        done += source[: found.start()] + _call(inside)
        source = rest
        found = re.search(r"\basm\b(\s+volatile)?\s*\(", source)
    return done + source


def _until_closed(text: str) -> tuple[str, str]:
    """What comes before the parenthesis that closes, and what after it."""
    depth = 1
    for token in _TOKEN.finditer(text):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if not depth:
            return text[: token.start()], text[token.end() :]
    raise ValueError(f"no end of the asm statement: {text[:200]}")


def _call(inside: str) -> str:
    """The call that stands for an asm statement."""
    literals = re.match(rf"(?:\s*{_STRING})*", inside)
    assert literals
    text = "".join(literal[1:-1] for literal in re.findall(_STRING, literals[0]))
    operands = list(_operands(inside))
    if text in ORDER:
        return ""
    if "wgmma.mma_async.sync.aligned.m64n" in text:
        count = len(operands) - 6  # sums, four registers of A, the descriptor of B, whether to add
        sums = ", ".join(f"&({each})" for each in operands[:count])
        name = "wgmma_e4m3" if ".e4m3.e4m3 " in text else "wgmma"
        return f"{{ float* sums[] = {{{sums}}}; ptx::{name}(sums, {count}, {', '.join(operands[count:])}); }}"
    if text not in KNOWN:
        return f'ptx::unknown("{text}")'
    return f"ptx::{KNOWN[text]}({', '.join(operands)})"


def _operands(inside: str) -> Iterator[str]:
    """The expressions of the operands."""
    for found in re.finditer(r'"[=+]?[rflhn]"\s*\(', inside):
        yield _until_closed(inside[found.end() :])[0]
