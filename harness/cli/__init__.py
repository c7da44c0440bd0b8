"""The command line: thin verbs that import no torch."""
