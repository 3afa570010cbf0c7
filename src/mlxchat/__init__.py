"""mlxchat: nanochat's pipeline on Apple MLX, as a declarative, cached, versioned DAG."""

from contextlib import suppress

__version__ = "0.2.0"

# MLX's wheel for Linux CPUs needs a fast BLAS, which has to be loaded before it, and other kernels.
with suppress(ModuleNotFoundError):
    from mlxchat.cpu import install

    install()
