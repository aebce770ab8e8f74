"""Tests of ``stepforge demo``."""
