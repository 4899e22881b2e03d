"""How good a model is: held-out language modelling."""
