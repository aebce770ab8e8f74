"""What docs/low-precision.md reports, a module for each thing that is measured."""
