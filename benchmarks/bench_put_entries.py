import numpy as np

from freemerge.kernels.put_entries import put_entries_reference
from freemerge.kernels.sparse_rows import sparse_rows


def test_one_percent_put_back(throughput, version_of, weights):
    base, (expert, *_) = weights
    rows = sparse_rows(base, expert, last=base.size // 100)
    merged, expected, entries = base.copy(), base.copy(), rows.gather(expert)
    run = version_of("put_entries")
    # Each entry reads and writes a cache line of 64 bytes.
    throughput(lambda: run(merged, rows.offsets, rows.columns, entries), moved=rows.count * (128 + 2 + 2))
    put_entries_reference(expected, rows.offsets, rows.columns, entries)
    np.testing.assert_array_equal(merged, expected)
