"""Training a byte-level decoder: data, step, checkpoint, plot."""
