"""One suite of attention tests that every implementation inherits."""
