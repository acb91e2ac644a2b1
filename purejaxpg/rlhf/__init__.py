"""Language models as agents: trainers, one file each, and the modules that they share."""
