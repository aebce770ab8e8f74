"""Tests of timers and turns."""
