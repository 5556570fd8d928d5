"""Plan an LLM training run before you pay for it."""
