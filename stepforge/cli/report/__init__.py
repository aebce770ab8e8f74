"""``stepforge report``: a page on a training run, and what looks wrong in it."""
