"""The whole experiment as one frozen, validated object: its fields, how it is read, what a wrong key is told."""
