"""Pages that people look at: the report of a run, one file of HTML that needs nothing else."""
