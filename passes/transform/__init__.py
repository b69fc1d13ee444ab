"""Float to float, the same function: changes that make a site easier to quantize."""
