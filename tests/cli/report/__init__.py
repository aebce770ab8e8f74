"""Tests of ``stepforge report``."""
