"""The gRPC server on vLLM: it samples, takes feedback, and swaps the policy while requests go on."""
