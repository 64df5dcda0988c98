"""HTTP for applications without gRPC: OpenAI's API, and feedback. A thin client of the server, without an engine."""
