"""Tests of ``stepforge selftest``."""
