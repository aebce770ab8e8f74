"""Times of steps: timers, turns, and a copy to compare with. Shared by several commands."""
