"""Every instruction of the simulator is tested by itself somewhere in this folder."""

from __future__ import annotations

from cdnasim import native
from tests.cdnasim import (
    test_lanes,
    test_lds,
    test_matrix,
    test_memory,
    test_packed,
    test_scalar,
    test_vector_compare,
    test_vector_convert,
    test_vector_float,
    test_vector_integer,
)

MODULES = (
    test_lanes,
    test_lds,
    test_matrix,
    test_memory,
    test_packed,
    test_scalar,
    test_vector_compare,
    test_vector_convert,
    test_vector_float,
    test_vector_integer,
)
# No result to compare: their effect is on timing, caches, waits and other waves (test_checks.py).
WITHOUT_RESULT = {
    "s_barrier",
    "s_waitcnt",
    "s_nop",
    "s_sleep",
    "s_setprio",
    "s_icache_inv",
    "s_dcache_inv",
    "s_dcache_wb",
    "s_sendmsg",
    "s_ttracedata",
    "s_trap",
    "buffer_inv",
    "buffer_wbl2",
    "v_nop",
}
ADDRESS = {"s_getpc_b64"}  # test_kernels.py reads a constant table through it


def test_every_instruction_is_covered():
    covered = set().union(*(module.COVERED for module in MODULES)) | WITHOUT_RESULT | ADDRESS
    known = set(native.operations())
    assert known - covered == set()
    assert covered - known == set()
