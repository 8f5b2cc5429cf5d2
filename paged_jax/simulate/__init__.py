"""Paged attention as a task graph on a simulated heterogeneous chip.

    case -> inputs -> graph -> executor (threads, real stage kernels)
                          \\-> scheduler (discrete events, cost model)

`cases` holds the public shapes, `stages` and `pallas_stages` the four stage
kernels, `graph` who waits for whom, `executor` runs the kernels on one thread a
unit, `scheduler` predicts the same run, `trace` and `timeline` show it, and
`study` compares the variants of the graph.
"""
