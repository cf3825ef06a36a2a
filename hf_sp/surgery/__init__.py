"""What is done to a model: leaves swapped, hooks at the boundaries, inputs guarded."""
