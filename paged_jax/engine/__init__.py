"""The generation engine: steps, sampling, the loop."""
