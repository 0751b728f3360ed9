"""What features do on texts: activations, rankings, specialists, contexts; no pictures."""
