"""`python -m harness`: the command line."""
