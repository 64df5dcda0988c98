"""What server and trainer must agree on about a policy version: its files, weights, place, prompts and stages."""
