"""Simulated users: people with a hidden utility who ask, rank and are paid nothing, over the public gRPC API alone."""
