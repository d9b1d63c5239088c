"""The stages of the pipeline; each is `run(config, inputs, out) -> dict` and meets the others through folders only."""
