"""What is done with models and features: interventions and, later, feature statistics."""
