"""Which part does the work: variants of one experiment, run, scored and compared."""
