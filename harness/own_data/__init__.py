"""For people who bring their own data: a look at it, and a first config."""
