"""Pictures, labels and how they reach the network."""
