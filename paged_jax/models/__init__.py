"""The flax transformer: weights in, cache passed in and returned."""
