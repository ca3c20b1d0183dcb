"""The training loop: devices and processes, optimisers, checkpoints and logs. Methods know nothing of it."""
