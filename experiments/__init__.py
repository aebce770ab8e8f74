"""Measurements that write the figures of docs/; README.md in this folder lists them."""
