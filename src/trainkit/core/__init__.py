"""What every other folder may use: errors, paths, devices, random number generators, nested tensors."""
