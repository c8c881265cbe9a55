"""How fast it is: `python -m training benchmark`, each figure beside an aim and a peer or floor of the same run."""
