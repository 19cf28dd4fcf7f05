"""What every run needs: configuration, checkpoints, resume, processes, clock, random numbers and logs."""
