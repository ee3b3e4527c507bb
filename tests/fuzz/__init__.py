"""A fuzzer that knows the containers: mutants of the samples must be read, or refused with one clear error."""
