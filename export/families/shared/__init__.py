"""What several families use: stacks of layers, readers of configs, and the records of networks."""
