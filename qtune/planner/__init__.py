"""Planning: what a run will take, found by running it on meta."""
