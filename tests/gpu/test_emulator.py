"""The emulator finds what it looks for: faults that tests of the kernels rely on it to see."""

import zlib

import emulator
import pytest
import torch

KERNEL = """
#include "device.h"
extern "C" __global__ void __launch_bounds__(32) shift(int* out) {{
  DYNAMIC_SHARED(int, memory);
  const int i = threadIdx.x;
  {body}
}}
"""
WRITE = "SHARED_WRITE(memory + i); memory[i] = i;"
READ = "SHARED_READ(memory + 31 - i); out[i] = memory[31 - i];"


def run(folder, body):
    source = folder / "shift.cu"
    source.write_text(KERNEL.format(body=body))
    out = torch.full((32,), -1, dtype=torch.int32)
    emulator.load(str(source), "shift", {"CASE": zlib.crc32(body.encode())}).launch((1,), 32, (out,), 128)
    return out.tolist()


def test_a_barrier_lets_threads_exchange(tmp_path):
    assert run(tmp_path, f"{WRITE} __syncthreads(); {READ}") == list(range(31, -1, -1))


def test_threads_may_count_together(tmp_path):
    count = "if (i == 0) { SHARED_WRITE(memory); memory[0] = 0; } __syncthreads(); SHARED_COUNT((unsigned*)memory);"
    assert run(tmp_path, f"{count} __syncthreads(); SHARED_READ(memory); out[i] = memory[0];") == [32] * 32


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"{WRITE} {READ}", "read of what nobody wrote"),
        (f"{WRITE} __syncthreads(); {READ} {WRITE}", "a race"),
        ("SHARED_WRITE(memory); memory[0] = i;", "two threads write"),
        ("SHARED_COUNT((unsigned*)memory + i);", "read of what nobody wrote"),
        (f"{WRITE} __syncthreads(); SHARED_COUNT((unsigned*)memory); {READ}", "a race"),
        ("SHARED_WRITE(memory + i + 1); memory[i + 1] = i;", "access outside: byte 128"),
        ("SHARED_WRITE(memory + i - 1); memory[i - 1] = i;", "access outside: byte -4"),
        ("if (i < 7)\n __syncthreads();\n else\n __syncthreads();", "threads wait at different barriers"),
    ],
    ids=["unwritten", "race", "two write", "unwritten count", "count and read", "above", "below", "two barriers"],
)
@pytest.mark.parametrize("descending", [False, True])
def test_finds(monkeypatch, tmp_path, body, fault, descending):
    monkeypatch.setattr(emulator, "descending", descending)
    with pytest.raises(AssertionError, match=fault):
        run(tmp_path, body)
