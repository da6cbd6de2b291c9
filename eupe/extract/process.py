"""Settings for cores and memory of a process that computes features."""

from __future__ import annotations

import ctypes

from threadpoolctl import ThreadpoolController

M_ARENA_MAX = -8
"""Option of `mallopt`, from glibc's malloc.h."""


def prepare_process() -> None:
    """Limit BLAS threads and memory arenas; call this before the threads that decode, compute and compress start."""
    limit_blas()
    share_arena()


def limit_blas() -> None:
    """Let NumPy multiply matrices in the calling thread alone.

    Each of the writer's threads takes statistics of what it compresses. For each of them OpenBLAS would start as many
    threads again, which wait for one another in busy loops (docs/decisions/0004).
    """
    ThreadpoolController().select(prefix="libscipy_openblas").limit(limits=1)


def share_arena() -> None:
    """Let all threads allocate from one arena if the C library is glibc.

    With an arena for each thread, memory that one frees is not used by another: on two cores, DINOv2-S held 1.7 parts
    more in memory.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 1)
