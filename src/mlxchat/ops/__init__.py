"""Operations in plain MLX. `device` decides whether `mlxchat.cpu` takes their work on a CPU."""
