"""The measurements of docs/low-precision.md, one module each."""
