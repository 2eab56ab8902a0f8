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
