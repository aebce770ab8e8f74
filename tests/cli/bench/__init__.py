"""Tests of ``stepforge bench``."""
