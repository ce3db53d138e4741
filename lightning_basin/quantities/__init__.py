"""The quantities of a record, one file for each group of them."""
