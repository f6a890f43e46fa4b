"""Parts of tools/bench_gemm.py: the shapes, the same tensors for every method, the methods, the clock, the targets."""
