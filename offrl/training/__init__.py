"""Running: configuration, the trainer, its engine, sweeps."""
