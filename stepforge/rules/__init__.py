"""The update rules, one file a paper."""
