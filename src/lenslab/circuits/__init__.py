"""What a model computes and how it changes when something is changed."""
