"""UnifiedLoss in training stacks. Each module here imports the library that it is named after; ava_ext imports none.

transformers    Trainer, model.loss_function, a fused language model head, correction biases of routers
lightning       a callback
"""
