"""Model builders, one a file: a function from data and priors to a model."""
