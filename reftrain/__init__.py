"""reftrain: the reference trainer that runs a plan file as it is and measures it against its prediction."""
