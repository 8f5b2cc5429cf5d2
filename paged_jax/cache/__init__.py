"""Page table -> slots -> pool, in pure arrays."""
