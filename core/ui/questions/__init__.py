"""Further questions about the image's words: word pairs, a counterfactual, caption ranking, likelihood."""
