"""Where a run's figures go: a journal in its folder, and MLflow."""
