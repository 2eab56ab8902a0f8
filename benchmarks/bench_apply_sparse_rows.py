import numpy as np

from freemerge.kernels.apply_sparse_rows import apply_sparse_rows_reference
from freemerge.kernels.sparse_rows import sparse_rows


def test_copy_with_one_percent_changed(throughput, version_of, weights):
    base, (expert, *_) = weights
    rows = sparse_rows(base, expert, last=base.size // 100)
    entries = (rows.offsets, rows.columns, rows.values)
    out, expected = np.empty_like(base), np.empty_like(base)
    run = version_of("apply_sparse_rows")
    throughput(lambda: run(base, *entries, 10.0, None, out, None), moved=2 * base.nbytes)
    apply_sparse_rows_reference(base, *entries, 10.0, None, expected, None)
    np.testing.assert_array_equal(out, expected)


def test_one_percent_replaced_in_place(throughput, version_of, weights):
    base, (expert, *_) = weights
    rows = sparse_rows(base, expert, last=base.size // 100)
    entries = (rows.offsets, rows.columns, rows.values)
    start = base[rows.to_dense() != 0]
    merged, expected = base.copy(), np.empty_like(base)
    run = version_of("apply_sparse_rows")
    # Replacing is idempotent, so it may be timed again and again. Each entry reads and writes a cache line of 64 bytes.
    throughput(lambda: run(merged, *entries, 1.0, start, merged, None), moved=rows.count * (128 + 6 + 2))
    apply_sparse_rows_reference(base, *entries, 1.0, start, expected, None)
    np.testing.assert_array_equal(merged, expected)
