"""How a process that makes features uses its cores and memory, seen from outside."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_numpy_multiplies_in_one_thread() -> None:
    code = (
        "import numpy, threadpoolctl; from eupe.extract.process import limit_blas; limit_blas();"
        "print({i['num_threads'] for i in threadpoolctl.threadpool_info() if 'numpy' in i['filepath']})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "{1}"


ALLOCATE = """
import ctypes, sys, threading
from eupe.extract.process import prepare_process
if sys.argv[2] == "prepared":
    prepare_process()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
there = threading.Barrier(4)
def allocate():
    there.wait()
    for _ in range(100):
        libc.malloc(ctypes.c_size_t(5000))
    there.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_threads_allocate_from_one_arena(tmp_path: Path) -> None:
    def arenas(how: str) -> int:
        subprocess.run([sys.executable, "-c", ALLOCATE, tmp_path / how, how], check=True)
        return (tmp_path / how).read_text().count("<heap nr")

    assert arenas("prepared") == 1 < arenas("as it comes")


def test_cores_have_one_thread_each_and_the_caller_keeps_its_own() -> None:
    """Each core has one thread even in a process that has set torch's number of threads, as a worker does."""
    code = (
        "import torch; torch.set_num_threads(3); from eupe.extract.worker import single_threads;"
        "cores = single_threads(2); there = [cores.submit(torch.__config__.parallel_info) for _ in range(2)];"
        "words = [line for each in there for line in each.result().splitlines() if 'get_max_threads' in line];"
        "print(sorted({line.split(':')[-1].strip() for line in words}), torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['1'] 3", done.stderr
