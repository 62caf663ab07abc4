"""Measurements of lit-rlvr against TRL's GRPOTrainer, and against the machine's own ceiling; see docs/benchmarks.md."""
