"""One module per task: the plot and nothing else."""
