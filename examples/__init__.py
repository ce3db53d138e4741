"""Scripts that show what the library measures, and in `claims` experiments that test the theory with it."""
