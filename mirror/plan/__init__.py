"""`mirror plan`: what a round would take on a machine that is not here, from counts and a profile of the machine."""
