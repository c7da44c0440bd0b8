"""Training: `python -m harness.train CONFIG` under any launcher."""
