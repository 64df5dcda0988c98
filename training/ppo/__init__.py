"""PPO and PPO-ptx: rollouts, advantages, the update, and the guards that stop it."""
