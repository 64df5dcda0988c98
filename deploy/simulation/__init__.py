"""Simulated users, who ask and rank over the public gRPC API, by a utility that server and trainer do not know."""
