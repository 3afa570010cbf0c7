"""Training on judged answers: RL (rollouts, rewards), preferences (pairs); scores and loss are shared."""
