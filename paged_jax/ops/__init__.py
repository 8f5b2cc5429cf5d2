"""Paged attention and the slot writer: api, implementations, plan."""
