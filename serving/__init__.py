"""The gRPC server on vLLM: samples, takes feedback, and swaps the policy without failing a request."""
