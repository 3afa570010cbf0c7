"""mlxchat: nanochat's pipeline on Apple MLX, as a declarative, cached, versioned DAG."""

from contextlib import suppress

__version__ = "0.2.0"

# MLX's wheel for Linux CPUs is some fifty times slower without a fast BLAS, which has to be loaded before it.
with suppress(ModuleNotFoundError):
    from mlxchat.cpu import install_hook

    install_hook()
