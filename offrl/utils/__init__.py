"""What every room needs: errors, paths, random numbers per lane, progress, checkpoints."""
