"""What removing experts is made of: how many of each layer, and in which steps."""
