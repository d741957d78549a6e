"""Types and protocols, recipes, artifacts, events, errors and randomness. Imports no torch and no other room."""
