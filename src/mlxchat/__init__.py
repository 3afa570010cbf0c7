"""mlxchat: nanochat's pipeline on Apple MLX, as a declarative, cached, versioned DAG."""

from mlxchat.ops.blas import install_hook

__version__ = "0.1.0"

# MLX's Linux CPU wheel is about fifty times slower than it need be unless a fast BLAS is loaded before its first import.
install_hook()
