"""Sweeps: many trainings with different settings by Ray Tune, compared in MLflow."""
