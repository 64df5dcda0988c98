"""PPO and PPO-ptx: rollouts, advantages, the update, and what stops it."""
