"""The measurements of runs as columns: what figures, reports and comparisons are drawn from."""
