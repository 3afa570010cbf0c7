"""Reinforcement learning on sampled answers. Read rollouts, rewards, scores, loss in this order."""
