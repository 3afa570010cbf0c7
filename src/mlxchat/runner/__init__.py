"""The orchestrator: stages, plan, keys, execution. It knows nothing of MLX or of models."""
