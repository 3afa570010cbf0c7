"""The orchestrator: plan, identity, store, locks, execution. It knows nothing of MLX or of models."""
