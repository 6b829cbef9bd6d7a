"""What the user brings: the model, its weights and parameters, examples, and how to show them."""
