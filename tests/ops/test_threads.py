"""The pool of threads behind every op, seen from Python."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from freemerge.kernels.dispatch import set_threads, threads
from freemerge.kernels.task_vector_statistics import task_vector_statistics
from freemerge.testing import random_array

N = 1_000_003


@pytest.fixture
def four_threads():
    before = threads()
    set_threads(4)
    yield
    set_threads(before)


def measure(array):
    return np.stack(task_vector_statistics(None, [array])).tolist()


@pytest.mark.usefixtures("four_threads")
def test_many_callers_at_once():
    arrays = [random_array(N, np.float32, seed) for seed in range(4)]
    expected = [measure(array) for array in arrays]
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(measure, arrays * 5)) == expected * 5


@pytest.mark.usefixtures("four_threads")
def test_the_number_of_threads_may_change_while_ops_run():
    array = random_array(N, np.float32, seed=0)
    expected = measure(array)
    with ThreadPoolExecutor(2) as callers:
        running = [callers.submit(measure, array) for _ in range(20)]
        for count in (1, 3, 2, 5) * 3:
            set_threads(count)
        assert [future.result() for future in running] == [expected] * 20


FORK = """
import os, sys
import numpy as np
from freemerge.kernels.dispatch import set_threads
from freemerge.kernels.task_vector_statistics import task_vector_statistics
set_threads(3)
array = np.ones(1_000_003, np.float32)
before = float(task_vector_statistics(None, [array]).sum[0])
child = os.fork()
if child == 0:
    os._exit(0 if float(task_vector_statistics(None, [array]).sum[0]) == before else 1)
after = float(task_vector_statistics(None, [array]).sum[0])
sys.exit(os.waitpid(child, 0)[1] or after != before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_its_own_threads():
    # In a process of its own: fork() of a process with many threads (pytest's) is warned about.
    command = [sys.executable, "-P", "-W", "ignore", "-c", FORK]
    ended = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
