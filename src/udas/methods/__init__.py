"""One file per method; `base` is the contract they share."""
