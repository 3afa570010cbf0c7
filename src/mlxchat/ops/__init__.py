"""Operations in plain MLX. `device` decides whether `mlxchat.cpu` replaces them on a CPU."""
