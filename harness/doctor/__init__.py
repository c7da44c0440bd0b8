"""What is wrong with a machine or a config, and the fix."""
