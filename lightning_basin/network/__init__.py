"""A module of the user as a function that can be looked into."""
