"""mlxchat: nanochat's pipeline on Apple MLX, as a declarative, cached, versioned DAG."""

from mlxchat.ops.import_hook import install_hook

__version__ = "0.1.0"

# Without a fast BLAS, loaded before its first import, MLX's Linux CPU wheel is some fifty times slower.
install_hook()
