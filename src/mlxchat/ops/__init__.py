"""Operations with a fast path per backend, and the remedy for MLX's Linux CPU wheel.

`mx.fast` and `nn` serve Metal and CUDA; the CPU gets its own formulas behind the same names. Nothing is
imported here, because `mlxchat.ops.blas` has to run before the first import of MLX.
"""
