"""How each number of a plan came to be: one file per group of numbers, all reading the objects that the plan was made from."""
