"""The Interventions tab."""
