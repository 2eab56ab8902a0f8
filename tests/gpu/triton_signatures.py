"""What each Triton kernel is compiled with ahead of time: `module.kernel`, an option behind a space, and its arguments.

A string is a type ("*bf16" a pointer, divisible by 16; "i64" a number, "i64:16" one divisible by 16), a tuple of
strings a tuple of arguments; anything else, None too, is a constant. `num_warps` and `num_stages` are launch options.
"""

EXPERTS = ("*bf16", "*bf16", "*bf16")
WEIGHTS = ("fp32", "fp32", "fp32")

SIGNATURES = {
    "add_task_vectors._add_task_vectors_kernel bfloat16": dict(
        base="*bf16", experts=EXPERTS, weights=WEIGHTS, out="*bf16", n="i64:16", T=3, BLOCK=1024, num_warps=4
    ),
    "add_task_vectors._add_task_vectors_kernel float64 base": dict(
        base="*fp64", experts=("*fp32",), weights=("fp32",), out="*bf16", n="i64", T=1, BLOCK=1024, num_warps=4
    ),
    "add_elected._add_elected_kernel bfloat16": dict(
        base="*bf16",
        task_vectors=EXPERTS,
        weights=WEIGHTS,
        scaling="fp32",
        out="*bf16",
        n="i64:16",
        NORMALIZE=True,
        T=3,
        BLOCK=1024,
        num_warps=4,
    ),
    "all_finite._all_finite_kernel bfloat16": dict(array="*bf16", found="*i32", n="i64:16", BLOCK=4096, num_warps=4),
    "count_magnitudes._count_magnitudes_kernel bfloat16": dict(
        base="*bf16", expert="*bf16", cut="i32", counts="*i64", n="i64:16", BLOCK=1024, num_warps=4
    ),
    "task_vector_statistics._task_vector_statistics_kernel bfloat16": dict(
        base="*bf16", experts=EXPERTS, partial="*fp64", n="i64:16", T=3, ROWS=128, COLUMNS=8, num_warps=4
    ),
    "task_vector_statistics._task_vector_statistics_kernel float32": dict(
        base=None, experts=("*fp32",), partial="*fp64", n="i64:16", T=1, ROWS=128, COLUMNS=4, num_warps=4
    ),
    "task_vector_statistics._add_partial_kernel": dict(
        partial="*fp64", result="*fp64", programs="i32:16", BLOCK=2048, num_warps=4
    ),
    "apply_sparse_rows._apply_sparse_rows_kernel": dict(
        array="*bf16",
        offsets="*i64",
        columns="*u16",
        values="*fp32",
        scale="fp32",
        start="*bf16",
        out="*bf16",
        count="i64",
        rows="i64:16",
        width="i64:16",
        halvings="i32",
        BLOCK=512,
        num_warps=4,
    ),
    "magnitude_threshold._bisect_rows_kernel bfloat16": dict(
        base="*bf16",
        expert="*bf16",
        rank="i32",
        values="*fp32",
        ties="*i64",
        rows="i64:16",
        width="i64:16",
        ROWS=1,
        COLUMNS=16384,
        num_warps=16,
    ),
    "magnitude_threshold._bisect_rows_kernel short rows of float32": dict(
        base=None,
        expert="*fp32",
        rank="i32",
        values="*fp32",
        ties="*i64",
        rows="i64:16",
        width="i64:16",
        ROWS=32,
        COLUMNS=128,
        num_warps=4,
    ),
    "magnitude_threshold._choose_digit_kernel": dict(
        counts="*i64", state="*i64", rank="i64", value="*fp32", ties="*i64", BINS=128, num_warps=1
    ),
    "magnitude_threshold._count_digit_kernel bfloat16": dict(
        base="*bf16",
        expert="*bf16",
        state="*i64",
        counts="*i64",
        n="i64:16",
        SHIFT=24,
        BINS=128,
        BLOCK=2048,
        num_warps=4,
    ),
    "magnitude_threshold._count_digit_kernel float32": dict(
        base="*fp32", expert="*fp32", state="*i64", counts="*i64", n="i64:16", SHIFT=6, BINS=64, BLOCK=2048, num_warps=4
    ),
    "magnitude_threshold._sweep_row_kernel bfloat16": dict(
        base="*bf16", expert="*bf16", rank="i64", values="*fp32", ties="*i64", width="i64:16", BLOCK=2048, num_warps=4
    ),
    "sparse_rows._count_segments_kernel bfloat16": dict(
        base="*bf16",
        expert="*bf16",
        lower="*fp32",
        upper=None,
        counts="*i32",
        n="i64:16",
        segments="i64",
        SEGMENT=16384,
        BLOCK=1024,
        num_warps=4,
    ),
    "sparse_rows._place_segments_kernel": dict(
        counts="*i32",
        lower_ties="*i64",
        upper_ties="*i64",
        places="*i64",
        total="*i64",
        segments="i64",
        BLOCK=1024,
        num_warps=4,
    ),
    "sparse_rows._write_rows_kernel bfloat16": dict(
        base="*bf16",
        expert="*bf16",
        lower="*fp32",
        lower_ties="*i64",
        upper="*fp32",
        upper_ties="*i64",
        columns="*u16",
        values="*fp32",
        width="i64:16",
        kept="i64",
        BLOCK=1024,
        num_warps=4,
    ),
    "sparse_rows._write_segments_kernel bfloat16": dict(
        base="*bf16",
        expert="*bf16",
        lower="*fp32",
        upper=None,
        places="*i64",
        offsets="*i64",
        columns="*u16",
        values="*fp32",
        n="i64:16",
        width="i64:16",
        segments="i64",
        LONG_ROWS=True,
        SEGMENT=16384,
        BLOCK=1024,
        num_warps=4,
    ),
    "sparse_rows._write_segments_kernel both cuts, short rows of bfloat16": dict(
        base=None,
        expert="*bf16",
        lower="*fp32",
        upper="*fp32",
        places="*i64",
        offsets="*i64",
        columns="*u32",
        values="*fp32",
        n="i64:16",
        width="i64",
        segments="i64",
        LONG_ROWS=False,
        SEGMENT=16384,
        BLOCK=1024,
        num_warps=4,
    ),
    "weighted_sum._weighted_sum_kernel bfloat16": dict(
        arrays=EXPERTS, weights=WEIGHTS, out="*bf16", n="i64:16", T=3, BLOCK=1024, num_warps=4
    ),
    "weighted_sum._weighted_sum_kernel float32": dict(
        arrays=("*fp32",) * 3, weights=WEIGHTS, out="*fp32", n="i64:16", T=3, BLOCK=1024, num_warps=4
    ),
    "_low_pass._analyse_kernel bfloat16": dict(
        base="*bf16",
        experts=EXPERTS,
        weights=WEIGHTS,
        roots="*fp32",
        sums="*fp32",
        rows="i32:16",
        width="i32:16",
        count="i32",
        numbers="i32:16",
        share="i32:16",
        ROWS=64,
        POINTS=32,
        NUMBERS=128,
        num_warps=8,
        num_stages=2,
    ),
    "_low_pass._synthesise_kernel bfloat16": dict(
        base="*bf16",
        experts=EXPERTS,
        weights=WEIGHTS,
        roots="*fp32",
        times="*fp32",
        spectrum="*fp32",
        out="*bf16",
        rows="i32:16",
        width="i32:16",
        count="i32",
        numbers="i32:16",
        ADD_BASE=True,
        ROWS=64,
        POINTS=64,
        NUMBERS=32,
        num_warps=8,
        num_stages=2,
    ),
}
