"""What the kernels say of a network: a surrogate, attributions, faithfulness, forensics."""
