"""Memory that is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
import numpy as np
from distilbert_jax.machine.memory import keep_memory

if sys.argv[1] == "keep":
    keep_memory()

def work():
    for _ in range(4):
        first, second = np.ones(5_000_000), np.ones(1_000_000)  # 40 and 8 MB
        del first, second

faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_new_pages():
    new = {how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True,
                                   text=True, check=True).stdout) for how in ("keep", "plain")}
    assert new["keep"] < 100 < new["plain"]
