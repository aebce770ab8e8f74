"""The command line: ``stepforge demo``."""
