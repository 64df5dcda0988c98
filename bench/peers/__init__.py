"""Other systems that benchmarks measure beside alignd, each in an environment of its own."""
