"""The operators as typed, differentiable functions, one file per family."""
