"""How good a network is: confusion matrices, published protocols, and tables of the results."""
