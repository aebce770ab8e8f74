"""Tests of the command line, arranged as stepforge/cli is."""
